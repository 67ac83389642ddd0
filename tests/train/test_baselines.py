"""The baselines against slow, obvious versions, and their tuning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.data import Data
from slatewise_train.evaluation import ease as linear_model
from slatewise_train.evaluation import interactions
from slatewise_train.evaluation.baselines import NEIGHBOURS, SHRINKAGES, item_knn, make_baselines, popularity
from slatewise_train.evaluation.cases import next_cases
from slatewise_train.evaluation.ease import RIDGES, all_shared, ease, exact_models, neighbour_models
from slatewise_train.evaluation.interactions import Baseline, Interactions, baseline_ranks, baseline_slates, best_of
from slatewise_train.evaluation.metrics import gains, rank_of, top_rows
from tests.train.test_offline import make_data


def random_data(seed: int, users: int = 25, items: int = 18, **split: Any) -> Data:
    """Users with 2 to 14 events, popular items first; some events repeat an item."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, items + 1)
    histories = {
        f"u{u}": [f"i{k}" for k in rng.choice(items, rng.integers(2, 15), p=shares / shares.sum())]
        for u in range(users)
    }
    return make_data(histories, [f"i{k}" for k in range(items)], **split)


def training_matrix(data: Data) -> np.ndarray:
    """Users by items, 1 if the user met the item in training: one loop over the events."""
    matrix = np.zeros((len(data.sequences), len(data.catalogue.numeric)))
    for user, length in enumerate(data.split.train_lengths):
        first = data.sequences.offsets[user]
        for item in data.sequences.items[first : first + length]:
            matrix[user, item] = 1
    return matrix


def slow_knn(data: Data, shrinkage: float, neighbours: int) -> np.ndarray:
    matrix = training_matrix(data)
    rows = matrix.shape[1]
    similar = np.zeros((rows, rows))
    for i in range(rows):
        for j in range(rows):
            both = matrix[:, i] @ matrix[:, j]
            if i != j and both:
                similar[i, j] = both / (np.sqrt(matrix[:, i].sum() * matrix[:, j].sum()) + shrinkage)
        floor = sorted(similar[i], reverse=True)[neighbours - 1] if neighbours < rows else 0
        similar[i, similar[i] < floor] = 0
    return similar


def slow_ease(data: Data, ridge: float) -> np.ndarray:
    """One ridge regression for each item."""
    matrix = training_matrix(data)
    weights = np.zeros((matrix.shape[1],) * 2)
    for j in range(matrix.shape[1]):
        others = np.delete(np.arange(matrix.shape[1]), j)
        x = matrix[:, others]
        weights[others, j] = np.linalg.solve(x.T @ x + ridge * np.eye(len(others)), x.T @ matrix[:, j])
    return weights


def slow_scores(weights: np.ndarray, seen: np.ndarray) -> np.ndarray:
    return np.sum([weights[item] for item in sorted(set(seen.tolist()))], axis=0)


def test_item_knn_equals_hand_computed_scores() -> None:
    """Users u: a b, v: a b c, w: c (training events); cosine(a, b) = 1, cosine(a, c) = cosine(b, c) = 1/2."""
    data = make_data({"u": ["a", "b", "x"], "v": ["a", "b", "c", "x"], "w": ["c", "x"]}, list("abcx"))
    u, _, w = (case.seen for case in next_cases(data, np.arange(3)))
    seen = Interactions(data)
    plain, _ = item_knn(seen, (0.0,), (100,))
    np.testing.assert_allclose(plain.score([u, w]), [[0, 0, 1, 1, 1, 0], [0, 0, 0.5, 0.5, 0, 0]], atol=1e-6)
    nearest, _ = item_knn(seen, (0.0,), (1,))
    np.testing.assert_allclose(nearest.score([u]), [[0, 0, 1, 1, 0, 0]], atol=1e-6)
    damped, _ = item_knn(seen, (2.0,), (100,))
    np.testing.assert_allclose(damped.score([w]), [[0, 0, 0.25, 0.25, 0, 0]], atol=1e-6)


@given(seed=st.integers(0, 50), shrinkage=st.sampled_from([0.0, 3.0]), neighbours=st.integers(1, 25))
@settings(max_examples=20, deadline=None)
def test_item_knn_equals_slow_similarities(seed: int, shrinkage: float, neighbours: int) -> None:
    data = random_data(seed)
    seen = Interactions(data)
    baseline, similar = item_knn(seen, (shrinkage,), (neighbours,))
    expected = slow_knn(data, shrinkage, neighbours)
    np.testing.assert_allclose(similar.toarray(), expected, atol=1e-6)
    histories = [case.seen for case in next_cases(data, np.arange(len(data.sequences)))]
    np.testing.assert_allclose(baseline.score(histories), [slow_scores(expected, h) for h in histories], atol=1e-5)


