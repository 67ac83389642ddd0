"""Training on slates that were shown: their place in a batch, losses against loops, and corrections for positions."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn import functional as F

from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.batches import Batch, make_batch
from slatewise_train.config import DataConfig, Head, MetaConfig, ModelConfig, TablesConfig, TrainConfig
from slatewise_train.data import Data, load_data
from slatewise_train.evaluation.cases import slate_cases
from slatewise_train.exposures import training_slates
from slatewise_train.meta.limaml import MetaTrainer
from slatewise_train.rankers import families
from slatewise_train.rankers.base import uncalibrated
from slatewise_train.shown import (
    MOST_WEIGHT,
    PLACES,
    SINGLE_PLACES,
    Shown,
    ShownSlates,
    place_buckets,
    propensity_weights,
    slate_loss,
)
from slatewise_train.train import Trainer

torch.set_num_threads(1)

NEXT = Head("next", "next", 1.0)
BUY = Head("buy", "label", 1.0)
MODEL = ModelConfig(
    "ligr", {"width": 16, "blocks": 1, "attention_heads": 1, "set_blocks": 1, "meta_size": 4, "dropout": 0.1}
)
SHORT = TrainConfig(
    epochs=5,
    cascade_epochs=2,
    batch_events=512,
    learning_rate=0.02,
    warmup_steps=5,
    negatives=32,
    cascade_negatives=16,
    cascade_windows=32,
)
COLUMNS = ["user_id", "item_id", "timestamp", "label_buy", "slate_id", "position"]


def load(folder: Path, rows: list[tuple], heads: tuple[Head, ...] = (NEXT, BUY), **split: int) -> Data:
    path = folder / "events.parquet"
    pl.DataFrame(rows, COLUMNS, orient="row").write_parquet(path)
    tables = TablesConfig(str(path), history_actions=("label:buy",))
    return load_data(DataConfig("shop", heads, history_length=32, **split), tables)


def shop(folder: Path, users: int = 40, heads: tuple[Head, ...] = (NEXT, BUY), slates: int = 8) -> Data:
    """Slates of one bought item of 20, which the user's taste decides, and three of 30 items that no user ever buys."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(users):
        taste = rng.integers(2)
        for slate in range(slates):
            shown = [rng.integers(10) + 10 * taste, *(20 + rng.choice(30, 3, replace=False))]
            for position, k in enumerate(rng.permutation(4)):
                time = 1e9 + 86_400 * slate + user
                rows.append((f"u{user}", f"i{shown[k]:02d}", time, float(k == 0), f"{user}-{slate}", position + 1))
    return load(folder, rows, heads, slate_size=2, slate_users=users // 8, validation_users=users // 8)


def logits_of(trainer: Trainer, users: np.ndarray) -> dict[str, np.ndarray]:
    """Logits (users, items, heads) of each exit for the whole catalogue, after the training events."""
    model = trainer.model.eval()
    lengths = trainer.data.split.train_lengths[users]
    with torch.no_grad():
        table = model.item_table()
        batch = make_batch(trainer.data.sequences, [(int(u), 0, int(n)) for u, n in zip(users, lengths, strict=True)])
        history, encoded = model.encode(model.tokens(table[batch.items], batch.actions, batch.gaps))
        rows = torch.arange(len(users))
        vectors = table[None, FIRST_ITEM:].expand(len(users), -1, -1)
        numeric = trainer.numeric[None, FIRST_ITEM:].expand(len(users), -1, -1)
        fused = model.fuse(numeric, model.default_meta, batch.contexts[rows, batch.lengths][:, None])
        mask = (torch.arange(encoded.shape[1]) <= batch.lengths[:, None])[:, None, None]
        places = (batch.lengths[:, None] + 1).expand(-1, vectors.shape[1])
        hidden = model.hidden(vectors, history, places, mask, fused)
        dot = model.dot_logits(encoded[rows, batch.lengths][:, None], vectors)
        return {exit: logits.numpy() for exit, logits in model.logits_by_exit(dot, hidden).items()}


@pytest.mark.parametrize("heads", [(NEXT, BUY), (NEXT,), (BUY,)], ids=["both", "next", "label"])
def test_items_that_are_shown_and_never_bought_rank_last(tmp_path: Path, heads: tuple[Head, ...]) -> None:
    data = shop(tmp_path, 400, heads, slates=5)
    trainer = Trainer(data, MODEL, SHORT)
    for epoch in range(SHORT.epochs):
        trainer.run_epoch(cascade=epoch >= 3)
    never = np.array([int(name[1:]) >= 20 for name in data.catalogue.vocabulary.items])
    assert never.sum() == 30
    for exit, logits in logits_of(trainer, np.arange(400)).items():
        for k, head in enumerate(heads):
            best = np.argsort(-logits[..., k], axis=1)
            assert not never[best[:, :10]].any(), f"{exit}, {head.name}: the ten best are all bought by some users"
            assert never[best[:, -30:]].mean() > 0.95, f"{exit}, {head.name}: the last ones are never bought"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return shop(tmp_path_factory.mktemp("small"))


@pytest.fixture
def shown(small: Data) -> ShownSlates:
    found = Trainer(small, MODEL, SHORT).shown
    assert found is not None
    return found


def batch_of(data: Data) -> Batch:
    """Windows of the training events: whole histories, and a part of one."""
    return make_batch(data.sequences, [(0, 0, 6), (1, 2, 5), (2, 0, 3), (0, 4, 7)])


def expected_slates(data: Data, batch: Batch) -> list[list[int]]:
    """The training slates of each window, one by one."""
    e = data.exposures
    assert e is not None
    trained = set(training_slates(e, data.split.train_lengths).tolist())
    return [
        [s for s in range(len(e)) if s in trained and e.slate_users[s] == user and first <= e.history[s] <= first + n]
        for user, first, n in zip(batch.users, batch.firsts, batch.lengths, strict=True)
    ]


def test_slates_of_a_batch_are_those_of_its_windows(small: Data, shown: ShownSlates) -> None:
    batch = batch_of(small)
    windows, slates = shown.all_of(batch)
    found: list[list[int]] = [[] for _ in batch.users]
    for window, slate in zip(windows.tolist(), slates.tolist(), strict=True):
        found[window].append(slate)
    assert found == expected_slates(small, batch)
    assert sum(map(len, found)) > 10


@pytest.mark.parametrize("count", [1, 3, 50])
def test_drawn_slates_are_those_of_their_window(small: Data, shown: ShownSlates, count: int) -> None:
    batch = batch_of(small)
    for drawn, possible in zip(shown.draw(batch, count).tolist(), expected_slates(small, batch), strict=True):
        real = [s for s in drawn if s >= 0]
        assert set(real) <= set(possible) and len(real) == min(count, len(possible))
        if count == 50:
            assert real == possible, "all of them, each once"


def test_taken_slates_are_padded_with_unknown_items(small: Data, shown: ShownSlates) -> None:
    e = small.exposures
    assert e is not None
    short = dataclasses.replace(
        e,
        offsets=np.array([0, 2, 5], np.int64),
        slate_users=e.slate_users[:2],
        history=e.history[:2],
        ends=e.ends[:2],
        times=e.times[:2],
        items=np.array([7, 8, 9, 10, 11]),
        positions=np.array([1, 2, 1, 2, 3]),
        labels=np.arange(10, dtype=np.float32).reshape(5, 2),
    )
    found = ShownSlates(small, short, SHORT).take(torch.tensor([[1, 0]]))
    assert found.items.tolist() == [[[9, 10, 11], [7, 8, 0]]]
    assert found.exists.tolist() == [[[True, True, True], [True, True, False]]]
    assert found.positions.tolist() == [[[1, 2, 3], [1, 2, 0]]]
    assert found.labels[0, 1, :2].tolist() == [[0, 1], [2, 3]] and found.labels[0, 1, 2].isnan().all()


def some_slates() -> tuple[torch.Tensor, Shown]:
    """Logits (3, 4, 2) and slates of 4, 3 and 2 items, the last without a choice."""
    labels = torch.full((3, 4, 2), torch.nan)
    labels[0] = torch.tensor([[0, 0], [1, 1], [0, torch.nan], [0, 1]])
    labels[1, :3] = torch.tensor([[0, 0], [0, 0], [1, 1]])
    labels[2, :2] = 0
    exists = torch.arange(4) < torch.tensor([[4], [3], [2]])
    positions = torch.tensor([1, 2, 3, 4]) * exists
    torch.manual_seed(0)
    return torch.randn(3, 4, 2), Shown(torch.ones(3, 4).long() * exists, exists, labels, positions)


def test_loss_equals_a_loop_over_slates(shown: ShownSlates) -> None:
    logits, slates = some_slates()
    choices = []
    rated = []
    for x, exists, y in zip(logits, slates.exists, slates.labels, strict=True):
        real = [k for k in range(4) if exists[k]]
        if (y[real, 0] == 1).any():
            logs = torch.log_softmax(x[real, 0], 0)
            choices.append(-sum(logs[k] for k in real if y[k, 0] == 1))
        rated += [F.binary_cross_entropy_with_logits(x[k, 1], y[k, 1]) for k in real if not y[k, 1].isnan()]
    expected = torch.stack(choices).mean() + torch.stack(rated).mean()
    torch.testing.assert_close(shown.loss(logits, slates, [0, 1], "bce"), expected)


def test_weighted_loss_equals_a_loop_over_slates(small: Data) -> None:
    trainer = Trainer(small, MODEL, dataclasses.replace(SHORT, propensity_power=1.0))
    assert trainer.shown is not None
    logits, slates = some_slates()
    e = small.exposures
    assert e is not None
    rows = np.concatenate([np.arange(*e.offsets[s : s + 2]) for s in training_slates(e, small.split.train_lengths)])
    mean = e.positions[rows][e.labels[rows, 0] == 1].mean()
    assert trainer.shown.mean_weights.tolist() == pytest.approx([mean, mean])
    chosen = [
        -(float(slates.positions[s, k]) / mean) * torch.log_softmax(logits[s, : [4, 3][s], 0], 0)[k]
        for s, k in ((0, 1), (1, 2))
    ]
    torch.testing.assert_close(trainer.shown.loss(logits, slates, [0], "bce"), sum(chosen) / 2, check_dtype=False)


def test_next_event_is_added_to_slates_without_a_choice(small: Data, shown: ShownSlates) -> None:
    batch = batch_of(small)
    _, slates = some_slates()
    windows, read = torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])
    found = shown.with_next_event(slates, batch, windows, read)
    assert found.exists[:, -1].tolist() == [False, False, True]
    assert found.items[2, -1] == batch.items[2, 2]
    assert found.labels[2, -1, 0] == 1 and found.labels[2, -1, 1].isnan()
    assert found.labels[:2, -1].isnan().all()
    last = shown.with_next_event(slates, batch, windows, batch.lengths[:3])
    assert not last.exists[:, -1].any(), "no event follows the last one of a window"


