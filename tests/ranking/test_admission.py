"""Admission control: each refusal, its counters, and that no array is made before the decision."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from slatewise.bundle.ranker import Ranker
from slatewise.errors import DeadlineExceeded, Overloaded, OverloadedUndegraded, RankingError, TooLarge
from slatewise.inference.engine import Engine, EngineError
from slatewise.ranking.admission import Admission, Admitted, Deadline, Standing
from slatewise.ranking.load import Running
from slatewise.ranking.offers import Offer
from slatewise.ranking.pipeline import Pipeline, Ranking
from slatewise.schemas import Candidates, ModelExit
from tests.ranking.support import draw_request, rank, request_limits, run, working

NO_DEADLINE = Deadline(0, 0)


def rejected(reason: str) -> float:
    return REGISTRY.get_sample_value("slatewise_rejected_total", {"reason": reason}) or 0.0


def gauge(name: str) -> float:
    return REGISTRY.get_sample_value(name) or 0.0


def passed() -> Deadline:
    return Deadline(1.0, time.perf_counter() - 1)


def test_requests_in_flight_above_the_limit_are_refused() -> None:
    admission = Admission(request_limits(max_in_flight=2))
    before = rejected("in_flight")
    in_flight = gauge("slatewise_requests_in_flight")
    admission.enter()
    admission.enter()
    with pytest.raises(Overloaded, match="more than 2 requests"):
        admission.enter()
    admission.leave()  # the refused request
    assert (admission.in_flight, gauge("slatewise_requests_in_flight")) == (2, in_flight + 2)
    admission.leave()
    admission.enter()
    admission.leave()
    admission.leave()
    assert (admission.in_flight, gauge("slatewise_requests_in_flight")) == (0, in_flight)
    assert rejected("in_flight") == before + 1


def test_failed_request_ends_its_work(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    async def ask(pipeline: Pipeline) -> int:
        def fail(*_: Any, **__: Any) -> Any:
            seen.append(len(pipeline.admission.load.running))
            raise EngineError("broken")

        monkeypatch.setattr(Engine, "point", fail)
        with pytest.raises(RankingError, match="the model failed"):
            await rank(pipeline, draw_request(ranker, 5, 20, 3))
        return len(pipeline.admission.load.running)

    assert run(ranker, ask) == 0
    assert seen == [1]


@pytest.mark.parametrize(("length", "refused"), [(None, False), (0, False), (100, False), (101, True), (10**18, True)])
def test_content_length_above_the_limit_is_refused(length: int | None, refused: bool) -> None:
    admission = Admission(request_limits(max_body_bytes=100))
    if refused:
        with pytest.raises(TooLarge, match="100 bytes"):
            admission.check_content_length(length)
    else:
        admission.check_content_length(length)


def offers(*exits: ModelExit, seconds: float = 0.01, stale: bool = False) -> list[Offer]:
    """Offers of one variant, with equal work; the last of two equal exits is one of another variant."""
    names = ["other" if exit in exits[:k] else "own" for k, exit in enumerate(exits)]
    return [Offer(exit, name, 0.0, seconds, stale) for exit, name in zip(exits, names, strict=True)]


ALL = offers("set", "point", "dot", "dot")


def slow_admit(count: int, others: int, priority: int, allow_degraded: bool) -> int | None:
    """Look up the place of the offer that is taken, by the rule in words; `None`: the request is refused.

    One thread and a limit of 100 ms: each of the others costs an offer of 10 ms a tenth of the limit.
    """
    shares = [0.8, 0.9, 0.95, 1.0]
    for place in range(count) if allow_degraded else [0]:
        share = 1.0 if place == count - 1 or not allow_degraded else shares[place]
        if others == 0 or others * 0.1 <= share * 10 / (10 + max(0, priority)) + 1e-9:
            return place
    return None


@given(st.integers(1, 4), st.integers(0, 12), st.sampled_from([-5, 0, 10, 90]), st.booleans())
def test_admit_under_random_loads_equals_the_rule(count: int, others: int, priority: int, allow_degraded: bool) -> None:
    admission = Admission(request_limits(max_queue_s=0.1 + 1e-9))
    place = slow_admit(count, others, priority, allow_degraded)
    before = rejected("queue")
    with working(admission, others):
        if place is None and not allow_degraded:
            with pytest.raises(OverloadedUndegraded, match="more than 100 ms"):
                admission.admit(ALL[:count], NO_DEADLINE, False, Standing(priority))
        else:
            admitted = admission.admit(ALL[:count], NO_DEADLINE, allow_degraded, Standing(priority))
            reasons = {0: set(), 1: {"exit"}, 2: {"exit"}, 3: {"exit", "variant"}, None: set()}[place]
            overload = {"overload"} if place != 0 else set()
            assert admitted == Admitted(None if place is None else ALL[place], frozenset(reasons | overload))
    assert rejected("queue") - before == (place is None)


def test_exit_comes_back_only_well_below_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("slatewise.ranking.admission.time.perf_counter", lambda: now)
    admission = Admission(request_limits(max_queue_s=0.1 + 1e-9))

    def exit_beside(others: int) -> str:
        with working(admission, others):
            offer = admission.admit(ALL, NO_DEADLINE, True).offer
        assert offer is not None
        return offer.exit

    assert [exit_beside(k) for k in (8, 9, 8, 6)] == ["set", "point", "point", "set"]
    now += 1.1
    assert exit_beside(8) == "set"


def test_time_waited_for_a_turn_is_part_of_the_wait() -> None:
    admission = Admission(request_limits(max_queue_s=0.1 + 1e-9))
    with working(admission, 5):
        exits = [
            admission.admit(ALL, NO_DEADLINE, True, Standing(0, waited)).offer for waited in (0.03, 0.04, 0.05, 0.06)
        ]
    assert exits == [ALL[0], ALL[1], ALL[3], None]


def test_deadline_takes_the_best_exit_in_time() -> None:
    """One other request has 1 s of work on one thread: each offer takes twice its own time."""
    admission = Admission(request_limits())
    dear = [
        offer._replace(score=seconds)
        for offer, seconds in zip(offers("set", "point", "dot"), (0.4, 0.2, 0.02), strict=True)
    ]
    wanted = [(2_000, "set", set()), (600, "point", {"deadline", "exit"}), (200, "dot", {"deadline", "exit"})]
    with working(admission, 1):
        for milliseconds, exit, reasons in wanted:
            admitted = admission.admit(dear, Deadline(milliseconds, time.perf_counter()), True)
            assert admitted.offer is not None and (admitted.offer.exit, admitted.degraded) == (exit, reasons)
        before = gauge("slatewise_deadline_exceeded_total")
        assert admission.admit(dear, Deadline(30, time.perf_counter()), True) == Admitted(None, frozenset({"deadline"}))
        with pytest.raises(DeadlineExceeded, match="deadline_ms = 30"):
            admission.admit(dear, Deadline(30, time.perf_counter()), False)
        assert gauge("slatewise_deadline_exceeded_total") == before + 2


def test_lone_request_tries_what_may_be_in_time() -> None:
    """An offer whose prediction is old is tried: else a wrong prediction would never be corrected."""
    admission = Admission(request_limits())
    late = offers("set", "dot", seconds=10.0)
    soon = Deadline(5_000, time.perf_counter())
    assert admission.admit(late, soon, True) == Admitted(None, frozenset({"deadline"}))
    with pytest.raises(DeadlineExceeded):
        admission.admit(late, soon, False)
    old = offers("set", "dot", seconds=10.0, stale=True)
    assert admission.admit(old, soon, True) == Admitted(old[0])
    assert admission.admit(old, soon, True) == Admitted(old[1], frozenset({"deadline", "exit"}))
    assert admission.admit(old, soon, True) == Admitted(None, frozenset({"deadline"})), "each was tried just now"
    near = offers("set", seconds=4.9)  # without others no margin is needed
    assert admission.admit(near, soon, True) == Admitted(near[0])


def test_no_request_makes_an_admitted_one_late() -> None:
    admission = Admission(request_limits())
    small = offers("dot", seconds=0.1)
    promised = Running(1.0, time.perf_counter() + 1.15)
    admission.begin_work(promised)
    relaxed = Deadline(60_000, time.perf_counter())
    assert admission.admit(small, relaxed, True).offer == small[0]
    admission.begin_work(Running(0.1, None))
    assert admission.admit(small, relaxed, True) == Admitted(None, frozenset({"deadline"}))
    assert admission.admit(small, NO_DEADLINE, True).offer == small[0], "who has no deadline waits its turn"
    admission.end_work(promised)
    assert admission.admit(small, relaxed, True).offer == small[0]


def test_passed_deadline_gives_input_order_or_an_error() -> None:
    admission = Admission(request_limits(max_queue_s=0.1))
    before = gauge("slatewise_deadline_exceeded_total")
    assert admission.admit(ALL, passed(), True) == Admitted(None, frozenset({"deadline"}))
    with pytest.raises(DeadlineExceeded, match="deadline_ms = 1"):
        admission.admit(ALL, passed(), False)
    with working(admission, 9):
        assert admission.admit(ALL, passed(), True) == Admitted(None, frozenset({"deadline", "overload"}))
    assert gauge("slatewise_deadline_exceeded_total") == before + 3


def test_deadline_defaults_to_the_limit_of_the_server() -> None:
    assert Admission(request_limits(deadline_ms=40)).deadline(None, 5.0) == Deadline(40, 5.0, 0.001)
    assert Admission(request_limits(deadline_ms=40)).deadline(7, 5.0) == Deadline(7, 5.0, 0.001)
    assert Admission(request_limits()).deadline(None, 5.0).remaining() is None


def test_time_for_the_answer_is_kept_before_the_deadline() -> None:
    admission = Admission(request_limits())
    admission.loop_lag.mean = 0.004
    assert admission.deadline(50, 7.0).due == pytest.approx(7.045)
    assert admission.deadline(8, 7.0).due == pytest.approx(7.006), "at most a quarter of the deadline"


def test_timeout_of_a_passed_deadline_raises_at_once() -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            passed().timeout()
        async with NO_DEADLINE.timeout(), Deadline(10_000, time.perf_counter()).timeout():
            pass

    asyncio.run(main())


@pytest.mark.parametrize("allow_degraded", [True, False])
@pytest.mark.parametrize("reason", ["overload", "deadline"])
def test_refused_request_makes_no_array(
    ranker: Ranker, monkeypatch: pytest.MonkeyPatch, reason: str, allow_degraded: bool
) -> None:
    """The positions of unknown items are still reported."""

    def fail(*_: Any) -> Any:
        raise AssertionError("an array was made")

    for name in ("rows_of", "make_history", "make_candidates", "numeric_matrix"):
        monkeypatch.setattr(f"slatewise.bundle.ranker.{name}", fail)
    monkeypatch.setattr("slatewise.bundle.features.np", None)
    ids = [*list(ranker.vocabulary.items)[:3], "no-such-item"]
    deadline_ms = 0.001 if reason == "deadline" else None
    request = draw_request(ranker, 200, 4, 1, deadline_ms=deadline_ms, allow_degraded=allow_degraded)
    request = request.model_copy(update={"candidates": Candidates(item_ids=ids)})

    async def ask(pipeline: Pipeline) -> Ranking:
        with working(pipeline.admission, 1 if reason == "overload" else 0):
            return await rank(pipeline, request)

    if allow_degraded:
        ranking = run(ranker, ask, max_queue_s=1e-9)
        assert (ranking.exit, ranking.scored, ranking.degraded) == ("input_order", None, {reason})
        assert ranking.unknown == (3,) and ranking.history.dropped > 0 and ranking.history.used == 0
    else:
        with pytest.raises((OverloadedUndegraded, DeadlineExceeded)):
            run(ranker, ask, max_queue_s=1e-9)


def test_ranking_is_frozen(ranker: Ranker) -> None:
    ranking = run(ranker, lambda p: rank(p, draw_request(ranker, 5, 5, 2)))
    for value in (ranking, ranking.scored, ranking.history, ranking.meta):
        name = dataclasses.fields(value)[0].name  # type: ignore[arg-type]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
