"""The metrics against slow, obvious versions, and the data that each case of the evaluation may use."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slatewise.bundle.features import gap_buckets, request_context, window_start
from slatewise.bundle.ranker import Ranker
from slatewise.inference.arrays import FIRST_ITEM, Candidates, History, PointScores
from slatewise.inference.engine import Engine
from slatewise_train.config import DataConfig, Head
from slatewise_train.data import (
    Data,
    build_catalogue,
    build_sequences,
    clean_events,
    count_popularity,
    split_sequences,
    training_events,
)
from slatewise_train.evaluation import cases as evaluation_cases
from slatewise_train.evaluation.baselines import make_baselines, popularity
from slatewise_train.evaluation.cases import candidates_of, next_cases, score_exits, slate_cases, state_of
from slatewise_train.evaluation.interactions import Interactions
from slatewise_train.evaluation.metrics import (
    BINS,
    auc,
    calibration_error,
    gains,
    hits,
    interval,
    ndcg,
    rank_of,
    ranks_of,
)
from slatewise_train.evaluation.offline import leave_one_out, run_cases, slates, tabulate
from slatewise_train.evaluation.report import quality_table, report_text, sample_line
from slatewise_train.evaluation.sampling import in_parallel, sample_users
from tests.conftest import Tiny

SCORES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), max_size=30)  # few values, so many ties


def columns(drawn: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.array(drawn, float).reshape(-1, 2).T
    return scores, labels


def make_data(histories: dict[str, list[str]], items: list[str], **split: Any) -> Data:
    """A user's k-th event is at 1000 k seconds, and is liked if k is even."""
    config = DataConfig(
        "shop", (Head("watch", "next", 1.0), Head("like", "label", 0.5)), numeric=("popularity",), **split
    )
    rows = [
        (user, item, 1000.0 * k, float(k % 2 == 0))
        for user, sequence in histories.items()
        for k, item in enumerate(sequence)
    ]
    events, bad = clean_events(pl.DataFrame(rows, ["user_id", "item_id", "timestamp", "label_like"], orient="row"), 0.0)
    catalogue = build_catalogue(pl.DataFrame({"item_id": items}, schema={"item_id": pl.String}), events, config)
    sequences = build_sequences(events, catalogue.vocabulary, config)
    division = split_sequences(sequences, config)
    count_popularity(catalogue, sequences, division, config)
    return Data(config, catalogue, sequences, division, bad)


class FakeEngine:
    """An engine that scores an item by its row of `worth`, at every exit alike. It records its requests in `asked`."""

    start = None

    def __init__(self, worth: np.ndarray) -> None:
        self.items = np.arange(len(worth), dtype=np.float32)[:, None]  # an item's vector is its row
        self.sessions = dict.fromkeys(("encode", "dot", "point", "set"))
        self.worth = worth
        self.asked: list[tuple[History, Candidates]] = []

    def extend(self, state: None, history: History) -> History:
        return history

    def point(self, candidates: Candidates, meta: np.ndarray, state: History, rows: slice = slice(None)) -> PointScores:
        self.asked.append((state, candidates))
        rows = candidates.vectors[rows, 0].astype(int)
        probabilities = np.repeat(self.worth[rows][:, None], 2, axis=1)
        return PointScores(probabilities, probabilities, probabilities)

    def dot(self, candidates: Candidates, state: History) -> np.ndarray:
        return self.point(candidates, np.zeros(0), state).probabilities

    def set(self, point: PointScores) -> np.ndarray:
        return point.probabilities

    def score(self, history: History, candidates: Candidates, meta: np.ndarray, exit: str) -> np.ndarray:
        return self.point(candidates, meta, history).probabilities


@given(SCORES.filter(bool), st.data())
@settings(max_examples=60, deadline=None)
def test_rank_of_equals_the_position_in_a_stable_sort(drawn: list[tuple[int, int]], data: st.DataObject) -> None:
    scores, _ = columns(drawn)
    target = data.draw(st.integers(0, len(scores) - 1))
    order = sorted(range(len(scores)), key=lambda k: (-scores[k], k))
    assert rank_of(scores, target) == order.index(target)