def test_terms_of_places_are_ascending_and_few() -> None:
    buckets = place_buckets(torch.arange(2_000))
    assert buckets[: SINGLE_PLACES + 1].tolist() == list(range(SINGLE_PLACES + 1))
    assert (buckets.diff() >= 0).all() and (buckets.diff() <= 1).all()
    assert buckets[-1] == PLACES - 1


def test_position_bias_is_learned_and_not_exported(small: Data) -> None:
    trainer = Trainer(small, MODEL, dataclasses.replace(SHORT, position_bias=True))
    plain = Trainer(small, MODEL, SHORT)
    trainer.run_epoch(cascade=True)
    assert trainer.shown is not None and trainer.shown.place is not None
    weight = trainer.shown.place.weight
    assert (weight[1:5].abs() > 0).all() and not weight[0].any(), "an unknown position has no term"
    assert trainer.model.state_dict().keys() == plain.model.state_dict().keys()

    def graphs() -> list[bytes]:
        exporter = families.graphs(trainer.model.eval(), uncalibrated(trainer.model.exits, 2), 32)
        return [graph.SerializeToString() for graph in exporter.all().values()]

    before = graphs()
    with torch.no_grad():
        weight += 1
    assert graphs() == before


def test_position_terms_are_saved_with_the_training(small: Data, tmp_path: Path) -> None:
    config = dataclasses.replace(SHORT, position_bias=True)
    trainer = Trainer(small, MODEL, config)
    trainer.run_epoch(cascade=True)
    trainer.save(tmp_path / "checkpoint.pt")
    resumed = Trainer(small, MODEL, config)
    resumed.load(tmp_path / "checkpoint.pt")
    assert trainer.run_epoch(cascade=True) == resumed.run_epoch(cascade=True)


