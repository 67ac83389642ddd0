"""The timings and the trace of a request: stages, their sum and histograms, and the facts of failed requests."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from slatewise.bundle.ranker import Ranker
from slatewise.errors import DeadlineExceeded, Invalid, NotFound
from slatewise.inference.engine import Engine
from slatewise.metrics import STAGES
from slatewise.ranking import trace as trace_module
from slatewise.ranking.pipeline import Pipeline, Ranking
from slatewise.ranking.trace import Timings, Trace
from slatewise.schemas import RankRequest
from tests.ranking.support import draw_request, run, traced_rank, until


class Clock:
    """Replaces the module `time`. Advances in 1024ths of a second, which floats add exactly."""

    def __init__(self) -> None:
        self.ticks = 12_345

    def perf_counter(self) -> float:
        return self.ticks / 1024


@given(st.lists(st.tuples(st.sampled_from(STAGES), st.integers(0, 5_000), st.integers(0, 6_000)), max_size=20))
def test_laps_add_up_exactly_to_the_time_since_the_start(laps: list[tuple[str, int, int]]) -> None:
    """A stage gets the time since the last lap, minus the queued time, but at least 0."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(trace_module, "time", clock)
        entered = clock.perf_counter()
        timings = Timings(clock.perf_counter())
        expected = dict.fromkeys(STAGES, 0)
        for stage, took, queued in laps:
            clock.ticks += took
            timings.lap(stage, queued / 1024)
            expected["queue"] += min(queued, took)
            expected[stage] += took - min(queued, took)
        assert timings.entered == entered
        assert (
            sum(timings.seconds.values()) == clock.perf_counter() - entered == sum(took for _, took, _ in laps) / 1024
        )
        assert {stage: seconds * 1024 for stage, seconds in timings.seconds.items() if seconds} == {
            stage: n for stage, n in expected.items() if n
        }


def test_stage_times_are_summed_and_observed_once() -> None:
    def count_and_sum(stage: str) -> tuple[float, float]:
        found = [
            REGISTRY.get_sample_value(f"slatewise_stage_duration_seconds_{part}", {"stage": stage})
            for part in ("count", "sum")
        ]
        return found[0] or 0.0, found[1] or 0.0

    before = {stage: count_and_sum(stage) for stage in STAGES}
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(trace_module, "time", clock)
        timings = Timings(clock.perf_counter())
        timings.add("encode", 0.25)
        clock.ticks += 512
        timings.lap("encode", 0.0)
        clock.ticks += 256
        timings.lap("score", 0.0)
        timings.lap("score", 0.0)
    timings.observe()
    after = {stage: count_and_sum(stage) for stage in STAGES}
    assert timings.seconds == {"encode": 0.75, "score": 0.25}
    assert after["encode"][1] - before["encode"][1] == pytest.approx(0.75)
    assert {stage: after[stage][0] - before[stage][0] for stage in STAGES} == {
        stage: float(stage in ("encode", "score")) for stage in STAGES
    }


def spent(trace: Trace) -> float:
    return sum(trace.timings.seconds.values())


@pytest.mark.parametrize(
    ("events", "n", "user", "exit"),
    [(0, 1, None, "dot"), (50, 30, "u", "set"), (128, 2900, "u", "point"), (128, 900, None, "set")],
)
def test_stages_of_a_request_add_up_exactly_to_its_last_lap(
    ranker: Ranker, events: int, n: int, user: str | None, exit: str
) -> None:
    request = draw_request(ranker, events, n, 19, user=user, exit=exit)

    async def ask(pipeline: Pipeline) -> tuple[Timings, float]:
        _, trace = await traced_rank(pipeline, request)
        return trace.timings, time.perf_counter()

    timings, end = run(ranker, ask)
    assert sum(timings.seconds.values()) == pytest.approx(timings.marked - timings.entered, rel=1e-9)
    assert timings.marked <= end
    assert set(timings.seconds) <= {"features", "embed", "queue", "encode", "score"}
    assert ("encode" in timings.seconds) == (events > 0)


