"""Distance, coverage and MMR of best lists, against loops over sets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from slatewise_train.evaluation import diversity
from slatewise_train.evaluation.diversity import (
    TRADES,
    coverage,
    list_distance,
    measure_lists,
    mmr,
    mmr_lists,
    similarity,
)

GENRES = np.array([[0, 0, 0], [1, 2, 0], [2, 0, 0], [1, 2, 3], [0, 0, 0], [0, 0, 0], [3, 0, 0]])
DECADE = np.array([[0], [1], [1], [2], [0], [2], [3]])
FIELDS = (GENRES, DECADE)


def slow_similarity(one: int, other: int, fields: tuple[np.ndarray, ...]) -> float:
    found = []
    for values in fields:
        a, b = (set(values[row].tolist()) - {0} for row in (one, other))
        found.append(len(a & b) / len(a | b) if a | b else 1.0)
    return sum(found) / len(found)


def slow_mmr(scores: list[float], rows: list[int], trade: float, count: int) -> list[int]:
    low, high = min(scores), max(scores)
    picked: list[int] = []
    while len(picked) < count:
        best, most = -1, -float("inf")
        for k in range(len(rows)):
            near = max((slow_similarity(rows[k], rows[p], FIELDS) for p in picked), default=0.0)
            value = trade * (scores[k] - low) / (high - low) - (1 - trade) * near
            if k not in picked and value > most:
                best, most = k, value
        picked.append(best)
    return picked


@pytest.mark.parametrize("fields", [(GENRES,), FIELDS], ids=["one field", "two fields"])
def test_similarity_equals_that_of_sets(fields: tuple[np.ndarray, ...]) -> None:
    rows = np.arange(len(GENRES))
    expected = [[slow_similarity(a, b, fields) for b in rows] for a in rows]
    np.testing.assert_allclose(similarity(rows[:, None], rows[None], fields), expected)
    assert similarity(np.array(1), np.array(3), (GENRES,)) == pytest.approx(2 / 3)
    assert similarity(np.array(4), np.array(5), (GENRES,)) == 1, "both have no genre"
    assert similarity(np.array(4), np.array(6), (GENRES,)) == 0, "one has no genre"


@pytest.mark.parametrize("chunk", [1, 1_000_000])
def test_list_distance_is_the_mean_over_pairs(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity, "CHUNK", chunk)
    best = np.array([[1, 2, 3, 6], [1, 3, 0, 0], [5, 0, 0, 0], [0, 0, 0, 0], [4, 5, 6, 0]])
    found = list_distance(best, FIELDS)
    for row, value in zip(best, found, strict=True):
        pairs = [1 - slow_similarity(a, b, FIELDS) for a, b in itertools.combinations(row[row > 0], 2)]
        assert value == pytest.approx(np.mean(pairs)) if pairs else np.isnan(value)


def test_coverage_counts_each_item_once() -> None:
    assert coverage(np.array([[1, 2], [2, 0], [2, 3]]), items=6) == 0.5
    assert coverage(np.zeros((2, 10), np.int64), items=6) == 0


@pytest.mark.parametrize("trade", [1.0, 0.8, 0.5, 0.2, 0.0])
def test_mmr_equals_a_loop_over_lists(trade: float) -> None:
    rng = np.random.default_rng(0)
    rows = np.array([rng.permutation(np.arange(1, 7)) for _ in range(20)])
    scores = rng.integers(0, 5, rows.shape) / 4 + 0.01 * rng.random(rows.shape)
    found = mmr(scores, rows, FIELDS, trade, 4)
    expected = [slow_mmr(list(s), list(r), trade, 4) for s, r in zip(scores, rows, strict=True)]
    assert found.tolist() == expected


def test_mmr_at_one_keeps_the_order_of_scores() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, (10, 6)).astype(float)  # with ties
    rows = np.tile(np.arange(1, 7), (10, 1))
    assert (mmr(scores, rows, FIELDS, 1.0, 6) == np.argsort(-scores, axis=1, kind="stable")).all()
    assert (mmr(np.ones((1, 6)), rows[:1], FIELDS, 1.0, 6) == np.arange(6)).all(), "equal scores"


def test_mmr_leaves_missing_candidates_out() -> None:
    rows = np.array([[1, 2, 0, 0], [0, 0, 0, 0], [6, 3, 2, 0]])
    scores = np.array([[0.2, 0.9, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-3.0, -2.0, -1.0, 0.0]])
    assert mmr(scores, rows, FIELDS, 1.0, 3).tolist() == [[1, 0, -1], [-1, -1, -1], [2, 1, 0]]
    assert mmr(scores[:, :3], rows[:, :3], FIELDS, 0.5, 3).tolist() == mmr(scores, rows, FIELDS, 0.5, 3).tolist()


@pytest.mark.parametrize("size", [1, 7, 1_000])
def test_mmr_lists_do_not_depend_on_the_chunk(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = np.array([rng.permutation(np.arange(7)) for _ in range(20)])
    scores = rng.random(rows.shape)
    monkeypatch.setattr(diversity, "LISTS", size)
    found = mmr_lists(scores, rows, FIELDS)
    assert list(found) == [f"point, MMR {trade}" for trade in TRADES]
    for trade, lists in zip(TRADES, found.values(), strict=True):
        assert lists.shape == (20, 10) and (lists[:, 6:] == 0).all()
        for best, s, r in zip(lists, scores, rows, strict=True):
            known = r > 0
            places = slow_mmr(list(s[known]), list(r[known]), trade, 6)
            assert best[:6].tolist() == [r[known][k] for k in places]


def test_measured_lists_have_distance_coverage_and_gain() -> None:
    best = {"point": np.array([[1, 3, 2], [2, 6, 0]]), "set": np.array([[2, 1, 3], [6, 2, 0]])}
    found = measure_lists(best, np.array([2, 6]), FIELDS, items=5)
    np.testing.assert_allclose(found["point"].distance, list_distance(best["point"], FIELDS))
    assert found["point"].gains.tolist() == pytest.approx([1 / np.log2(4), 1 / np.log2(3)])
    assert found["set"].gains.tolist() == [1, 1]
    assert found["set"].row()["coverage"] == 0.8 and found["set"].row()["ndcg10"] == [1, 1, 1]
    lonely = measure_lists({"dot": np.array([[5, 0]])}, np.array([2]), FIELDS, items=5)["dot"].row()
    assert "distance" not in lonely, "a list of one item has no pairs"