def test_corrections_of_positions_are_refused_without_positions(small: Data) -> None:
    both = dataclasses.replace(SHORT, position_bias=True, propensity_power=1.0)
    with pytest.raises(ValueError, match="position_bias and propensity_power correct the same bias"):
        Trainer(small, MODEL, both)
    assert small.exposures is not None
    unknown = dataclasses.replace(small.exposures, positions=np.zeros_like(small.exposures.positions))
    for exposures in (None, unknown):
        for key in ("position_bias", "propensity_power"):
            with pytest.raises(ValueError, match=rf"\[train\] {key} needs slates with positions"):
                Trainer(dataclasses.replace(small, exposures=exposures), MODEL, dataclasses.replace(SHORT, **{key: 1}))


@pytest.mark.parametrize("kind", ["softmax", "neural_ndcg", "lambda"])
def test_every_slate_loss_trains(small: Data, kind: str) -> None:
    config = dataclasses.replace(SHORT, slate_loss=kind)
    for data in (small, dataclasses.replace(small, exposures=None)):
        trainer = Trainer(data, MODEL, config)
        before = trainer.model.get_parameter("set_out.weight").clone()
        assert np.isfinite(trainer.run_epoch(cascade=True))
        assert not torch.equal(trainer.model.get_parameter("set_out.weight"), before)