def test_item_knn_in_many_blocks_equals_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Interactions(random_data(3))
    _, whole = item_knn(seen, (1.0,), (5,))
    monkeypatch.setattr(interactions, "BLOCK_PAIRS", 40)
    assert len(list(seen.co_occurrences("test"))) > 4
    _, blocks = item_knn(seen, (1.0,), (5,))
    np.testing.assert_array_equal(blocks.toarray(), whole.toarray())


@pytest.mark.parametrize("ridge", RIDGES)
def test_exact_ease_equals_one_regression_per_item(ridge: float) -> None:
    data = random_data(1)
    found = dict(zip(RIDGES, (weights for _, weights in exact_models(Interactions(data))), strict=True))
    np.testing.assert_allclose(found[ridge], slow_ease(data, ridge), atol=1e-5)


def test_ease_of_all_neighbours_equals_exact_ease() -> None:
    """Items that share no user have the weight 0 in the approximation only, so every pair shares a user here."""
    items = [f"i{k}" for k in range(9)]
    histories = {f"u{u}": [*(items[u % 9 :] + items[: u % 9])[: 4 + u % 5], "last"] for u in range(30)}
    data = make_data(histories | {"all": [*items, "last"]}, [*items, "last"])
    seen = Interactions(data)
    _, similar = item_knn(seen, (0.0,), (100,))
    shared = all_shared(seen)
    assert shared is not None
    exact = [weights for _, weights in exact_models(seen)]
    near = [weights.toarray() for _, weights in neighbour_models(seen, shared, similar)]
    np.testing.assert_allclose(near, exact, atol=1e-5)


def test_ease_of_large_catalogue_reads_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_data(2, users=60)
    seen = Interactions(data)
    _, similar = item_knn(seen, (0.0,), (3,))
    monkeypatch.setattr(linear_model, "EXACT_ITEMS", 3)
    monkeypatch.setattr(linear_model, "NEIGHBOURS", 3)
    shared = all_shared(seen)
    assert shared is not None
    weights = next(iter(neighbour_models(seen, shared, similar)))[1].toarray()
    matrix = training_matrix(data)
    for j in range(FIRST_ITEM, len(weights)):
        near = np.argsort(-similar.toarray()[j], kind="stable")[: min(3, np.count_nonzero(similar.toarray()[j]))]
        x = matrix[:, near]
        expected = np.linalg.solve(x.T @ x + RIDGES[0] * np.eye(len(near)), x.T @ matrix[:, j])
        np.testing.assert_allclose(weights[near, j], expected, atol=1e-5)
        assert np.count_nonzero(weights[:, j]) <= 3
    assert isinstance(ease(seen, similar), Baseline)
    monkeypatch.setattr(linear_model, "MOST_ITEMS", 10)
    assert ease(seen, similar) == "20 items, its limit is 10"
    monkeypatch.undo()
    monkeypatch.setattr(linear_model, "EXACT_ITEMS", 3)
    monkeypatch.setattr(linear_model, "MOST_CELLS", 5)
    assert ease(seen, similar) == "more than 5 pairs of items have a common user"


def test_make_baselines_says_why_ease_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_model, "EXACT_ITEMS", 3)
    monkeypatch.setattr(linear_model, "MOST_CELLS", 5)
    baselines, left_out = make_baselines(random_data(0))
    assert list(baselines) == ["popularity", "item-kNN"]
    assert left_out == {"EASE": "the baseline EASE: more than 5 pairs of items have a common user"}


def test_ease_without_training_events_is_left_out_silently(capfd: pytest.CaptureFixture[str]) -> None:
    """LAPACK writes its complaint about an empty matrix to the process's own output."""
    baselines, left_out = make_baselines(make_data({"u": ["a"], "v": ["b"]}, list("ab")))
    assert list(baselines) == ["popularity", "item-kNN"]
    assert left_out == {"EASE": "the baseline EASE: there is no training event to count"}
    captured = capfd.readouterr()
    assert "DPO" not in captured.out + captured.err


def test_tuning_chooses_the_best_setting_on_validation_users() -> None:
    data = random_data(5, users=40, slate_size=2, validation_users=15)
    seen = Interactions(data)
    assert len(seen.tuning) == len(data.split.validation_users) > 5
    for case in seen.tuning:
        first = data.sequences.offsets[case.user]
        assert case.upcoming.tolist() == [data.sequences.items[first + data.split.train_lengths[case.user]]]
    chosen, _ = item_knn(seen)
    tried = [item_knn(replace_tuning(seen, []), (h,), (n,))[0] for h in SHRINKAGES for n in NEIGHBOURS]
    assert seen.quality(chosen) == max(map(seen.quality, tried))