@pytest.mark.parametrize("own", [np.nan, np.inf, -np.inf])
def test_element_without_finite_score_is_no_hit(own: float) -> None:
    """All comparisons with NaN are false, which must not be read as: nothing is better."""
    for count in (3, 30):
        scores = np.full((4, count), 0.5)
        scores[:, 1] = own
        scores[1] = np.nan
        ranks = ranks_of(scores, np.ones(4, np.int64))
        assert hits(ranks).tolist() == gains(ranks).tolist() == [0] * 4 and (ranks >= count).all()
        assert rank_of(scores[0], 1) == ranks[0]
    assert ranks_of(np.array([[0.5, np.nan, 0.1]]), np.array([0])).tolist() == [1], "another item without a score"
    labels = np.array([1.0, 0.0, 1.0, 0.0])
    scores = np.array([own, 0.5, own, 0.5])
    assert ndcg(scores, labels) == auc(scores, labels) == 0
    assert ndcg(np.full(4, np.nan), labels) == auc(np.full(4, np.nan), labels) == 0


@given(SCORES, st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_ndcg_equals_definition_with_stable_ties(drawn: list[tuple[int, int]], depth: int) -> None:
    scores, labels = columns(drawn)
    found = ndcg(scores, labels, depth)
    if len(set(labels)) < 2:
        assert math.isnan(found)
        return
    order = sorted(range(len(scores)), key=lambda k: (-scores[k], k))
    gain = sum(labels[k] / math.log2(place + 2) for place, k in enumerate(order[:depth]))
    best = sum(1 / math.log2(place + 2) for place in range(min(depth, int(labels.sum()))))
    assert found == pytest.approx(gain / best)


def test_ndcg_small_lists_equal_hand_computed_values() -> None:
    assert ndcg(np.array([3.0, 2.0, 1.0]), np.array([0, 1, 1])) == pytest.approx(
        (1 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3))
    )
    assert ndcg(np.array([1.0, 1.0]), np.array([1, 0])) == 1.0
    assert ndcg(np.array([1.0, 1.0]), np.array([0, 1])) == pytest.approx(1 / math.log2(3))


@given(SCORES)
@settings(max_examples=80, deadline=None)
def test_auc_is_the_share_of_ordered_pairs(drawn: list[tuple[int, int]]) -> None:
    scores, labels = columns(drawn)
    found = auc(scores, labels)
    pairs = list(itertools.product(scores[labels == 1], scores[labels == 0]))
    if not pairs:
        assert math.isnan(found)
        return
    assert found == pytest.approx(sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs))


