"""The pipeline: scores compared with `Engine.score`, and responses under load and at the deadline."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from slatewise.bundle.manifest import BundleLimits
from slatewise.bundle.ranker import Ranker
from slatewise.errors import DeadlineExceeded, Invalid, NotFound, OverloadedUndegraded
from slatewise.inference.arrays import Float64, HistoryState, PackedState
from slatewise.inference.costs import GraphCosts
from slatewise.inference.engine import Engine
from slatewise.ranking.admission import Admission
from slatewise.ranking.history_cache import ENTRY_OVERHEAD
from slatewise.ranking.load import Running
from slatewise.ranking.pipeline import FEW, Pipeline, Ranking
from slatewise.schemas import RankRequest
from slatewise.store.lookup import MetaEmbedding
from tests.ranking.support import BOUND, cancel_in_chunk, cut, draw_request, rank, reference, run, until, working, worst
from tests.support.blocked_engine import BlockedMethod


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    events=st.one_of(st.sampled_from([0, 1, 128, 129]), st.integers(0, 400)),
    n=st.one_of(st.just(1), st.integers(1, 1200)),
    exit=st.sampled_from(["dot", "point", "set"]),
    seed=st.integers(0, 99),
)
def test_rank_of_random_sizes_equals_engine_score(ranker: Ranker, events: int, n: int, exit: str, seed: int) -> None:
    request = draw_request(ranker, events, n, seed, exit=exit)
    ranking = run(ranker, lambda p: rank(p, request))
    assert ranking.exit == exit
    assert not ranking.degraded
    assert worst(ranking, reference(ranker, request, exit)) <= BOUND


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(0, 128), second=st.integers(0, 128), n=st.integers(1, 50), seed=st.integers(0, 99))
def test_cached_history_of_any_earlier_request_keeps_scores(
    ranker: Ranker, first: int, second: int, n: int, seed: int
) -> None:
    """One user sends two histories; one is a prefix of the other, or they are equal."""
    whole = draw_request(ranker, 128, n, seed, user="u")

    def cut(events: int) -> RankRequest:
        history = whole.history.model_copy(
            update={k: getattr(whole.history, k)[:events] for k in ("item_ids", "actions", "timestamps")}
        )
        return whole.model_copy(update={"history": history})

    async def both(pipeline: Pipeline) -> tuple[Ranking, Ranking]:
        return await rank(pipeline, cut(first)), await rank(pipeline, cut(second))

    one, two = run(ranker, both)
    assert worst(one, reference(ranker, cut(first), "set")) <= BOUND
    assert worst(two, reference(ranker, cut(second), "set")) <= BOUND
    shared = min(first, second)
    expected = (
        "none" if second == 0 else "hit" if first == second else "extended" if min(shared, second - 1) else "miss"
    )
    assert two.history.cache == expected


def test_edited_history_reuses_the_events_before_the_edit(ranker: Ranker) -> None:
    request = draw_request(ranker, 60, 20, 1, user="u")
    for member, values in (("item_ids", ["no-such-item"]), ("actions", ["unheard of"]), ("timestamps", [None])):
        column = list(getattr(request.history, member))
        column[30:31] = values
        edited = request.model_copy(update={"history": request.history.model_copy(update={member: column})})

        async def both(pipeline: Pipeline, edited: RankRequest = edited) -> Ranking:
            await rank(pipeline, request)
            return await rank(pipeline, edited)

        ranking = run(ranker, both)
        assert ranking.history.cache == "extended"
        assert worst(ranking, reference(ranker, edited, "set")) <= BOUND


def test_request_without_user_caches_no_history(ranker: Ranker) -> None:
    request = draw_request(ranker, 30, 5, 2)

    async def twice(pipeline: Pipeline) -> tuple[Ranking, int]:
        await rank(pipeline, request)
        return await rank(pipeline, request), len(pipeline.cache.entries)

    ranking, kept = run(ranker, twice)
    assert ranking.history.cache == "none" and kept == 0
    assert ranking.meta.status == "off"


def test_concurrent_requests_do_not_change_scores(ranker: Ranker) -> None:
    requests = [
        draw_request(ranker, k * 5 % 140, 1 + k * 37 % 600, k, user=f"u{k % 7}", exit=("dot", "point", "set")[k % 3])
        for k in range(40)
    ]

    async def at_once(pipeline: Pipeline) -> list[Ranking]:
        return await asyncio.gather(*(rank(pipeline, r) for r in requests))

    for request, ranking in zip(requests, run(ranker, at_once), strict=True):
        assert worst(ranking, reference(ranker, request, ranking.exit)) <= BOUND


def test_equal_misses_of_one_user_share_one_encoding(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    extend = Engine.extend

    def counted(self: Engine, state: HistoryState, events: Any) -> HistoryState:
        lengths.append(len(events))
        time.sleep(0.05)
        return extend(self, state, events)

    monkeypatch.setattr(Engine, "extend", counted)
    request = draw_request(ranker, 50, 5, 3, user="u")

    async def at_once(pipeline: Pipeline) -> list[Ranking]:
        return await asyncio.gather(*(rank(pipeline, request) for _ in range(6)))

    run(ranker, at_once)
    assert lengths == [50]


def test_sliding_history_is_extended_until_its_window_moves(ranker: Ranker) -> None:
    """The client always sends the last 128 events with their offset. One request in 64 encodes all of them."""
    long = draw_request(ranker, 400, 5, 4)

    def window(last: int) -> RankRequest:
        first = max(0, last - 128)
        history = long.history.model_copy(
            update={k: getattr(long.history, k)[first:last] for k in ("item_ids", "actions", "timestamps")}
            | {"offset": first}
        )
        return long.model_copy(update={"history": history, "user": "u"})

    async def walk(pipeline: Pipeline) -> list[str]:
        return [(await rank(pipeline, window(last))).history.cache for last in range(120, 300)]

    caches = run(ranker, walk)
    assert caches.count("extended") >= 170


def fill_cache(ranker: Ranker, pack_history: bool) -> tuple[int, int, int]:
    """Rank for 30 users. Return the cache's bytes, its number of entries, and the bytes summed over the entries."""

    async def many(pipeline: Pipeline) -> tuple[int, int, int]:
        for k in range(30):
            await rank(pipeline, draw_request(ranker, 100, 2, k, user=f"u{k}"))
        entries = pipeline.cache.entries.values()
        return pipeline.cache.nbytes, len(entries), sum(entry.nbytes for entry in entries)

    return run(ranker, many, cache_bytes=200_000, pack_history=pack_history)