def replace_tuning(seen: Interactions, tuning: list[Any]) -> Interactions:
    copy = Interactions.__new__(Interactions)
    copy.__dict__ |= seen.__dict__ | {"tuning": tuning}
    return copy


def test_without_validation_users_the_first_setting_is_used() -> None:
    seen = Interactions(random_data(5))
    assert not seen.tuning
    baseline, _ = item_knn(seen)
    assert baseline.settings == "shrinkage 10, 100 neighbours, not tuned without validation users"
    assert best_of(seen, [(baseline, 1), (baseline, 2)]) == (baseline, 1)


def test_long_user_counts_with_newest_events_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interactions, "READ_EVENTS", 3)
    data = make_data({"u": ["a", "b", "c", "d", "x"], "v": ["a", "x"]}, list("abcdx"))
    matrix = Interactions(data).matrix.toarray()
    assert matrix[:, FIRST_ITEM:].tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]


def test_too_many_pairs_are_counted_on_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_data(0, users=60)
    whole = Interactions(data)
    pairs = (np.diff(whole.matrix.indptr) ** 2).sum()
    monkeypatch.setattr(interactions, "MOST_PAIRS", pairs // 2)
    sample = Interactions(data)
    assert 0.2 < sample.counted < 0.8 and (np.diff(sample.matrix.indptr) ** 2).sum() <= pairs // 2
    assert f"counted on {sample.counted:.0%} of the users" in item_knn(sample)[0].settings
    np.testing.assert_array_equal(sample.popularity, whole.popularity)
    assert Interactions(data).matrix.toarray().tolist() == sample.matrix.toarray().tolist()


@pytest.mark.parametrize("chunk", [1, 50, 10_000])
def test_baseline_ranks_equal_one_user_at_a_time(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(interactions, "CHUNK_SCORES", chunk)
    data = random_data(7)
    cases = list(next_cases(data, np.arange(len(data.sequences))))
    rows = len(data.catalogue.numeric)
    for baseline in make_baselines(data)[0].values():
        ranks, lists = baseline_ranks(baseline, cases, rows)
        for case, rank, best in zip(cases, ranks, lists, strict=True):
            scores = baseline.score([case.seen])[0].astype(float)
            target = int(case.upcoming[0])
            hidden = set() if target in case.seen else set(case.seen.tolist())
            scores[[k for k in range(rows) if k < FIRST_ITEM or k in hidden]] = -np.inf
            assert rank == rank_of(scores, target)
            order = [k for k in sorted(range(rows), key=lambda k: (-scores[k], k)) if scores[k] > -np.inf][:10]
            assert best.tolist() == order + [0] * (10 - len(order))
        slates = baseline_slates(baseline, cases, rows)
        for case, found in zip(cases, slates, strict=True):
            np.testing.assert_allclose(found, baseline.score([case.seen])[0, case.upcoming])
    assert len(baseline_ranks(popularity(Interactions(data)), [], rows)[0]) == 0


@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), max_size=5), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_top_rows_equal_a_stable_sort(drawn: list[list[int]], depth: int) -> None:
    scores = np.array(drawn, float).reshape(-1, 4)
    scores[scores == 0] = -np.inf
    for row, found in zip(scores, top_rows(scores, depth), strict=True):
        order = [k for k in sorted(range(4), key=lambda k: (-row[k], k)) if row[k] > -np.inf][:depth]
        assert found.tolist() == order + [0] * (depth - len(order))


def test_knn_beats_popularity_if_items_come_in_groups() -> None:
    rng = np.random.default_rng(0)
    histories = {f"u{u}": [f"g{u % 6}-{k}" for k in rng.permutation(8)] for u in range(60)}
    data = make_data(histories, sorted({item for items in histories.values() for item in items}))
    cases = list(next_cases(data, np.arange(len(data.sequences))))
    rows = len(data.catalogue.numeric)
    found = {name: gains(baseline_ranks(b, cases, rows)[0]).mean() for name, b in make_baselines(data)[0].items()}
    assert found["popularity"] < 0.2 < 0.9 < found["item-kNN"] and found["EASE"] > 0.9


def test_sparse_item_knn_of_a_wide_catalogue_is_fast() -> None:
    """92,000 items: a dense matrix would have 8.5 billion numbers."""
    rng = np.random.default_rng(0)
    rows = 92_000
    seen = Interactions(make_data({"u": ["a", "b"]}, ["a", "b"]))
    seen.rows = rows
    seen.matrix = interactions.distinct_pairs(
        np.repeat(np.arange(22_000), 9), rng.integers(FIRST_ITEM, rows, 198_000), (22_000, rows)
    )
    baseline, similar = item_knn(seen, (10.0,), (100,))
    assert sparse.issparse(similar) and similar.nnz < 3_000_000
    assert baseline.score([np.array([5, 6])]).shape == (1, rows)
