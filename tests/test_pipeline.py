"""The fast path against `Engine.score`, the slow obvious one, and what happens when time or room runs out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.bundle import Ranker
from app.engine import Engine, HistoryState
from app.errors import DeadlineExceeded, Invalid, NotFound, OverloadedUndegraded
from app.features import Float64
from app.history_cache import HistoryCache
from app.meta_embeddings import EmbeddedStore, MetaEmbedding
from app.pipeline import Call, Pipeline, order
from app.schemas import RankRequest
from app.workers import Workers

BOUND = 1e-5
ACTIONS = ["love", "like", "view", "dislike", "hate", "something else", None]
T = TypeVar("T")


def run(ranker: Ranker, work: Callable[[Pipeline], Awaitable[T]], *, threads: int = 2, **limits: Any) -> T:
    """`work` on a fresh pipeline with its own event loop and threads."""

    async def main() -> T:
        async with Workers(threads) as workers:
            given: dict[str, Any] = {"max_candidates": 3000, "max_history": 1000, "max_outstanding_tokens": 10**6, "default_deadline_ms": 0.0}
            given |= {"store": EmbeddedStore()} | limits
            pipeline = Pipeline({ranker.name: ranker}, given.pop("store"), HistoryCache(given.pop("cache_bytes", 50_000_000)), workers, **given)
            return await work(pipeline)

    return asyncio.run(main())


def draw_request(ranker: Ranker, events: int, candidates: int, seed: int, **more: Any) -> RankRequest:
    rng = np.random.default_rng(seed)
    ids = [*ranker.vocabulary.items, "no-such-item"]
    return RankRequest.model_validate(
        {
            "history": {
                "item_ids": [ids[k] for k in rng.integers(0, len(ids), events)],
                "actions": [ACTIONS[k] for k in rng.integers(0, len(ACTIONS), events)],
                "timestamps": [None if k % 11 == 10 else int(t) for k, t in enumerate(np.cumsum(rng.integers(0, 10_000, events)))],
            },
            "candidates": {
                "item_ids": [ids[k] for k in rng.integers(0, len(ids), candidates)],
                "features": {"popularity": [None if k % 7 == 6 else float(v) for k, v in enumerate(rng.uniform(0, 3, candidates))]},
            },
            "request_time": 978_300_000,
            **more,
        }
    )


def reference(ranker: Ranker, request: RankRequest, exit: str) -> Float64:
    history, _ = ranker.history(request)
    candidates, _ = ranker.candidates(request, request.request_time or 0)
    return ranker.engines["fp32"].score(history, candidates, ranker.embedded_meta_of(None if request.user is None else str(request.user)), exit)


async def rank(pipeline: Pipeline, request: RankRequest) -> Call:
    return await pipeline.rank(Call(request, time.perf_counter()))


def worst(call: Call, expected: Float64) -> float:
    assert call.probabilities is not None
    return float(np.abs(call.probabilities - expected).max())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    events=st.one_of(st.sampled_from([0, 1, 128, 129]), st.integers(0, 400)),
    n=st.one_of(st.just(1), st.integers(1, 1200)),
    exit=st.sampled_from(["dot", "point", "set"]),
    seed=st.integers(0, 99),
)
def test_a_ranked_request_scores_as_the_slow_obvious_way(ranker: Ranker, events: int, n: int, exit: str, seed: int) -> None:
    request = draw_request(ranker, events, n, seed, exit=exit)
    call = run(ranker, lambda p: rank(p, request))
    expected_exit = "point" if exit == "set" and n > ranker.manifest.limits.set_wise else exit
    assert call.exit == expected_exit
    assert not call.degraded
    assert worst(call, reference(ranker, request, expected_exit)) <= BOUND


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(0, 128), second=st.integers(0, 128), n=st.integers(1, 50), seed=st.integers(0, 99))
def test_kept_history_gives_the_same_scores_whatever_came_before(ranker: Ranker, first: int, second: int, n: int, seed: int) -> None:
    """The same user sends two histories, one a prefix of the other: longer, shorter or equal."""
    whole = draw_request(ranker, 128, n, seed, user="u")

    def cut(events: int) -> RankRequest:
        history = whole.history.model_copy(update={k: getattr(whole.history, k)[:events] for k in ("item_ids", "actions", "timestamps")})
        return whole.model_copy(update={"history": history})

    async def both(pipeline: Pipeline) -> tuple[Call, Call]:
        return await rank(pipeline, cut(first)), await rank(pipeline, cut(second))

    one, two = run(ranker, both)
    assert worst(one, reference(ranker, cut(first), "set")) <= BOUND
    assert worst(two, reference(ranker, cut(second), "set")) <= BOUND
    shared = min(first, second)
    expected = "none" if second == 0 else "hit" if first == second else "extended" if min(shared, second - 1) else "miss"
    assert two.cache == expected


def test_an_edited_history_reuses_what_comes_before_the_edit_and_scores_as_fresh(ranker: Ranker) -> None:
    request = draw_request(ranker, 60, 20, 1, user="u")
    for member, values in (("item_ids", ["no-such-item"]), ("actions", ["unheard of"]), ("timestamps", [None])):
        column = list(getattr(request.history, member))
        column[30:31] = values
        edited = request.model_copy(update={"history": request.history.model_copy(update={member: column})})

        async def both(pipeline: Pipeline, edited: RankRequest = edited) -> Call:
            await rank(pipeline, request)
            return await rank(pipeline, edited)

        call = run(ranker, both)
        assert call.cache == "extended"
        assert worst(call, reference(ranker, edited, "set")) <= BOUND


def test_without_a_user_nothing_is_kept(ranker: Ranker) -> None:
    request = draw_request(ranker, 30, 5, 2)

    async def twice(pipeline: Pipeline) -> tuple[Call, int]:
        await rank(pipeline, request)
        return await rank(pipeline, request), len(pipeline.cache.entries)

    call, kept = run(ranker, twice)
    assert call.cache == "none" and kept == 0
    assert call.meta is not None and call.meta.status == "off"


def test_neighbours_do_not_change_a_score(ranker: Ranker) -> None:
    requests = [draw_request(ranker, k * 5 % 140, 1 + k * 37 % 600, k, user=f"u{k % 7}", exit=("dot", "point", "set")[k % 3]) for k in range(40)]

    async def at_once(pipeline: Pipeline) -> list[Call]:
        return await asyncio.gather(*(rank(pipeline, r) for r in requests))

    for request, call in zip(requests, run(ranker, at_once), strict=True):
        assert worst(call, reference(ranker, request, call.exit)) <= BOUND


def test_equal_misses_of_one_user_share_one_encoding(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    extend = Engine.extend

    def counted(self: Engine, state: HistoryState, events: Any) -> HistoryState:
        calls.append(len(events))
        time.sleep(0.05)
        return extend(self, state, events)

    monkeypatch.setattr(Engine, "extend", counted)
    request = draw_request(ranker, 50, 5, 3, user="u")

    async def at_once(pipeline: Pipeline) -> list[Call]:
        return await asyncio.gather(*(rank(pipeline, request) for _ in range(6)))

    run(ranker, at_once)
    assert calls == [50]


def test_a_sliding_window_extends_until_it_moves(ranker: Ranker) -> None:
    """A client that always sends its last 128 events, with their offset: one full encoding in 64 requests."""
    long = draw_request(ranker, 400, 5, 4)

    def window(last: int) -> RankRequest:
        first = max(0, last - 128)
        history = long.history.model_copy(update={k: getattr(long.history, k)[first:last] for k in ("item_ids", "actions", "timestamps")} | {"offset": first})
        return long.model_copy(update={"history": history, "user": "u"})

    async def walk(pipeline: Pipeline) -> list[str]:
        return [(await rank(pipeline, window(last))).cache for last in range(120, 300)]

    caches = run(ranker, walk)
    assert caches.count("extended") >= 170


def test_the_cache_stays_below_its_bound(ranker: Ranker) -> None:
    async def many(pipeline: Pipeline) -> tuple[int, int, int]:
        for k in range(30):
            await rank(pipeline, draw_request(ranker, 100, 2, k, user=f"u{k}"))
        return pipeline.cache.nbytes, len(pipeline.cache.entries), sum(e.nbytes for e in pipeline.cache.entries.values())

    nbytes, entries, counted = run(ranker, many, cache_bytes=200_000)
    assert 0 < nbytes == counted <= 200_000
    assert 0 < entries < 30


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"ranker": "none"}, NotFound, "served: tiny"),
        ({"variant": "none"}, NotFound, "fp32"),
        ({"head_weights": {"none": 1.0}}, Invalid, "watch, like"),
        ({"candidates": {"item_ids": ["1"] * 3001}}, Invalid, "3000"),
        ({"history": {"item_ids": ["1"] * 1001}}, Invalid, "1000"),
        ({"history": {"item_ids": ["1"], "actions": []}}, Invalid, "/history/actions"),
        ({"history": {"item_ids": [], "timestamps": [1]}}, Invalid, "/history/timestamps"),
        ({"candidates": {"item_ids": ["1"], "features": {"none": [1.0]}}}, Invalid, "popularity, year"),
        ({"candidates": {"item_ids": ["1"], "features": {"year": [1.0, 2.0]}}}, Invalid, "2 entries for 1"),
        ({"candidates": {"item_ids": ["1"], "fields": {"none": [None]}}}, Invalid, "genres, decade"),
        ({"candidates": {"item_ids": ["1"], "fields": {"genres": []}}}, Invalid, "0 entries for 1"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_before_any_work(ranker: Ranker, change: dict[str, Any], error: type[Exception], words: str) -> None:
    request = RankRequest.model_validate({"candidates": {"item_ids": ["1"]}} | change)
    with pytest.raises(error, match=words):
        run(ranker, lambda p: rank(p, request))


def test_a_past_deadline_gives_the_input_order_or_504(ranker: Ranker) -> None:
    request = draw_request(ranker, 50, 30, 5, deadline_ms=0.001)
    call = run(ranker, lambda p: rank(p, request))
    assert call.exit == "input_order" and call.degraded == {"deadline"}
    index, scores = order(call, by_score=True)
    assert index.tolist() == list(range(30)) and scores.tolist() == [(30 - k) / 30 for k in range(30)]
    with pytest.raises(DeadlineExceeded):
        run(ranker, lambda p: rank(p, request.model_copy(update={"allow_degraded": False})))


@pytest.mark.parametrize(("slow", "answered"), [("encode", "input_order"), ("point", "dot"), ("set", "point")])
def test_at_the_deadline_the_highest_complete_exit_answers(ranker: Ranker, monkeypatch: pytest.MonkeyPatch, slow: str, answered: str) -> None:
    engine_run = Engine.run

    def run_slowly(self: Engine, graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
        if graph == slow:
            time.sleep(0.6)
        return engine_run(self, graph, feeds)

    monkeypatch.setattr(Engine, "run", run_slowly)
    request = draw_request(ranker, 20, 30, 6, deadline_ms=300, user="u")
    call = run(ranker, lambda p: rank(p, request))
    assert call.exit == answered
    assert call.degraded == ({"deadline"} if answered == "input_order" else {"deadline", "exit"})
    if answered != "input_order":
        assert worst(call, reference(ranker, request, answered)) <= BOUND


def test_after_the_deadline_no_further_quantum_is_run(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = []
    point = Engine.point

    def slow(self: Engine, *arguments: Any) -> Any:
        chunks.append(1)
        time.sleep(0.15)
        return point(self, *arguments)

    monkeypatch.setattr(Engine, "point", slow)
    request = draw_request(ranker, 5, 2900, 7, deadline_ms=200)  # six chunks

    async def ask(pipeline: Pipeline) -> Call:
        call = await rank(pipeline, request)
        await asyncio.sleep(1.0)
        return call

    assert run(ranker, ask, threads=1).exit == "dot"
    assert 1 <= len(chunks) <= 3


def test_under_load_the_exit_gives_way_first_then_the_answer(ranker: Ranker) -> None:
    request = draw_request(ranker, 0, 100, 8)

    async def ask(pipeline: Pipeline, waiting: int, request: RankRequest = request) -> Call:
        pipeline.outstanding_tokens += waiting  # as if this much work were waiting
        try:
            return await rank(pipeline, request)
        finally:
            pipeline.outstanding_tokens -= waiting

    exits = {waiting: run(ranker, lambda p, w=waiting: ask(p, w), max_outstanding_tokens=1000) for waiting in (0, 300, 500, 800, 1000)}
    assert [call.exit for call in exits.values()] == ["set", "set", "point", "dot", "input_order"]
    assert [call.degraded for call in exits.values()] == [set(), set(), {"overload", "exit"}, {"overload", "exit"}, {"overload"}]
    strict = request.model_copy(update={"allow_degraded": False})
    assert run(ranker, lambda p: ask(p, 800, strict), max_outstanding_tokens=1000).exit == "set"
    with pytest.raises(OverloadedUndegraded):
        run(ranker, lambda p: ask(p, 1000, strict), max_outstanding_tokens=1000)


def test_a_large_request_is_served_when_nothing_waits(ranker: Ranker) -> None:
    call = run(ranker, lambda p: rank(p, draw_request(ranker, 0, 500, 9)), max_outstanding_tokens=100)
    assert call.exit == "set" and not call.degraded


def test_a_store_that_fails_costs_the_vector_and_nothing_else(ranker: Ranker) -> None:
    class Broken:
        async def look_up(self, ranker: Ranker, user: str) -> MetaEmbedding:
            return MetaEmbedding(ranker.default_meta, "error")

    request = draw_request(ranker, 20, 10, 10, user=next(iter(ranker.embedded_users)))
    call = run(ranker, lambda p: rank(p, request), store=Broken())
    assert call.degraded == {"store_error"} and call.exit == "set"
    assert worst(call, reference(ranker, request.model_copy(update={"user": None}), "set")) <= BOUND


def test_scores_are_the_weighted_sum_of_heads_and_ties_keep_input_order(ranker: Ranker) -> None:
    request = draw_request(ranker, 10, 40, 11, head_weights={"like": 2.0})
    twins = request.model_copy(update={"candidates": request.candidates.model_copy(update={"item_ids": ["1"] * 40, "features": {}})})
    for asked in (request, twins):
        call = run(ranker, lambda p, r=asked: rank(p, r))
        assert call.probabilities is not None
        index, scores = order(call, by_score=True)
        like = list(ranker.manifest.heads).index("like")
        np.testing.assert_allclose(scores, 2.0 * call.probabilities[index, like], rtol=1e-12)
        assert index.tolist() == sorted(range(40), key=lambda k: (-call.probabilities[k, like], k))  # type: ignore[index]
    index, _ = order(call, by_score=False)
    assert index.tolist() == list(range(40))