def test_history_cache_of_many_users_stays_below_its_limit(ranker: Ranker) -> None:
    nbytes, entries, counted = fill_cache(ranker, pack_history=False)
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
def test_invalid_request_is_refused_with_the_reason(
    ranker: Ranker, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    request = RankRequest.model_validate({"candidates": {"item_ids": ["1"]}} | change)
    with pytest.raises(error, match=words):
        run(ranker, lambda p: rank(p, request))


def test_passed_deadline_gives_input_order_or_504(ranker: Ranker) -> None:
    request = draw_request(ranker, 50, 30, 5, deadline_ms=0.001)
    ranking = run(ranker, lambda p: rank(p, request))
    assert ranking.exit == "input_order" and ranking.degraded == {"deadline"}
    assert ranking.order(None).tolist() == list(range(30)) and ranking.scored is None
    assert ranking.order(4).tolist() == [0, 1, 2, 3]
    with pytest.raises(DeadlineExceeded):
        run(ranker, lambda p: rank(p, request.model_copy(update={"allow_degraded": False})))


@pytest.mark.parametrize(("slow", "answered"), [("encode", "input_order"), ("point", "dot"), ("set", "point")])
def test_deadline_gives_the_highest_complete_exit(
    ranker: Ranker, monkeypatch: pytest.MonkeyPatch, slow: str, answered: str
) -> None:
    engine_run = Engine.run

    def run_slowly(self: Engine, graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
        if graph == slow:
            time.sleep(0.6)
        return engine_run(self, graph, feeds)

    monkeypatch.setattr(Engine, "run", run_slowly)
    request = draw_request(ranker, 20, 30, 6, deadline_ms=300, user="u")
    ranking = run(ranker, lambda p: rank(p, request))
    assert ranking.exit == answered
    assert ranking.history.cache == "miss", "also if the deadline passes during the encoding"
    assert ranking.degraded == ({"deadline"} if answered == "input_order" else {"deadline", "exit"})
    if answered != "input_order":
        assert worst(ranking, reference(ranker, request, answered)) <= BOUND


def test_no_chunk_starts_after_the_deadline(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = []
    point = Engine.point

    def slow(self: Engine, *arguments: Any, **options: Any) -> Any:
        chunks.append(1)
        time.sleep(0.15)
        return point(self, *arguments, **options)

    monkeypatch.setattr(Engine, "point", slow)
    request = draw_request(ranker, 5, 2900, 7, deadline_ms=200)  # 23 chunks

    async def ask(pipeline: Pipeline) -> Ranking:
        ranking = await rank(pipeline, request)
        await asyncio.sleep(1.0)
        return ranking

    assert run(ranker, ask, threads=1).exit == "dot"
    assert 1 <= len(chunks) <= 3


def test_rising_load_lowers_the_exit_then_skips_the_model(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row takes 1 ms: 0.1 s by `dot` and `point`, 0.2 s by `set`. Two threads; each other request has much work."""
    monkeypatch.setattr(GraphCosts, "seconds", lambda _, work: work.rows / 1e3)
    request = draw_request(ranker, 0, 100, 8)

    async def ask(pipeline: Pipeline, others: int, request: RankRequest = request) -> Ranking:
        with working(pipeline.admission, others):
            return await rank(pipeline, request)

    rankings = [run(ranker, lambda p, k=k: ask(p, k), max_queue_s=0.5 + 1e-9) for k in (0, 4, 5, 9, 10, 11)]
    assert [ranking.exit for ranking in rankings] == ["set", "set", "point", "point", "dot", "input_order"]
    assert [ranking.degraded for ranking in rankings] == [set()] * 2 + [{"overload", "exit"}] * 3 + [{"overload"}]
    strict = request.model_copy(update={"allow_degraded": False})
    assert run(ranker, lambda p: ask(p, 5, strict), max_queue_s=0.5 + 1e-9).exit == "set"
    with pytest.raises(OverloadedUndegraded, match="more than 500 ms") as refused:
        run(ranker, lambda p: ask(p, 6, strict), max_queue_s=0.5 + 1e-9)
    assert refused.value.headers == {"Retry-After": "3000"}  # six others of 1,000 s on two threads


def test_large_request_alone_is_served_in_full(ranker: Ranker) -> None:
    ranking = run(ranker, lambda p: rank(p, draw_request(ranker, 0, 500, 9)), max_queue_s=1e-6)
    assert ranking.exit == "set" and not ranking.degraded


def test_work_of_a_request_is_predicted_and_observed(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second request finds the state of the first, so less work is predicted."""
    predicted = []
    begin_work = Admission.begin_work

    def begin(admission: Admission, running: Running) -> None:
        predicted.append(running.predicted)
        begin_work(admission, running)

    monkeypatch.setattr(Admission, "begin_work", begin)
    before = REGISTRY.get_sample_value("slatewise_work_ratio_count") or 0.0
    request = draw_request(ranker, 100, 200, 9, user="predicted")

    async def ask_twice(pipeline: Pipeline) -> None:
        await rank(pipeline, request)
        await rank(pipeline, request)
        assert not pipeline.admission.load.running

    run(ranker, ask_twice)
    assert 0 < predicted[1] < predicted[0]
    assert REGISTRY.get_sample_value("slatewise_work_ratio_count") == before + 2


def test_failing_store_gives_the_default_vector(ranker: Ranker) -> None:
    class Broken:
        async def look_up(self, ranker: Ranker, user: str) -> MetaEmbedding:
            return MetaEmbedding(ranker.default_meta, "error")

        def new_items(self, ranker: Ranker) -> None:
            return None

    request = draw_request(ranker, 20, 10, 10, user=next(iter(ranker.embedded_users)))
    ranking = run(ranker, lambda p: rank(p, request), store=Broken())
    assert ranking.degraded == {"store_error"} and ranking.exit == "set"
    assert worst(ranking, reference(ranker, request.model_copy(update={"user": None}), "set")) <= BOUND


def test_scores_weigh_heads_and_ties_keep_input_order(ranker: Ranker) -> None:
    request = draw_request(ranker, 10, 40, 11, head_weights={"like": 2.0})
    tied = request.model_copy(
        update={"candidates": request.candidates.model_copy(update={"item_ids": ["1"] * 40, "features": {}})}
    )
    for asked in (request, tied):
        ranking = run(ranker, lambda p, r=asked: rank(p, r))
        assert ranking.scored is not None
        like = ranking.scored.probabilities[:, list(ranker.manifest.heads).index("like")]
        np.testing.assert_allclose(ranking.scored.scores, like, rtol=1e-12)
        assert ranking.order(None).tolist() == sorted(range(40), key=lambda k: (-like[k], k))


# Histories cached as int8


def probabilities(ranking: Ranking) -> Float64:
    assert ranking.scored is not None
    return ranking.scored.probabilities


def packed_bound(ranker: Ranker) -> float:
    """Bound for scores from an int8 history: twice the difference in the manifest, measured on other samples."""
    return 2 * ranker.manifest.variants["fp32"].invariance["int8_history_state"]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    first=st.integers(0, 128),
    second=st.integers(0, 128),
    n=st.integers(1, 50),
    exit=st.sampled_from(["dot", "point", "set"]),
    seed=st.integers(0, 99),
)
def test_int8_history_scores_within_its_bound(
    ranker: Ranker, first: int, second: int, n: int, exit: str, seed: int
) -> None:
    whole = draw_request(ranker, 128, n, seed, user="u", exit=exit)

    async def thrice(pipeline: Pipeline) -> tuple[Ranking, Ranking, Ranking]:
        return (
            await rank(pipeline, cut(whole, first)),
            await rank(pipeline, cut(whole, second)),
            await rank(pipeline, cut(whole, second)),
        )

    one, two, three = run(ranker, thrice, pack_history=True)
    for ranking, events in ((one, first), (two, second), (three, second)):
        assert worst(ranking, reference(ranker, cut(whole, events), exit)) <= packed_bound(ranker)
    expected = "none" if second == 0 else "hit" if first == second else "extended" if min(first, second - 1) else "miss"
    assert two.history.cache == expected
    if second >= first and second:  # otherwise the cache keeps the longer history
        assert three.history.cache == "hit"
        assert worst(three, probabilities(two)) == 0


@pytest.mark.parametrize("exit", ["dot", "point", "set"])
@pytest.mark.parametrize("pack_history", [False, True])
def test_cache_hit_gives_exactly_the_scores_of_the_miss(ranker: Ranker, exit: str, pack_history: bool) -> None:
    request = draw_request(ranker, 100, 60, 12, user="u", exit=exit)

    async def twice(pipeline: Pipeline) -> tuple[Ranking, Ranking]:
        return await rank(pipeline, request), await rank(pipeline, request)

    miss, hit = run(ranker, twice, pack_history=pack_history)
    assert (miss.history.cache, hit.history.cache) == ("miss", "hit")
    assert worst(hit, probabilities(miss)) == 0


def test_int8_history_extended_40_times_does_not_drift(ranker: Ranker) -> None:
    """40 requests of one user, each with one more event: all are equally close to the reference."""
    whole = draw_request(ranker, 128, 20, 13, user="u")

    async def walk(pipeline: Pipeline) -> list[Ranking]:
        return [await rank(pipeline, cut(whole, events)) for events in range(88, 129)]

    calls = run(ranker, walk, pack_history=True)
    assert [ranking.history.cache for ranking in calls] == ["miss", *["extended"] * 40]
    for events, ranking in enumerate(calls, start=88):
        assert worst(ranking, reference(ranker, cut(whole, events), "set")) <= packed_bound(ranker)


def test_int8_histories_count_the_bytes_of_their_arrays(ranker: Ranker) -> None:
    """The item vectors of this ranker are so narrow that the scales take a large share of the bytes."""

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
    rows = 101 * ranker.manifest.width * 2 * 2  # tokens * width * (keys, values) * blocks
    assert sum(e.state.nbytes for e in whole) - sum(e.state.nbytes for e in packed) == 5 * (
        3 * rows - 4 * rows // ranker.manifest.width
    )


def test_int8_cache_holds_more_entries_below_its_limit(ranker: Ranker) -> None:
    nbytes, entries, counted = fill_cache(ranker, pack_history=True)
    _, entries_whole, _ = fill_cache(ranker, pack_history=False)
    assert 0 < nbytes == counted <= 200_000
    assert entries_whole < entries < 30


def test_history_without_user_is_not_quantized(ranker: Ranker) -> None:
    request = draw_request(ranker, 100, 30, 14)
    ranking = run(ranker, lambda p: rank(p, request), pack_history=True)
    assert worst(ranking, reference(ranker, request, "set")) <= BOUND


# Chunks


@pytest.mark.parametrize(("method", "user"), [("point", None), ("point", "u"), ("extend", None), ("extend", "u")])
def test_cancelled_request_runs_no_further_chunk(
    ranker: Ranker, monkeypatch: pytest.MonkeyPatch, method: str, user: str | None
) -> None:
    long = dataclasses.replace(
        ranker, manifest=ranker.manifest.model_copy(update={"limits": BundleLimits(history_used=900, set_wise=1024)})
    )
    request = draw_request(
        ranker, 600 if method == "extend" else 5, 2900, 15, user=user, exit="point"
    )  # 3 chunks of events, or 23 chunks of candidates
    stop = BlockedMethod(method, monkeypatch)

    async def leave(pipeline: Pipeline) -> tuple[str, int]:
        await cancel_in_chunk(pipeline, request, stop)
        assert stop.calls == 1
        monkeypatch.undo()
        ranking = await rank(pipeline, draw_request(ranker, 5, 10, 16, user=user))
        return ranking.exit, len(pipeline.cache.encoding)

    assert run(long, leave, threads=1) == ("set", 0)


def test_closing_the_workers_cancels_the_request(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert stop.calls == 1 and not pipeline.admission.load.running

    run(ranker, close, threads=1)


def test_fields_of_many_candidates_give_the_scores_of_few(ranker: Ranker) -> None:
    """A worker thread reads the fields of more than FEW candidates."""
    field, known = next(iter(ranker.vocabulary.fields.items()))
    n = FEW + 1
    column = [[next(iter(known)), "?"] if k % 2 else None for k in range(n)]
    candidates = {"item_ids": [f"new-{k}" for k in range(n)], "fields": {field: column}}
    request = RankRequest.model_validate({"candidates": candidates, "request_time": 0, "exit": "point"})
    ranking = run(ranker, lambda p: rank(p, request))
    assert worst(ranking, reference(ranker, request, "point")) <= BOUND
    assert ranking.unknown_values == {field: n // 2}


def test_deadline_passes_while_fields_are_read(ranker: Ranker) -> None:
    field = next(iter(ranker.vocabulary.fields))
    candidates = {"item_ids": ["new"] * (FEW + 1), "fields": {field: ["?"] * (FEW + 1)}}
    body = {"candidates": candidates, "deadline_ms": 200}

    async def ask(pipeline: Pipeline, request: RankRequest) -> Ranking:
        may_end = threading.Event()

        def other() -> Any:
            yield 1
            assert may_end.wait(30)

        held = pipeline.workers.submit(other())
        try:
            return await rank(pipeline, request)
        finally:
            may_end.set()
            await held

    ranking = run(ranker, lambda p: ask(p, RankRequest.model_validate(body)), threads=1)
    assert ranking.exit == "input_order" and ranking.degraded == {"deadline"}
    with pytest.raises(DeadlineExceeded):
        run(ranker, lambda p: ask(p, RankRequest.model_validate(body | {"allow_degraded": False})), threads=1)