def test_weighted_loss_of_clicks_is_that_of_a_fair_log() -> None:
    """All outcomes of a slate of three items: its item k is chosen with probability relevance_k / 10 / rank_k."""
    relevance = np.array([2, 3, 4])
    scores = torch.tensor([0.3, -0.5, 1.1])
    fair, biased, positions = [], [], []
    for order in itertools.permutations(range(3)):
        for rank, item in enumerate(order, start=1):
            label = torch.eye(3)[rank - 1]
            shown = scores[list(order)]
            fair += [(shown, label)] * int(6 * relevance[item])
            copies = int(6 * relevance[item] / rank)
            biased += [(shown, label)] * copies
            positions += [torch.arange(1, 4)] * copies
    weights = propensity_weights(torch.stack(positions), 1.0)
    labels = torch.stack([label for _, label in biased])
    weights = weights / weights[labels == 1].mean()
    expected = slate_loss("softmax", *(torch.stack(column) for column in zip(*fair, strict=True)))
    biased_scores = torch.stack([row for row, _ in biased])
    torch.testing.assert_close(slate_loss("softmax", biased_scores, labels, weights), expected)
    fixed = [(s, p, y, w) for s, p, y, w in zip(biased_scores, positions, labels, weights, strict=True) if s[0] == 0.3]
    naive = slate_loss("softmax", torch.stack([f[0] for f in fixed]), torch.stack([f[2] for f in fixed]))
    assert abs(naive - expected) > 0.02, "without weights, one order of the log decides"


def test_weights_are_cut_and_ones_where_unknown() -> None:
    weights = propensity_weights(torch.tensor([0, 1, 4, 300]), 1.0)
    assert weights.tolist() == [1, 1, 4, MOST_WEIGHT]
    assert propensity_weights(torch.tensor([0, 1, 4, 300]), 0.5)[2] == 2


