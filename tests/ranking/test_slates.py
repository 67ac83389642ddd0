"""Candidates above the set-wise limit: the deal into slates, its scores, and its chunks of work."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slatewise.bundle.loader import load_rankers
from slatewise.bundle.manifest import BundleLimits
from slatewise.bundle.ranker import Ranker
from slatewise.inference.arrays import PointScores
from slatewise.inference.chunks import run_all
from slatewise.inference.slates import deal, run_set
from slatewise.ranking.pipeline import Pipeline
from tests.conftest import DEMO
from tests.ranking.support import BOUND, cancel_in_chunk, draw_request, rank, reference, run, worst
from tests.support.blocked_engine import BlockedMethod


def drawn(count: int, seed: int, values: int = 10**9) -> PointScores:
    """Point scores of `count` candidates with so many different logits."""
    logits = np.random.default_rng(seed).integers(0, values, (count, 2)).astype(np.float32)
    return PointScores(1 / (1 + np.exp(-logits / values)), logits, np.zeros((count, 3), np.float32))


@pytest.fixture
def small_slates(ranker: Ranker) -> Ranker:
    """The tiny ranker with slates of at most 64 candidates."""
    engine = copy.copy(ranker.engines["fp32"])
    engine.slate = 64
    limits = BundleLimits(history_used=ranker.manifest.limits.history_used, set_wise=64)
    manifest = ranker.manifest.model_copy(update={"limits": limits})
    return dataclasses.replace(ranker, manifest=manifest, engines={"fp32": engine})


@given(
    count=st.integers(1, 300), most=st.integers(1, 80), values=st.sampled_from([1, 3, 10**9]), seed=st.integers(0, 9)
)
def test_each_candidate_is_in_one_slate(count: int, most: int, values: int, seed: int) -> None:
    slates = deal(drawn(count, seed, values), most)
    sizes = [len(rows) for rows in slates]
    assert sorted(np.concatenate(slates).tolist()) == list(range(count))
    largest = most if count <= most else max(1, most // 2)
    assert len(slates) == -(-count // largest) and max(sizes) <= largest and max(sizes) - min(sizes) <= 1


@given(count=st.integers(1, 300), most=st.integers(1, 80), seed=st.integers(0, 9))
def test_slates_are_alike(count: int, most: int, seed: int) -> None:
    """A slate has one of the best candidates, one of the next best, and so on."""
    point = drawn(count, seed)
    slates = deal(point, most)
    places = np.argsort(np.argsort(-point.probabilities.sum(axis=1), kind="stable"), kind="stable")
    for rows in slates:
        assert (places[rows] // len(slates)).tolist() == list(range(len(rows)))


@given(count=st.integers(1, 300), most=st.integers(1, 80), seed=st.integers(0, 9))
def test_deal_does_not_depend_on_the_order(count: int, most: int, seed: int) -> None:
    point = drawn(count, seed)
    order = np.random.default_rng(seed).permutation(count)
    for rows, moved in zip(deal(point, most), deal(point[order], most), strict=True):
        assert rows.tolist() == order[moved].tolist()


@pytest.mark.parametrize("n", [64, 65, 128, 129, 500])
def test_scores_are_those_of_the_slates(small_slates: Ranker, n: int) -> None:
    request = draw_request(small_slates, 20, n, n, exit="set")
    ranking = run(small_slates, lambda p: rank(p, request))
    assert ranking.exit == "set" and not ranking.degraded
    assert worst(ranking, reference(small_slates, request, "set")) <= BOUND


def test_scores_follow_the_candidates_in_any_order(small_slates: Ranker) -> None:
    request = draw_request(small_slates, 20, 300, 1, exit="set")
    moved = request.model_copy(deep=True)
    moved.candidates.item_ids.reverse()
    for column in moved.candidates.features.values():
        column.reverse()
    one, two = (run(small_slates, lambda p, r=r: rank(p, r)).scored for r in (request, moved))
    assert one is not None and two is not None
    assert np.abs(np.sort(one.scores) - np.sort(two.scores)).max() <= BOUND


def test_within_the_limit_there_is_one_slate(small_slates: Ranker) -> None:
    """To the last bit: the rows keep their order."""
    engine = small_slates.engines["fp32"]
    request = draw_request(small_slates, 20, 64, 3)
    candidates, _ = small_slates.candidates(request, 0.0)
    point = engine.point(candidates, small_slates.default_meta, engine.start)
    chunks = run_set(engine, point)
    assert next(chunks) == 64
    with pytest.raises(StopIteration) as end:
        next(chunks)
    assert np.array_equal(end.value.value, engine.set(point))


@pytest.mark.parametrize("exit", ["point", "set"])
def test_parts_give_the_same_scores(small_slates: Ranker, exit: str) -> None:
    """To the last bit, on one thread or on five: a candidate's score depends neither on its chunk nor on its part."""
    request = draw_request(small_slates, 20, 700, 4, exit=exit)
    one, five = (run(small_slates, lambda p: rank(p, request), threads=n).scored for n in (1, 5))
    assert one is not None and five is not None
    assert np.array_equal(one.probabilities, five.probabilities)


def test_each_slate_is_a_chunk(small_slates: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    request = draw_request(small_slates, 5, 300, 2, exit="set")
    stop = BlockedMethod("set", monkeypatch)

    async def leave(pipeline: Pipeline) -> int:
        await cancel_in_chunk(pipeline, request, stop)
        return stop.calls

    assert run(small_slates, leave, threads=1) == 1


def test_first_results_are_those_of_one_slate() -> None:
    """The demo, 2,048 candidates: at least nine of the first ten are those of all candidates in one slate."""
    demo = load_rankers(DEMO)["movielens"]
    engine = demo.engines["fp32"]
    example: dict[str, Any] = demo.manifest.example
    request = draw_request(demo, 0, 2_048, 4).model_copy(update={"user": None})
    candidates, _ = demo.candidates(request, 0.0)
    history = demo.history(request.model_validate(example))
    state = engine.extend(engine.start, history)
    point = engine.point(candidates, demo.default_meta, state)
    found = run_all(run_set(engine, point))
    whole = engine.set(point)
    best, whole_best = (set(np.argsort(-each[:, 0], kind="stable")[:10].tolist()) for each in (found, whole))
    assert len(best & whole_best) >= 9
