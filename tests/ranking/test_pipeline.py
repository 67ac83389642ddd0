"""The fast path against `Engine.score`, the slow obvious one, and what happens when time or room runs out."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slatewise.bundle.manifest import BundleLimits
from slatewise.bundle.ranker import Ranker
from slatewise.errors import DeadlineExceeded, Invalid, NotFound, OverloadedUndegraded
from slatewise.inference.arrays import Float64, HistoryState, PackedState
from slatewise.inference.engine import Engine
from slatewise.inference.workers import Workers
from slatewise.metrics import Timings
from slatewise.ranking.history_cache import ENTRY_OVERHEAD, HistoryCache
from slatewise.ranking.pipeline import Call, Pipeline, order
from slatewise.schemas import RankRequest
from slatewise.store.lookup import EmbeddedStore, MetaEmbedding
from tests.conftest import Tiny
from tests.support.blocked_engine import BlockedMethod

BOUND = 1e-5
ACTIONS = ["love", "like", "view", "dislike", "hate", "something else", None]
T = TypeVar("T")


def run(ranker: Ranker, work: Callable[[Pipeline], Awaitable[T]], *, threads: int = 2, **limits: Any) -> T:
    """`work` on a fresh pipeline with its own event loop and threads."""

    async def main() -> T:
        async with Workers(threads) as workers:
            given: dict[str, Any] = {
                "max_candidates": 3000,
                "max_history": 1000,
                "max_outstanding_tokens": 10**6,
                "default_deadline_ms": 0.0,
            }
            given |= {"store": EmbeddedStore()} | limits
            pipeline = Pipeline(
                {ranker.name: ranker},
                given.pop("store"),
                HistoryCache(given.pop("cache_bytes", 50_000_000)),
                workers,
                **given,
            )
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
                "timestamps": [
                    None if k % 11 == 10 else int(t) for k, t in enumerate(np.cumsum(rng.integers(0, 10_000, events)))
                ],
            },
            "candidates": {
                "item_ids": [ids[k] for k in rng.integers(0, len(ids), candidates)],
                "features": {
                    "popularity": [
                        None if k % 7 == 6 else float(v) for k, v in enumerate(rng.uniform(0, 3, candidates))
                    ]
                },
            },
            "request_time": 978_300_000,
            **more,
        }
    )


def reference(ranker: Ranker, request: RankRequest, exit: str) -> Float64:
    history, _ = ranker.history(request)
    candidates, _ = ranker.candidates(request, request.request_time or 0)
    return ranker.engines["fp32"].score(history, candidates, ranker.embedded_meta_of(request.user), exit)


async def rank(pipeline: Pipeline, request: RankRequest) -> Call:
    return await pipeline.rank(Call(request, Timings(time.perf_counter())))


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
def test_a_ranked_request_scores_as_the_slow_obvious_way(
    ranker: Ranker, events: int, n: int, exit: str, seed: int
) -> None:
    request = draw_request(ranker, events, n, seed, exit=exit)
    call = run(ranker, lambda p: rank(p, request))
    expected_exit = "point" if exit == "set" and n > ranker.manifest.limits.set_wise else exit
    assert call.exit == expected_exit
    assert not call.degraded
    assert worst(call, reference(ranker, request, expected_exit)) <= BOUND


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(0, 128), second=st.integers(0, 128), n=st.integers(1, 50), seed=st.integers(0, 99))
def test_kept_history_gives_the_same_scores_whatever_came_before(
    ranker: Ranker, first: int, second: int, n: int, seed: int
) -> None:
    """The same user sends two histories, one a prefix of the other: longer, shorter or equal."""
    whole = draw_request(ranker, 128, n, seed, user="u")

    def cut(events: int) -> RankRequest:
        history = whole.history.model_copy(
            update={k: getattr(whole.history, k)[:events] for k in ("item_ids", "actions", "timestamps")}
        )
        return whole.model_copy(update={"history": history})

    async def both(pipeline: Pipeline) -> tuple[Call, Call]:
        return await rank(pipeline, cut(first)), await rank(pipeline, cut(second))

    one, two = run(ranker, both)
    assert worst(one, reference(ranker, cut(first), "set")) <= BOUND
    assert worst(two, reference(ranker, cut(second), "set")) <= BOUND
    shared = min(first, second)
    expected = (
        "none" if second == 0 else "hit" if first == second else "extended" if min(shared, second - 1) else "miss"
    )
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
    requests = [
        draw_request(ranker, k * 5 % 140, 1 + k * 37 % 600, k, user=f"u{k % 7}", exit=("dot", "point", "set")[k % 3])
        for k in range(40)
    ]

    async def at_once(pipeline: Pipeline) -> list[Call]:
        return await asyncio.gather(*(rank(pipeline, r) for r in requests))

    for request, call in zip(requests, run(ranker, at_once), strict=True):
        assert worst(call, reference(ranker, request, call.exit)) <= BOUND


def test_equal_misses_of_one_user_share_one_encoding(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    extend = Engine.extend

    def counted(self: Engine, state: HistoryState, events: Any, multi_threaded: bool = False) -> HistoryState:
        calls.append(len(events))
        time.sleep(0.05)
        return extend(self, state, events, multi_threaded)

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
        history = long.history.model_copy(
            update={k: getattr(long.history, k)[first:last] for k in ("item_ids", "actions", "timestamps")}
            | {"offset": first}
        )
        return long.model_copy(update={"history": history, "user": "u"})

    async def walk(pipeline: Pipeline) -> list[str]:
        return [(await rank(pipeline, window(last))).cache for last in range(120, 300)]

    caches = run(ranker, walk)
    assert caches.count("extended") >= 170


def test_the_cache_stays_below_its_bound(ranker: Ranker) -> None:
    async def many(pipeline: Pipeline) -> tuple[int, int, int]:
        for k in range(30):
            await rank(pipeline, draw_request(ranker, 100, 2, k, user=f"u{k}"))
        return (
            pipeline.cache.nbytes,
            len(pipeline.cache.entries),
            sum(e.nbytes for e in pipeline.cache.entries.values()),
        )

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
def test_a_request_that_does_not_fit_is_refused_before_any_work(
    ranker: Ranker, change: dict[str, Any], error: type[Exception], words: str
) -> None:
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
def test_at_the_deadline_the_highest_complete_exit_answers(
    ranker: Ranker, monkeypatch: pytest.MonkeyPatch, slow: str, answered: str
) -> None:
    engine_run = Engine.run

    def run_slowly(self: Engine, graph: str, feeds: dict[str, Any], multi_threaded: bool = False) -> dict[str, Any]:
        if graph == slow:
            time.sleep(0.6)
        return engine_run(self, graph, feeds, multi_threaded)

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

    def slow(self: Engine, *arguments: Any, **options: Any) -> Any:
        chunks.append(1)
        time.sleep(0.15)
        return point(self, *arguments, **options)

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

    exits = {
        waiting: run(ranker, lambda p, w=waiting: ask(p, w), max_outstanding_tokens=1000)
        for waiting in (0, 300, 500, 800, 1000)
    }
    assert [call.exit for call in exits.values()] == ["set", "set", "point", "dot", "input_order"]
    assert [call.degraded for call in exits.values()] == [
        set(),
        set(),
        {"overload", "exit"},
        {"overload", "exit"},
        {"overload"},
    ]
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
    cold_item_vectors = request.model_copy(
        update={"candidates": request.candidates.model_copy(update={"item_ids": ["1"] * 40, "features": {}})}
    )
    for asked in (request, cold_item_vectors):
        call = run(ranker, lambda p, r=asked: rank(p, r))
        assert call.probabilities is not None
        index, scores = order(call, by_score=True)
        like = list(ranker.manifest.heads).index("like")
        np.testing.assert_allclose(scores, 2.0 * call.probabilities[index, like], rtol=1e-12)
        assert index.tolist() == sorted(range(40), key=lambda k: (-call.probabilities[k, like], k))  # type: ignore[index]
    index, _ = order(call, by_score=False)
    assert index.tolist() == list(range(40))


# Histories kept as int8


def cut(request: RankRequest, events: int) -> RankRequest:
    """The same with its first events alone."""
    history = request.history.model_copy(
        update={k: getattr(request.history, k)[:events] for k in ("item_ids", "actions", "timestamps")}
    )
    return request.model_copy(update={"history": history})


def packed_bound(ranker: Ranker) -> float:
    """Of a kept history in int8: what the manifest found, of other draws and for its exit `point`, and as much again."""
    return 2 * ranker.manifest.variants["fp32"].invariance["int8_history_state"]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    first=st.integers(0, 128),
    second=st.integers(0, 128),
    n=st.integers(1, 50),
    exit=st.sampled_from(["dot", "point", "set"]),
    seed=st.integers(0, 99),
)
def test_a_history_kept_as_int8_scores_within_its_bound_whatever_came_before(
    ranker: Ranker, first: int, second: int, n: int, exit: str, seed: int
) -> None:
    whole = draw_request(ranker, 128, n, seed, user="u", exit=exit)

    async def thrice(pipeline: Pipeline) -> tuple[Call, Call, Call]:
        return (
            await rank(pipeline, cut(whole, first)),
            await rank(pipeline, cut(whole, second)),
            await rank(pipeline, cut(whole, second)),
        )

    one, two, three = run(ranker, thrice, pack_history=True)
    for call, events in ((one, first), (two, second), (three, second)):
        assert worst(call, reference(ranker, cut(whole, events), exit)) <= packed_bound(ranker)
    expected = "none" if second == 0 else "hit" if first == second else "extended" if min(first, second - 1) else "miss"
    assert two.cache == expected
    if second >= first and second:  # else the longer one stays
        assert three.cache == "hit"
        np.testing.assert_array_equal(three.probabilities, two.probabilities)


@pytest.mark.parametrize("exit", ["dot", "point", "set"])
@pytest.mark.parametrize("pack_history", [False, True])
def test_a_hit_answers_exactly_as_the_miss_before_it(ranker: Ranker, exit: str, pack_history: bool) -> None:
    request = draw_request(ranker, 100, 60, 12, user="u", exit=exit)

    async def twice(pipeline: Pipeline) -> tuple[Call, Call]:
        return await rank(pipeline, request), await rank(pipeline, request)

    miss, hit = run(ranker, twice, pack_history=pack_history)
    assert (miss.cache, hit.cache) == ("miss", "hit")
    np.testing.assert_array_equal(hit.probabilities, miss.probabilities)


def test_a_packed_history_is_extended_step_by_step_without_drifting(ranker: Ranker) -> None:
    """Forty requests of one user, an event more each: the last is as near to the reference as any."""
    whole = draw_request(ranker, 128, 20, 13, user="u")

    async def walk(pipeline: Pipeline) -> list[Call]:
        return [await rank(pipeline, cut(whole, events)) for events in range(88, 129)]

    calls = run(ranker, walk, pack_history=True)
    assert [call.cache for call in calls] == ["miss", *["extended"] * 40]
    for events, call in enumerate(calls, start=88):
        assert worst(call, reference(ranker, cut(whole, events), "set")) <= packed_bound(ranker)


def test_packed_histories_are_counted_in_the_bytes_that_they_hold(ranker: Ranker) -> None:
    """At a tiny width the scales weigh more than at a real one; test_engine.py has the quarter."""

    async def some(pipeline: Pipeline) -> tuple[int, list[Any]]:
        for k in range(5):
            await rank(pipeline, draw_request(ranker, 100, 2, k, user=f"u{k}"))
        return pipeline.cache.nbytes, list(pipeline.cache.entries.values())

    (packed_bytes, packed), (bytes_, whole) = (run(ranker, some, pack_history=pack) for pack in (True, False))
    assert [type(entry.state) for entry in packed + whole] == [PackedState] * 5 + [HistoryState] * 5
    for entries, total in ((packed, packed_bytes), (whole, bytes_)):
        arrays = [a for e in entries for a in (e.history.items, e.history.actions, e.history.gaps)]
        arrays += (
            [a for e in packed for a in (*e.state.keys, *e.state.values, e.state.user)] if entries is packed else []
        )
        arrays += [a for e in whole for a in (*e.state.keys, *e.state.values, e.state.user)] if entries is whole else []
        assert total == sum(a.nbytes for a in arrays) + 5 * ENTRY_OVERHEAD
    rows = 101 * ranker.manifest.width * 2 * 2  # tokens, width, keys and values, blocks
    assert sum(e.state.nbytes for e in whole) - sum(e.state.nbytes for e in packed) == 5 * (
        3 * rows - 4 * rows // ranker.manifest.width
    )


def test_the_cache_of_packed_histories_stays_below_its_bound_with_more_of_them(ranker: Ranker) -> None:
    async def many(pipeline: Pipeline) -> tuple[int, int, int]:
        for k in range(30):
            await rank(pipeline, draw_request(ranker, 100, 2, k, user=f"u{k}"))
        return (
            pipeline.cache.nbytes,
            len(pipeline.cache.entries),
            sum(e.nbytes for e in pipeline.cache.entries.values()),
        )

    (nbytes, entries, counted), (_, entries_whole, _) = (
        run(ranker, many, cache_bytes=200_000, pack_history=pack) for pack in (True, False)
    )
    assert 0 < nbytes == counted <= 200_000
    assert entries_whole < entries < 30


def test_without_a_user_nothing_is_packed(ranker: Ranker) -> None:
    request = draw_request(ranker, 100, 30, 14)
    call = run(ranker, lambda p: rank(p, request), pack_history=True)
    assert worst(call, reference(ranker, request, "set")) <= BOUND


# Quanta


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in threads
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(("method", "user"), [("point", None), ("point", "u"), ("extend", None), ("extend", "u")])
def test_a_request_that_is_cancelled_between_quanta_is_not_run_further(
    ranker: Ranker, monkeypatch: pytest.MonkeyPatch, method: str, user: str | None
) -> None:
    long = dataclasses.replace(
        ranker, manifest=ranker.manifest.model_copy(update={"limits": BundleLimits(history_used=900, set_wise=1024)})
    )
    request = draw_request(
        ranker, 600 if method == "extend" else 5, 2900, 15, user=user, exit="point"
    )  # three chunks of events, or six of candidates
    stop = BlockedMethod(method, monkeypatch)

    async def leave(pipeline: Pipeline) -> tuple[int, int]:
        task = asyncio.create_task(rank(pipeline, request))
        await until(stop.begun.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pipeline.outstanding_tokens == 0
        stop.may_end.set()
        await until(lambda: not pipeline.workers.busy and not pipeline.workers.queue)
        assert stop.calls == 1
        monkeypatch.undo()
        call = await rank(pipeline, draw_request(ranker, 5, 10, 16, user=user))
        return len(call.rungs), len(pipeline.cache.encoding)

    assert run(long, leave, threads=1) == (2, 0)


def test_closing_the_workers_between_quanta_cancels_the_request(
    ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = draw_request(ranker, 5, 2900, 17, exit="point")
    stop = BlockedMethod("point", monkeypatch)

    async def close(pipeline: Pipeline) -> None:
        task = asyncio.create_task(rank(pipeline, request))
        await until(stop.begun.is_set)
        end = asyncio.create_task(pipeline.workers.__aexit__())
        await until(lambda: pipeline.workers.stopping)
        stop.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await end
        assert (stop.calls, pipeline.outstanding_tokens) == (1, 0)

    run(ranker, close, threads=1)


def test_a_request_that_is_alone_takes_all_threads_and_scores_the_same(
    ranker: Ranker, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny.folder / "variants" / "fp32", ranker.items, ranker.manifest.exits, 2)
    multi_threaded = dataclasses.replace(ranker, engines={"fp32": engine})
    ways: list[tuple[str, bool]] = []
    engine_run = Engine.run

    def noted(self: Engine, graph: str, feeds: dict[str, Any], multi_threaded: bool = False) -> dict[str, Any]:
        ways.append((graph, multi_threaded))
        return engine_run(self, graph, feeds, multi_threaded)

    request = draw_request(ranker, 100, 700, 18, exit="set")
    monkeypatch.setattr(Engine, "run", noted)
    alone = run(multi_threaded, lambda p: rank(p, request))
    assert ways == [("encode", True), ("point", True), ("point", True), ("set", True)]

    async def beside(pipeline: Pipeline) -> Call:
        begun = threading.Event()
        may_end = threading.Event()

        def other() -> Any:
            yield 1
            begun.set()
            assert may_end.wait(30)

        held = pipeline.workers.submit(other())
        await until(begun.is_set)
        call = await rank(pipeline, request)
        may_end.set()
        await held
        return call

    ways.clear()
    crowded = run(multi_threaded, beside)
    assert ways == [("encode", False), ("point", False), ("point", False), ("set", False)]
    monkeypatch.undo()
    for call in (alone, crowded):
        assert worst(call, reference(ranker, request, "set")) <= BOUND


# Where the time went


def spent(call: Call) -> float:
    return sum(call.timings.seconds.values())


@pytest.mark.parametrize(
    ("events", "n", "user", "exit"),
    [(0, 1, None, "dot"), (50, 30, "u", "set"), (128, 2900, "u", "point"), (128, 900, None, "set")],
)
def test_the_stages_of_a_request_add_up_to_the_last_of_its_laps_exactly(
    ranker: Ranker, events: int, n: int, user: str | None, exit: str
) -> None:
    request = draw_request(ranker, events, n, 19, user=user, exit=exit)

    async def ask(pipeline: Pipeline) -> tuple[Call, float]:
        call = await rank(pipeline, request)
        return call, time.perf_counter()

    call, end = run(ranker, ask)
    assert spent(call) == pytest.approx(call.timings.marked - call.timings.entered, rel=1e-9)
    assert call.timings.marked <= end
    assert set(call.timings.seconds) <= {"features", "embed", "queue", "encode", "score"}
    assert ("encode" in call.timings.seconds) == (events > 0)


@pytest.mark.parametrize(
    ("slow", "stage"), [("encode", "encode"), ("dot", "score"), ("point", "score"), ("set", "score")]
)
@pytest.mark.parametrize("user", [None, "u"])
def test_at_the_deadline_the_time_until_then_is_in_its_stage(
    ranker: Ranker, monkeypatch: pytest.MonkeyPatch, slow: str, stage: str, user: str | None
) -> None:
    engine_run = Engine.run
    may_end = threading.Event()

    def held(self: Engine, graph: str, feeds: dict[str, Any], multi_threaded: bool = False) -> dict[str, Any]:
        assert graph != slow or may_end.wait(30)
        return engine_run(self, graph, feeds, multi_threaded)

    monkeypatch.setattr(Engine, "run", held)
    request = draw_request(ranker, 20, 30, 20, deadline_ms=300, user=user, exit="set")

    async def ask(pipeline: Pipeline) -> tuple[Call, float]:
        call = await rank(pipeline, request)
        total = time.perf_counter() - call.timings.entered
        may_end.set()
        return call, total

    call, total = run(ranker, ask)
    assert "deadline" in call.degraded and total >= 0.3
    assert spent(call) == pytest.approx(total, rel=0.05)
    assert call.timings.seconds[stage] >= 0.2


def test_waiting_for_a_thread_is_queue_and_not_its_stage(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the one thread is held, all that passes is `queue`, for the encoding and, where the history is kept, for the scores."""
    request = draw_request(ranker, 20, 30, 21, user="u")

    async def ask(pipeline: Pipeline) -> list[Call]:
        calls = []
        for _ in range(2):  # a miss, then a hit
            begun = threading.Event()
            may_end = threading.Event()

            def other(begun: threading.Event = begun, may_end: threading.Event = may_end) -> Any:
                yield 1
                begun.set()
                assert may_end.wait(30)

            held = pipeline.workers.submit(other())
            await until(begun.is_set)
            task = asyncio.create_task(rank(pipeline, request))
            await until(lambda: pipeline.workers.queue)
            await asyncio.sleep(0.2)
            may_end.set()
            calls.append(await task)
            await held
        return calls

    for call, cache in zip(run(ranker, ask, threads=1), ("miss", "hit"), strict=True):
        assert call.cache == cache
        assert call.timings.seconds["queue"] >= 0.2
        assert spent(call) - call.timings.seconds["queue"] < 0.2
