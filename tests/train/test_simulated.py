"""The simulated world against slow loops: relevance, choices, best orders, and the tables that it writes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.config import read_config
from slatewise_train.data import load_data
from slatewise_train.demo.movielens import read_movielens
from slatewise_train.demo.simulated import __main__ as command
from slatewise_train.demo.simulated import experiment
from slatewise_train.demo.simulated.experiment import ALONE, ORACLE, Result
from slatewise_train.demo.simulated.oracle import context_free, expected_ndcg, random_ndcg
from slatewise_train.demo.simulated.tables import events_table, slate_time, write_world
from slatewise_train.demo.simulated.world import (
    GENRES,
    RATE,
    RECENT,
    Log,
    World,
    WorldConfig,
    last_choices,
    pick_items,
    simulate,
)

FOLDER = Path(__file__).parents[1] / "data" / "ml-latest-small"
SMALL = WorldConfig(users=60, items=80, slate_size=8, slates=5, organic=10)


@pytest.fixture(scope="module")
def films() -> pl.DataFrame:
    return pick_items(*read_movielens("ml-latest-small", FOLDER), SMALL.items)


@pytest.fixture(scope="module")
def world(films: pl.DataFrame) -> World:
    return World(SMALL, films)


@pytest.fixture(scope="module")
def log(world: World) -> Log:
    return simulate(world)


def slow_relevance(world: World, user: int, slate: list[int], recent: list[int]) -> list[float]:
    genres = [set(names.split("|")) for names in world.films["genres"]]
    strength = dict(zip(world.genre_names, world.substitution.tolist(), strict=True))
    found = []
    for item in slate:
        utility = float(world.utility[user, item])
        for other in slate:
            if other != item:
                shared = sum(strength[name] for name in genres[item] & genres[other])
                liked = 1 / (1 + math.exp(-float(world.utility[user, other])))
                utility -= world.config.neighbours * shared / len(genres[item] | genres[other]) * liked
        near = [len(genres[item] & genres[k]) / len(genres[item] | genres[k]) for k in recent]
        utility -= world.config.fatigue * sum(near) / len(near)
        found.append(1 / (1 + math.exp(-utility - world.intercept)))
    return found


def test_relevance_equals_a_loop_over_neighbours(world: World, log: Log) -> None:
    for user, slate in itertools.product(range(10), (0, 4)):
        items, recent = log.slates[user, slate].tolist(), log.recent[user, slate].tolist()
        expected = slow_relevance(world, user, items, recent)
        np.testing.assert_allclose(log.relevance[user, slate], expected, rtol=1e-5)


def test_films_keep_their_frequent_genres_only(films: pl.DataFrame) -> None:
    kept = set(films["genres"].str.split("|").explode())
    assert len(kept) == GENRES and {"Drama", "Comedy"} <= kept
    _, movies = read_movielens("ml-latest-small", FOLDER)
    before = dict(zip(movies["item_id"], movies["genres"], strict=True))
    for item, genres in films.select("item_id", "genres").iter_rows():
        assert genres and genres == "|".join(name for name in before[item].split("|") if name in kept)


def test_too_many_items_are_refused_with_the_number() -> None:
    with pytest.raises(ValueError, match=r"9999 items were asked for, and MovieLens latest-small has \d+ with"):
        pick_items(*read_movielens("ml-latest-small", FOLDER), 9999)


def test_intercept_gives_the_stated_rate(log: Log) -> None:
    assert abs(log.relevance.mean() - RATE) < 0.05


@pytest.mark.parametrize("switch", ["neighbours", "fatigue", "position_power"])
def test_switches_keep_users_and_items(world: World, films: pl.DataFrame, switch: str) -> None:
    other = World(dataclasses.replace(SMALL, **{switch: 0.5}), films)
    assert (other.utility == world.utility).all() and (other.old_scores == world.old_scores).all()


def test_without_neighbours_the_slate_does_not_matter(films: pl.DataFrame, log: Log) -> None:
    alone = World(dataclasses.replace(SMALL, neighbours=0.0), films)
    users, slates, recent = np.arange(10), log.slates[:10, 0], log.recent[:10, 0]
    single = [alone.relevance(users, slates[:, k : k + 1], recent) for k in range(slates.shape[1])]
    np.testing.assert_allclose(alone.relevance(users, slates, recent), np.concatenate(single, axis=1))
    np.testing.assert_allclose(context_free(alone, users, slates, recent, 3), np.concatenate(single, axis=1))


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_choices_are_as_frequent_as_their_probability(films: pl.DataFrame, power: float) -> None:
    many = World(dataclasses.replace(SMALL, users=2_000, organic=5, position_power=power), films)
    log = simulate(many)
    expected = (log.relevance / np.arange(1, SMALL.slate_size + 1) ** power).mean(axis=(0, 1))
    error = np.sqrt(expected / log.chosen[:, :, 0].size)
    assert (np.abs(log.chosen.mean(axis=(0, 1)) - expected) < 5 * error).all()


def test_users_choose_each_item_once(log: Log) -> None:
    for user in range(SMALL.users):
        bought = np.concatenate([log.organic[user], log.slates[user][log.chosen[user]]])
        assert len(set(bought.tolist())) == len(bought)
        assert all(len(set(slate)) == SMALL.slate_size for slate in log.slates[user].tolist())


def test_last_choices_equal_a_loop(log: Log) -> None:
    for user in range(SMALL.users):
        history = log.organic[user].tolist()
        for t in range(SMALL.slates):
            assert log.recent[user, t].tolist() == history[-RECENT:]
            history += log.slates[user, t][log.chosen[user, t]].tolist()
    before = np.array([[1, 2, 3]])
    chosen = np.array([[True, False, True, True, True]])
    assert last_choices(before, np.array([[4, 5, 6, 7, 8]]), chosen).tolist() == [[6, 7, 8]]


def test_sorting_by_relevance_is_the_best_order() -> None:
    """Against every order of slates of 5, and the mean of them all is that of a random order."""
    relevance = np.random.default_rng(0).random((4, 5))
    orders = [np.array(order, float)[None].repeat(4, axis=0) for order in itertools.permutations(range(5))]
    for depth in (1, 3, 5, 10):
        found = np.stack([expected_ndcg(order, relevance, depth) for order in orders])
        np.testing.assert_allclose(found.max(axis=0), expected_ndcg(relevance, relevance, depth))
        np.testing.assert_allclose(found.max(axis=0), 1)
        np.testing.assert_allclose(found.mean(axis=0), random_ndcg(relevance, depth))


def test_expected_ndcg_is_that_of_drawn_labels(world: World, log: Log) -> None:
    """The DCG of the relevance is the mean DCG of choices that are drawn by it."""
    rng = np.random.default_rng(0)
    relevance = log.relevance[:1, 0]
    scores = rng.random(relevance.shape)
    order = np.argsort(-scores[0])[:5]
    drawn = rng.random((20_000, relevance.shape[1])) < relevance
    dcg = (drawn[:, order] / np.log2(np.arange(2, 7))).sum(axis=1).mean()
    best = (np.sort(relevance[0])[::-1][:5] / np.log2(np.arange(2, 7))).sum()
    assert expected_ndcg(scores, relevance, 5)[0] == pytest.approx(dcg / best, abs=0.02)


def test_context_free_is_the_mean_over_random_slates(world: World, log: Log) -> None:
    users, slates, recent = np.arange(3), log.slates[:3, 0], log.recent[:3, 0]
    found = context_free(world, users, slates, recent, 400)
    rng = np.random.default_rng(7)
    for user, place in itertools.product(range(3), (0, 5)):
        item = int(slates[user, place])
        values = []
        for others in world.draw_slates(np.full(400, user), None, rng).tolist():
            others[others.index(item) if item in others else 0] = item
            values.append(world.relevance(users[[user]], np.array([others]), recent[[user]])[0, others.index(item)])
        assert found[user, place] == pytest.approx(np.mean(values), abs=5 * np.std(values) / math.sqrt(200))


def test_context_free_is_between_utility_and_oracle(world: World, log: Log) -> None:
    users, slates, recent = np.arange(SMALL.users), log.slates[:, -1], log.recent[:, -1]
    relevance = log.relevance[:, -1]
    free = expected_ndcg(context_free(world, users, slates, recent, 50), relevance, 5).mean()
    utility = expected_ndcg(world.utility[users[:, None], slates], relevance, 5).mean()
    assert random_ndcg(relevance, 5).mean() < utility < free < 0.99


def test_events_table_has_a_row_for_each_shown_item(world: World, log: Log) -> None:
    events = events_table(world, log)
    shown = events.filter(pl.col("slate_id").is_not_null())
    assert len(shown) == log.slates.size and len(events) == log.slates.size + log.organic.size
    assert set(events.filter(pl.col("slate_id").is_null())["action"]) == {"buy"}
    assert (shown["label_buy"] == (shown["action"] == "buy")).all()
    one = shown.filter(pl.col("slate_id") == 2 * SMALL.slates + 3)  # user 2, slate 3
    assert one["user_id"].unique().to_list() == ["000002"]
    assert one["timestamp"].unique().to_list() == [slate_time(3)]
    assert one["position"].to_list() == list(range(1, SMALL.slate_size + 1))
    assert one["item_id"].to_list() == [world.films["item_id"][k] for k in log.slates[2, 3].tolist()]
    assert one["label_buy"].to_list() == log.chosen[2, 3].tolist()
    before = events.filter((pl.col("user_id") == "000002") & (pl.col("timestamp") < slate_time(3)))
    before = before.filter(pl.col("action") == "buy").sort("timestamp", maintain_order=True)
    assert before["item_id"].to_list()[-RECENT:] == [world.films["item_id"][k] for k in log.recent[2, 3].tolist()]


def test_a_folder_of_other_options_is_refused(world: World, log: Log, tmp_path: Path) -> None:
    toml = write_world(tmp_path, world, log, "epochs = 1")
    assert write_world(tmp_path, world, log, "epochs = 1") == toml
    with pytest.raises(ValueError, match="written by other options"):
        write_world(tmp_path, world, log, "epochs = 2")


def test_the_seed_decides_the_log(films: pl.DataFrame, log: Log) -> None:
    again = simulate(World(SMALL, films))
    assert (again.slates == log.slates).all() and (again.chosen == log.chosen).all()
    other = simulate(World(dataclasses.replace(SMALL, seed=1), films))
    assert (other.slates != log.slates).any()


def test_the_last_slate_is_ranked_if_others_have_no_choice(films: pl.DataFrame, tmp_path: Path) -> None:
    few = World(dataclasses.replace(SMALL, slate_size=4, position_power=3.0), films)
    log = simulate(few)
    assert (~log.chosen[:, -2].any(axis=1)).sum() > 5, "the split would hold out an earlier slate of these users"
    config = read_config(write_world(tmp_path, few, log, "epochs = 1"))
    data = load_data(config.data, config.tables)
    users, slates = experiment.last_slates(data)
    assert data.exposures is not None and len(users) == SMALL.users
    names = few.films["item_id"].to_list()
    for user, slate in zip(users, slates, strict=True):
        rows = data.exposures.items[data.exposures.offsets[slate] : data.exposures.offsets[slate + 1]]
        shown = [data.catalogue.vocabulary.items[row - FIRST_ITEM] for row in rows]
        assert shown == [names[k] for k in log.slates[int(data.sequences.users[user]), -1].tolist()]


def test_the_older_ranker_is_wrong_as_stated(films: pl.DataFrame) -> None:
    many = dataclasses.replace(SMALL, items=200, users=300)
    wrong, blind = (World(dataclasses.replace(many, old_ranker=r), films_of(200)) for r in (-0.9, 0.0))
    assert (wrong.utility == blind.utility).all()
    liked = wrong.utility.mean(axis=0)
    assert np.corrcoef(wrong.old_scores, liked)[0, 1] < -0.8 < np.corrcoef(blind.old_scores, liked)[0, 1] - 0.5


def films_of(count: int) -> pl.DataFrame:
    return pick_items(*read_movielens("ml-latest-small", FOLDER), count)


@pytest.fixture
def result() -> Result:
    """Slates of four users: `set` is right, `point` is not, and the oracle without neighbours is between them."""
    rng = np.random.default_rng(1)
    relevance = rng.random((4, 20))
    noise = rng.random((4, 20))
    genres = np.concatenate([[[0, 0]], np.stack([rng.integers(1, 4, 60), rng.integers(4, 7, 60)], axis=1)])
    scores = {"point": noise, "set": relevance.copy(), ALONE: relevance + noise, ORACLE: relevance}
    return Result(scores, relevance, rng.integers(1, 61, (4, 20)), [genres])


def test_shares_of_the_gain_are_ratios_of_means(result: Result) -> None:
    share, low, high = experiment.share_of_gain(result, "point")
    assert share == low == high == 1
    mean = {name: result.ndcg(name, 5).mean() for name in result.scores}
    share, low, high = experiment.share_of_gain(result, ALONE)
    assert share == pytest.approx((mean["set"] - mean["point"]) / (1 - mean[ALONE])) and low < share < high
    worse = Result(result.scores | {"set": result.scores[ALONE]}, result.relevance, result.rows, result.fields)
    chance = random_ndcg(result.relevance, 10).mean()
    whole, gain = experiment.recovered(worse, result, "set")
    found = worse.ndcg("set", 10).mean()
    assert whole[0] == pytest.approx(found) and gain[0] == pytest.approx((found - chance) / (1 - chance))
    assert whole[1] < whole[0] < whole[2] < 1


def test_mmr_of_equal_distance_is_found(result: Result) -> None:
    names = [experiment.add_mmr(result, trade) for trade in (1.0, 0.5, 0.1)]
    np.testing.assert_array_equal(result.ndcg(names[0], 10), result.ndcg("point", 10))
    distance = [result.distance(name).mean() for name in names]
    assert distance[0] < distance[1] <= distance[2]
    best = experiment.as_diverse(result, names)
    enough = [name for name in names if result.distance(name).mean() >= result.distance("set").mean()]
    assert best in enough and all(result.ndcg(best, 10).mean() >= result.ndcg(name, 10).mean() for name in enough)
    assert experiment.as_diverse(result, names[:1]) == names[0], "the most diverse one, if there is no other"


def test_picture_and_table_have_every_order(result: Result, tmp_path: Path) -> None:
    name = experiment.add_mmr(result, 0.5)
    experiment.plot(result, [name], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    lines = experiment.table(result)
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [*result.scores, "any order"]
    assert f"| {ORACLE} | 1.0000 (1.0000 to 1.0000) |" in lines[5]


def test_set_learns_the_neighbours(tmp_path: Path) -> None:
    """A small world with strong substitution: the paired interval of set - point is above 0."""
    torch.set_num_threads(1)
    config = dataclasses.replace(SMALL, users=400, items=60, neighbours=6.0, factors=1)
    lines = command.TRAIN.format(epochs=10) + 'slate_loss = "lambda"\n'
    found = experiment.run_world(tmp_path, "tiny", config, films_of(60), lines)
    _, low, _ = experiment.difference(found, "set", "point", 5)
    assert low > 0
    assert found.ndcg("set", 5).mean() > found.ndcg(ALONE, 5).mean()