def click_log(folder: Path, users: int = 300) -> Data:
    """Eight items in slates that an older ranker puts in about the wrong order. Clicks of item k: (k + 1) / 9 / rank.

    Each user clicked one item before and one after the slates, so that all slates stand in the training events.
    """
    rng = np.random.default_rng(3)
    rows = []
    for user in range(users):
        for slate in range(4):
            order = np.argsort(np.arange(8) + rng.normal(0, 2.5, 8))  # the best item, 7, is most often last
            clicked = rng.random(8) < (order + 1) / 9 / np.arange(1, 9)
            for position, item in enumerate(order):
                rows.append(
                    (
                        f"u{user}",
                        f"i{item}",
                        100.0 * slate + user,
                        float(clicked[position]),
                        f"{user}-{slate}",
                        position + 1,
                    )
                )
        for k in range(2):
            rows.append((f"u{user}", f"i{rng.integers(8)}", 1.0 + 9_000 * k, 1.0, None, None))
    return load(folder, rows, (BUY,), slate_size=1)


def test_corrections_recover_the_order_of_a_click_log(tmp_path: Path) -> None:
    data = click_log(tmp_path)
    truth = np.array([int(name[1:]) for name in data.catalogue.vocabulary.items])

    def correlation(**changes: float) -> float:
        config = dataclasses.replace(SHORT, epochs=20, batch_events=256, slate_loss="softmax", **changes)
        trainer = Trainer(data, MODEL, config)
        for _ in range(config.epochs):
            trainer.run_epoch(cascade=True)
        scores = logits_of(trainer, np.arange(100))["point"][..., 0].mean(0)
        return float(np.corrcoef(np.argsort(np.argsort(scores)), truth)[0, 1])

    naive = correlation()
    assert naive < 0.6
    assert correlation(propensity_power=1.0) > 0.9
    assert correlation(position_bias=True) > 0.9


def test_meta_learning_reads_the_history_alone(small: Data, tmp_path: Path) -> None:
    trainer = Trainer(small, MODEL, SHORT)
    config = MetaConfig(code=4, support=2, query=2, negatives=4, shortest=2, epochs=1)
    learned = [
        MetaTrainer(trainer.model, data, config).train(tmp_path / name).state_dict()
        for name, data in (("shown", small), ("history", dataclasses.replace(small, exposures=None)))
    ]
    for name, value in learned[0].items():
        assert torch.equal(value, learned[1][name])


def test_cases_of_the_evaluation_are_the_slates_that_were_shown(small: Data) -> None:
    e, split, sequences = small.exposures, small.split, small.sequences
    assert e is not None
    for users in (split.slate_users, split.validation_users):
        cases = slate_cases(small, users)
        assert {case.user for case in cases} == set(users.tolist())
        for case in cases:
            begin = sequences.offsets[case.user]
            slate = next(s for s in range(len(e)) if e.slate_users[s] == case.user and e.history[s] == len(case.seen))
            np.testing.assert_array_equal(case.upcoming, e.items[e.offsets[slate] : e.offsets[slate + 1]])
            np.testing.assert_array_equal(case.labels, e.labels[e.offsets[slate] : e.offsets[slate + 1]])
            assert case.time == e.times[slate]
            assert len(case.seen) >= split.train_lengths[case.user]
            taken = case.upcoming[case.labels[:, 0] == 1]
            assert taken == sequences.items[begin + len(case.seen)], "the event after the history"
            assert (sequences.timestamps[begin : begin + len(case.seen)] < case.time).all()
    bought = sequences.items[sequences.offsets[split.validation_users + 1] - 1]
    last = {case.user: case.upcoming for case in slate_cases(small, split.validation_users)}
    for user, target in zip(split.validation_users.tolist(), bought.tolist(), strict=True):
        slate = [s for s in range(len(e)) if e.slate_users[s] == user][-1]
        assert target in e.items[e.offsets[slate] : e.offsets[slate + 1]]
        assert not np.array_equal(last[user], e.items[e.offsets[slate] : e.offsets[slate + 1]]), (
            "the test event's slate"
        )