@given(n=st.integers(1, 100), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_calibration_error_equals_mean_over_equal_bins(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.random(n)
    labels = (rng.random(n) < 0.5).astype(float)
    ranked = sorted(zip(probabilities, labels, strict=True))
    expected = 0.0
    first = 0
    for k in range(BINS):
        size = n // BINS + (k < n % BINS)
        part = ranked[first : first + size]
        first = first + size
        expected += abs(sum(p for p, _ in part) - sum(label for _, label in part)) / n
    assert calibration_error(probabilities, labels) == pytest.approx(expected)


def test_calibration_error_equals_hand_computed_values() -> None:
    assert calibration_error(np.full(30, 0.7), np.zeros(30)) == pytest.approx(0.7)
    assert calibration_error(np.repeat([0.0, 1.0], 30), np.repeat([0.0, 1.0], 30)) == 0.0


def test_interval_covers_mean_and_narrows_with_sample() -> None:
    rng = np.random.default_rng(0)
    small = interval(rng.random(50))
    large = interval(rng.random(5000))
    for mean, low, high in (small, large):
        assert low < mean < high
    expected = 1.96 * math.sqrt(1 / 12 / 5000)  # of a mean of uniform numbers
    assert (large[2] - large[1]) / 2 == pytest.approx(expected, rel=0.15)
    assert small[2] - small[1] > 3 * (large[2] - large[1])
    assert interval(np.full(7, 0.25)) == [0.25, 0.25, 0.25]
    assert interval(np.arange(9.0), seed=3) == interval(np.arange(9.0), seed=3)


def test_leave_one_out_excludes_items_of_the_history() -> None:
    items = [f"i{k}" for k in range(150)]
    data = make_data({"u": ["i9", "i3", "i9", "i5"], "v": ["i0", "i1"], "short": ["i1"]}, items)
    worth = np.linspace(0, 1, len(items) + FIRST_ITEM)
    worth[[FIRST_ITEM + k for k in (9, 3)]] = 2.0, 3.0  # the best two; i9 is in the history of u only
    engine = FakeEngine(worth)
    ranks, _ = leave_one_out(engine, data, 0, np.zeros(0), np.arange(3), make_baselines(data)[0])  # type: ignore[arg-type]
    # u's target is i5: the 144 behind it beat it, i9 and i3 are removed. v's is i1: i0 is removed, all others beat it
    expected = [144 - 1, 148]
    for exit in ("dot", "point", "set"):
        assert ranks[exit].tolist() == expected, exit
    assert all(len(found) == 2 for found in ranks.values()), "a user with one event has no history"


def test_reranking_a_small_catalogue_excludes_the_history() -> None:
    data = make_data({"u": ["a", "b", "c"]}, list("abcde"))
    engine = FakeEngine(np.array([0, 0, 0.9, 0.8, 0.7, 0.6, 0.5]))
    ranks, _ = leave_one_out(engine, data, 0, np.zeros(0), np.arange(1), make_baselines(data)[0])  # type: ignore[arg-type]
    assert ranks["point"].tolist() == [0]
    assert ranks["set"].tolist() == [0]


def test_repeated_target_is_ranked_among_the_whole_history() -> None:
    """The history a b with target b: a stays among the candidates, so a scorer of the history gains no advantage."""
    data = make_data({"u": ["a", "b", "b"], "v": ["a", "b", "c"]}, list("abcde"))
    engine = FakeEngine(np.array([0, 0, 0.9, 0.8, 0.7, 0.6, 0.5]))
    ranks, best = leave_one_out(engine, data, 0, np.zeros(0), np.arange(2), make_baselines(data)[0])  # type: ignore[arg-type]
    for exit in ("dot", "point", "set"):
        assert ranks[exit].tolist() == [1, 0] and best[exit][0, :5].tolist() == [2, 3, 4, 5, 6]
    assert ranks["popularity"].tolist() == [1, 0]


def test_set_reranks_only_the_best_items_of_point() -> None:
    items = [f"i{k}" for k in range(300)]
    data = make_data({"in": ["i299", "i250"], "out": ["i299", "i5"]}, items)
    engine = FakeEngine(np.linspace(0, 1, len(items) + FIRST_ITEM))
    reverse = lambda point: -point.probabilities  # noqa: E731
    engine.set = reverse  # type: ignore[method-assign]
    ranks, _ = leave_one_out(engine, data, 0, np.zeros(0), np.arange(2), make_baselines(data)[0])  # type: ignore[arg-type]
    assert ranks["point"].tolist() == [48, 293]
    assert ranks["set"].tolist() == [99 - 48, 293]


def test_leave_one_out_request_hides_target_and_its_time() -> None:
    data = make_data({"u": [f"i{k}" for k in range(9)], "v": ["i0", "i1"]}, [])
    engine = FakeEngine(np.zeros(9 + FIRST_ITEM))
    (case,) = next_cases(data, np.array([0]))
    assert case.time == 7000.0 and case.upcoming.tolist() == [data.sequences.items[8]]
    leave_one_out(engine, data, 0, np.zeros(0), np.arange(1), make_baselines(data)[0])  # type: ignore[arg-type]
    assert engine.asked
    for history, candidates in engine.asked:
        assert history.items.tolist() == data.sequences.items[:8].tolist()
        np.testing.assert_array_equal(candidates.context[0], request_context(7000.0))


@given(length=st.integers(2, 30), longest=st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_history_of_a_case_equals_the_window_of_a_request(length: int, longest: int) -> None:
    data = make_data({"u": [f"i{k}" for k in range(length)]}, [], history_length=longest)
    (case,) = next_cases(data, np.array([0]))
    first = window_start(0, length - 1, longest)
    s = data.sequences
    assert case.history.items.tolist() == s.items[first : length - 1].tolist()
    np.testing.assert_array_equal(case.history.gaps, gap_buckets(s.timestamps[first : length - 1]))
    assert case.seen.tolist() == s.items[: length - 1].tolist(), "items before the window are excluded too"


def test_slate_cases_equal_the_held_out_events() -> None:
    data = make_data(
        {user: [f"{user}{k}" for k in range(n)] for user, n in (("a", 20), ("b", 15), ("c", 4), ("d", 13))},
        [],
        slate_size=5,
        slate_users=2,
    )
    cases = slate_cases(data, data.split.slate_users)
    assert [case.user for case in cases] == data.split.slate_users.tolist() and len(cases) == 2
    for case in cases:
        mine = data.sequences.items[data.sequences.offsets[case.user] : data.sequences.offsets[case.user + 1]]
        assert case.upcoming.tolist() == mine[-5:].tolist()
        assert case.seen.tolist() == mine[:-5].tolist() and len(case.seen) == data.split.train_lengths[case.user]
        assert case.time == 1000.0 * (len(mine) - 6)
        np.testing.assert_array_equal(case.labels[:, 1], [float(k % 2 == 0) for k in range(len(mine) - 5, len(mine))])


def test_cases_never_predict_training_events(tiny: Tiny) -> None:
    data = tiny.trainer.data
    lengths = np.diff(data.sequences.offsets)
    split = data.split
    for user, case in zip(split.validation_users, slate_cases(data, split.validation_users), strict=True):
        mine = data.sequences.items[data.sequences.offsets[user] : data.sequences.offsets[user + 1]]
        assert case.upcoming.tolist() == mine[split.train_lengths[user] : -1].tolist(), (
            "the last event is for leave-one-out"
        )
    for case in next_cases(data, np.arange(len(lengths))):
        assert split.train_lengths[case.user] <= lengths[case.user] - 1 == len(case.seen)


def test_slates_exclude_events_without_label() -> None:
    data = make_data({user: [f"{user}{k}" for k in range(12)] for user in "abc"}, [], slate_size=4, slate_users=3)
    data.sequences.labels[data.sequences.offsets[1] - 1, 1] = np.nan  # a's last
    engine = FakeEngine(np.arange(36.0 + FIRST_ITEM))
    (found,) = slates(engine, data, [1], np.zeros(0), make_baselines(data)[0])  # type: ignore[arg-type]
    for name in ("dot", "point", "set", "popularity", "item-kNN", "EASE"):
        assert [len(scores) for scores, _ in found[name]] == [len(labels) for _, labels in found[name]] == [3, 4, 4]
        assert [labels.tolist() for _, labels in found[name]] == [[1, 0, 1], [1, 0, 1, 0], [1, 0, 1, 0]]


def test_training_events_exclude_held_out_events() -> None:
    data = make_data({"u": ["a", "b", "c"], "v": ["b", "b", "a"], "w": ["c"]}, list("abcd"))
    users, items = training_events(data.sequences, data.split)
    assert users.tolist() == [0, 0, 1, 1]
    assert [data.catalogue.vocabulary.items[i - FIRST_ITEM] for i in items] == ["a", "b", "b", "b"]
    (case, *_) = next_cases(data, np.array([0]))
    assert popularity(Interactions(data)).score([case.seen]).tolist() == [[0, 0, 1, 3, 0, 0]]


def test_evaluate_reports_every_exit_baseline_and_difference(ranker: Ranker, tiny: Tiny) -> None:
    report = tabulate(run_cases(ranker.engines["fp32"], tiny.trainer.data, ranker.default_meta))
    names = {"dot", "point", "set", "popularity", "item-kNN", "EASE"}
    assert set(report["leave_one_out"]) == set(report["slates"]) == names
    assert {row["users"] for row in report["leave_one_out"].values()} == {60}
    assert set(report["set_against_point"]) == {
        "leave_one_out_hr10",
        "leave_one_out_ndcg10",
        "slate_ndcg10",
        "slate_auc",
    }
    for metric, table, key in (("slate_ndcg10", "slates", "ndcg10"), ("slate_auc", "slates", "auc_in_slate")):
        difference = report[table]["set"][key][0] - report[table]["point"][key][0]
        assert report["set_against_point"][metric][0] == pytest.approx(difference, abs=2e-4)
    assert {name for name, row in report["slates"].items() if "calibration_error" in row} == {"dot", "point", "set"}
    text = quality_table(report)
    assert all(text.count(f"| {name} |") == 3 for name in names)
    assert set(report["diversity"]) == names | {f"point, MMR {trade}" for trade in (0.9, 0.7, 0.5)}
    for name in names:
        assert report["diversity"][name]["ndcg10"] == report["leave_one_out"][name]["ndcg10"], "the same ten best"
    distances = [report["diversity"][name]["distance"][0] for name in report["diversity"] if name.startswith("point")]
    assert distances == sorted(distances), "MMR spreads the ten best, the more the less it looks at scores"
    assert 0 < report["diversity"]["popularity"]["coverage"] < report["diversity"]["point"]["coverage"] < 1


def slow_leave_one_out(engine: Engine, data: Data, meta: np.ndarray, users: np.ndarray) -> dict[str, list[int]]:
    """One user after another, the whole catalogue in one call of each exit, and a full sort."""
    rows = np.arange(FIRST_ITEM, len(engine.items))
    ranks: dict[str, list[int]] = {"dot": [], "point": [], "set": []}
    for case in next_cases(data, users):
        catalogue = candidates_of(engine, data, rows, case.time)
        target = int(case.upcoming[0])
        hidden = set() if target in case.seen else set(case.seen.tolist())
        orders = {}
        for exit in ("dot", "point"):
            scores = engine.score(case.history, catalogue, meta, exit)[:, 0]
            orders[exit] = [int(rows[k]) for k in np.argsort(-scores, kind="stable") if rows[k] not in hidden]
        best = np.array(orders["point"][:100])
        scores = engine.score(case.history, candidates_of(engine, data, best, case.time), meta, "set")[:, 0]
        orders["set"] = [*best[np.argsort(-scores, kind="stable")].tolist(), *orders["point"][100:]]
        for exit, order in orders.items():
            ranks[exit].append(order.index(target))
    return ranks


def test_leave_one_out_equals_one_user_at_a_time(ranker: Ranker, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_cases, "CATALOGUE_CHUNK", 300)
    data = tiny.trainer.data
    users = np.arange(12)
    engine = ranker.engines["fp32"]
    expected = slow_leave_one_out(engine, data, ranker.default_meta, users)
    runs = [leave_one_out(engine, data, 0, ranker.default_meta, users, {}) for _ in range(2)]
    for ranks, best in runs:
        assert {exit: found.tolist() for exit, found in ranks.items()} == expected
        for exit, found in ranks.items():
            for case, rank, rows in zip(next_cases(data, users), found, best[exit], strict=True):
                assert len(set(rows.tolist())) == 10 and (rows >= FIRST_ITEM).all()
                assert rows.tolist().index(case.upcoming[0]) == rank if rank < 10 else case.upcoming[0] not in rows
                assert not set(rows.tolist()) & (set(case.seen.tolist()) - {int(case.upcoming[0])})


def test_evaluated_users_are_a_fixed_sample(ranker: Ranker, tiny: Tiny) -> None:
    users = np.arange(100, 200)
    sample = sample_users(users, 30)
    assert len(sample) == 30 and (np.diff(sample) > 0).all() and set(sample) <= set(users)
    assert sample.tolist() == sample_users(users, 30).tolist() != users[:30].tolist()
    assert sample_users(users, None) is users and sample_users(users, 100) is users
    engine = ranker.engines["fp32"]
    data = tiny.trainer.data
    one, other = (run_cases(engine, data, ranker.default_meta, 7, baselines=False) for _ in range(2))
    assert (one.users, len(one.ranks["dot"]), len(one.slates["dot"])) == (60, 7, 7)
    assert all((one.ranks[exit] == other.ranks[exit]).all() for exit in one.ranks)
    assert tabulate(one)["sample"] == {"users": 7, "of": 60, "seed": 0}
    whole = run_cases(engine, data, ranker.default_meta, None, baselines=False)
    chosen = np.isin(np.flatnonzero(data.split.test_lengths), sample_users(np.flatnonzero(data.split.test_lengths), 7))
    assert (whole.ranks["set"][chosen] == one.ranks["set"]).all(), "the same users have the same ranks"


def test_an_error_of_one_case_ends_the_evaluation() -> None:
    called = []

    def fail(case: int) -> int:
        called.append(case)
        time.sleep(0.002)
        raise ValueError(f"case {case}")

    with pytest.raises(ValueError, match="case 0"):
        in_parallel(fail, range(10_000), "cases")
    assert len(called) < 10_000
    assert in_parallel(lambda x: x * x, range(50), "cases") == [x * x for x in range(50)]
    assert in_parallel(str, [], "cases") == []


@pytest.mark.parametrize("scores", [np.zeros(12), np.arange(12) // 4])
def test_ties_are_ranked_in_the_order_of_the_catalogue(scores: np.ndarray) -> None:
    data = make_data({"u": ["i0", "i5"], "v": ["i3", "i9"]}, [f"i{k}" for k in range(12)])
    engine = FakeEngine(np.concatenate([np.zeros(FIRST_ITEM), scores]))
    ranks, best = leave_one_out(engine, data, 0, np.zeros(0), np.arange(2), {})  # type: ignore[arg-type]
    for row, (seen, target) in enumerate(((0, 5), (3, 9))):
        order = [k for k in sorted(range(12), key=lambda k: (-scores[k], k)) if k != seen]
        for exit in ("dot", "point", "set"):
            assert ranks[exit][row] == order.index(target)
            assert best[exit][row].tolist() == [k + FIRST_ITEM for k in order[:10]]


@pytest.mark.parametrize(("histories", "label"), [({"u": ["a"]}, 1.0), ({"u": ["a"], "v": ["b"]}, math.nan)])
def test_evaluation_without_any_case_has_no_result(histories: dict[str, list[str]], label: float) -> None:
    data = make_data(histories, list("abc"))
    data.sequences.labels[:, 1] = label
    outcome = run_cases(FakeEngine(np.zeros(5)), data, np.zeros(0))  # type: ignore[arg-type]
    report = tabulate(outcome)
    assert report["leave_one_out"] == report["slates"] == report["set_against_point"] == {}
    assert report["sample"] == {"users": 0, "of": 0, "seed": 0}
    assert sample_line(report["sample"]) == ""
    assert report["not_measured"]["leave_one_out"] == "the next item, because no user has an event after another one"


def test_ranker_without_next_head_says_so() -> None:
    data = make_data({user: [f"{user}{k}" for k in range(12)] for user in "abc"}, [], slate_size=4, slate_users=3)
    object.__setattr__(data.config, "heads", (data.config.heads[1],))
    data = dataclasses.replace(data, sequences=dataclasses.replace(data.sequences, labels=data.sequences.labels[:, 1:]))
    report = tabulate(run_cases(FakeEngine(np.arange(38.0)), data, np.zeros(0)))  # type: ignore[arg-type]
    assert report["sample"] == {"users": 0, "of": 3, "seed": 0} and report["slates"]
    text = report_text(report | {"verdict": {"line": "Verdict"}, "leakage": {}})
    assert "0 of 3" not in text and "A sample" not in text
    assert "Not measured: the next item, because the ranker has no head of kind `next`." in text


def test_each_held_out_slate_is_scored_once() -> None:
    data = make_data({user: [f"{user}{k}" for k in range(12)] for user in "abc"}, [], slate_size=4, slate_users=3)
    engine = FakeEngine(np.arange(36.0 + FIRST_ITEM))
    both = slates(engine, data, [0, 1], np.zeros(0), {})  # type: ignore[arg-type]
    assert len(engine.asked) == 2 * 3, "`dot` and `point` of three slates; `set` reads the result of `point`"
    assert [set(found) for found in both] == [{"dot", "point", "set"}] * 2
    for head, found in enumerate(both):
        (alone,) = slates(engine, data, [head], np.zeros(0), {})  # type: ignore[arg-type]
        for exit, cases in found.items():
            for one, other in zip(cases, alone[exit], strict=True):
                np.testing.assert_array_equal(one, other)


def test_scores_by_exit_equal_those_of_the_engine(ranker: Ranker, tiny: Tiny) -> None:
    data = tiny.trainer.data
    engine = ranker.engines["fp32"]
    for case in slate_cases(data, data.split.slate_users)[:4]:
        candidates = candidates_of(engine, data, case.upcoming, case.time)
        found = score_exits(engine, candidates, ranker.default_meta, state_of(engine, case))
        assert set(found) == {"dot", "point", "set"}
        for exit, scores in found.items():
            expected = engine.score(case.history, candidates, ranker.default_meta, exit)
            np.testing.assert_array_equal(scores, expected)


def test_evaluation_of_slates_without_known_labels_has_no_table() -> None:
    data = make_data({user: [f"{user}{k}" for k in range(12)] for user in "abc"}, [], slate_size=4, slate_users=3)
    data.sequences.labels[:, 1] = np.nan
    report = tabulate(run_cases(FakeEngine(np.arange(38.0)), data, np.zeros(0)))  # type: ignore[arg-type]
    assert report["slates"] == {} and set(report["leave_one_out"]) >= {"dot", "point", "set", "item-kNN"}
    assert report["not_measured"]["slates"] == "none of 3 held-out slates has both labels of `like`"
    assert set(report["set_against_point"]) == {"leave_one_out_hr10", "leave_one_out_ndcg10"}