def hold_graph(monkeypatch: pytest.MonkeyPatch, slow: str) -> threading.Event:
    """Make the engine wait in one graph until the returned event is set."""
    engine_run = Engine.run
    may_end = threading.Event()

    def held(self: Engine, graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
        assert graph != slow or may_end.wait(30)
        return engine_run(self, graph, feeds)

    monkeypatch.setattr(Engine, "run", held)
    return may_end


@pytest.mark.parametrize(
    ("slow", "stage"), [("encode", "encode"), ("dot", "score"), ("point", "score"), ("set", "score")]
)
@pytest.mark.parametrize("user", [None, "u"])
def test_time_until_the_deadline_counts_for_running_stage(
    ranker: Ranker, monkeypatch: pytest.MonkeyPatch, slow: str, stage: str, user: str | None
) -> None:
    may_end = hold_graph(monkeypatch, slow)
    request = draw_request(ranker, 20, 30, 20, deadline_ms=300, user=user, exit="set")

    async def ask(pipeline: Pipeline) -> tuple[Ranking, Trace, float]:
        ranking, trace = await traced_rank(pipeline, request)
        total = time.perf_counter() - trace.timings.entered
        may_end.set()
        return ranking, trace, total

    ranking, trace, total = run(ranker, ask)
    assert "deadline" in ranking.degraded and total >= 0.29
    assert spent(trace) == pytest.approx(total, rel=0.05)
    assert trace.timings.seconds[stage] >= 0.2


def test_wait_for_a_thread_counts_as_queue(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time while the only thread is busy counts as `queue`: before the encoding or, after a cache hit, the scores."""
    request = draw_request(ranker, 20, 30, 21, user="u")

    async def ask(pipeline: Pipeline) -> list[tuple[Ranking, Trace]]:
        results = []
        for _ in range(2):  # a miss, then a hit
            begun = threading.Event()
            may_end = threading.Event()

            def other(begun: threading.Event = begun, may_end: threading.Event = may_end) -> Any:
                yield 1
                begun.set()
                assert may_end.wait(30)

            held = pipeline.workers.submit(other())
            await until(begun.is_set)
            task = asyncio.create_task(traced_rank(pipeline, request))
            await until(lambda: pipeline.workers.queue)
            await asyncio.sleep(0.2)
            may_end.set()
            results.append(await task)
            await held
        return results

    for (ranking, trace), cache in zip(run(ranker, ask, threads=1), ("miss", "hit"), strict=True):
        assert ranking.history.cache == cache
        assert trace.timings.seconds["queue"] >= 0.2
        assert spent(trace) - trace.timings.seconds["queue"] < 0.2


# Requests that fail


@pytest.mark.parametrize(
    ("change", "ranker_known"), [({"ranker": "none"}, False), ({"variant": "none"}, True), ({"exit": "set"}, True)]
)
def test_trace_of_an_invalid_request_names_the_resolved_ranker(
    ranker: Ranker, change: dict[str, Any], ranker_known: bool
) -> None:
    request = RankRequest.model_validate({"candidates": {"item_ids": ["1"], "features": {"none": [1]}}} | change)
    trace = Trace(time.perf_counter())

    async def ask(pipeline: Pipeline) -> None:
        with pytest.raises((NotFound, Invalid)):
            await pipeline.rank(request, trace)

    run(ranker, ask)
    assert (trace.ranker is ranker) == ranker_known
    assert (trace.exit, trace.variant, trace.history.cache, trace.meta) == ("input_order", "", "none", None)


@pytest.mark.parametrize(
    ("slow", "exit", "variant", "used"), [("encode", "input_order", "", 0), ("point", "dot", "fp32", 20)]
)
def test_trace_of_missed_deadline_has_last_complete_stage(
    ranker: Ranker, monkeypatch: pytest.MonkeyPatch, slow: str, exit: str, variant: str, used: int
) -> None:
    may_end = hold_graph(monkeypatch, slow)
    request = draw_request(ranker, 20, 30, 22, deadline_ms=300, user="u", allow_degraded=False)
    trace = Trace(time.perf_counter())

    async def ask(pipeline: Pipeline) -> None:
        with pytest.raises(DeadlineExceeded):
            await pipeline.rank(request, trace)
        may_end.set()

    run(ranker, ask)
    assert (trace.ranker, trace.exit, trace.variant) == (ranker, exit, variant)
    assert (trace.history.cache, trace.history.used) == ("miss", used)
