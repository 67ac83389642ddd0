"""Admission control: each refusal, its counters, and that no array is made before the decision."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from slatewise.bundle.ranker import Ranker
from slatewise.errors import DeadlineExceeded, Overloaded, OverloadedUndegraded, RankingError, TooLarge
from slatewise.inference.engine import Engine, EngineError
from slatewise.ranking.admission import Admission, Admitted, Deadline
from slatewise.ranking.pipeline import Pipeline, Ranking
from slatewise.schemas import EXITS, Candidates, ModelExit
from tests.ranking.support import draw_request, rank, request_limits, run

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


@contextmanager
def working(admission: Admission, tokens: int) -> Iterator[None]:
    """Act as if other requests with this number of tokens were running."""
    admission.begin_work(tokens)
    try:
        yield
    finally:
        admission.end_work(tokens)


def test_failed_request_frees_its_tokens(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    async def ask(pipeline: Pipeline) -> int:
        def fail(*_: Any, **__: Any) -> Any:
            seen.append(pipeline.admission.outstanding_tokens)
            raise EngineError("broken")

        monkeypatch.setattr(Engine, "point", fail)
        with pytest.raises(RankingError, match="the model failed"):
            await rank(pipeline, draw_request(ranker, 5, 20, 3))
        return pipeline.admission.outstanding_tokens

    assert run(ranker, ask) == 0
    assert seen == [25]


@pytest.mark.parametrize(("length", "refused"), [(None, False), (0, False), (100, False), (101, True), (10**18, True)])
def test_content_length_above_the_limit_is_refused(length: int | None, refused: bool) -> None:
    admission = Admission(request_limits(max_body_bytes=100))
    if refused:
        with pytest.raises(TooLarge, match="100 bytes"):
            admission.check_content_length(length)
    else:
        admission.check_content_length(length)


def slow_admit(wanted: ModelExit, tokens: int, outstanding: int, limit: int, allow_degraded: bool) -> Admitted | None:
    """Look up the rule of `admit` in a table; `None`: the request is refused."""
    load = (outstanding + tokens) / limit
    if outstanding == 0 or load <= 0.5:
        return Admitted(wanted)
    if load > 1:
        return Admitted("input_order", frozenset({"overload"})) if allow_degraded else None
    allowed = ["dot", "point"] if load <= 0.75 else ["dot"]
    if wanted in allowed or not allow_degraded:
        return Admitted(wanted)
    return Admitted("point" if load <= 0.75 else "dot", frozenset({"overload", "exit"}))


@given(st.sampled_from(EXITS), st.integers(1, 150), st.sampled_from([0, 1, 24, 25, 50, 74, 75, 99, 100]), st.booleans())
def test_admit_under_random_loads_equals_the_table(
    wanted: ModelExit, tokens: int, outstanding: int, allow_degraded: bool
) -> None:
    admission = Admission(request_limits(max_outstanding_tokens=100))
    expected = slow_admit(wanted, tokens, outstanding, 100, allow_degraded)
    before = rejected("tokens")
    with working(admission, outstanding):
        if expected is None:
            with pytest.raises(OverloadedUndegraded, match="more than 100"):
                admission.admit(wanted, tokens, NO_DEADLINE, allow_degraded)
        else:
            assert admission.admit(wanted, tokens, NO_DEADLINE, allow_degraded) == expected
    over = outstanding > 0 and outstanding + tokens > 100
    assert rejected("tokens") - before == over


def test_passed_deadline_gives_input_order_or_an_error() -> None:
    admission = Admission(request_limits(max_outstanding_tokens=100))
    before = gauge("slatewise_deadline_exceeded_total")
    assert admission.admit("set", 1, passed(), True) == Admitted("input_order", frozenset({"deadline"}))
    with pytest.raises(DeadlineExceeded, match="deadline_ms = 1"):
        admission.admit("set", 1, passed(), False)
    with working(admission, 70):
        reasons = frozenset({"deadline", "overload", "exit"})
        assert admission.admit("set", 1, passed(), True) == Admitted("input_order", reasons)
    assert gauge("slatewise_deadline_exceeded_total") == before + 3


def test_overload_is_reported_before_a_passed_deadline() -> None:
    admission = Admission(request_limits(max_outstanding_tokens=100))
    with working(admission, 100):
        assert admission.admit("dot", 1, passed(), True) == Admitted("input_order", frozenset({"overload"}))


def test_deadline_defaults_to_the_limit_of_the_server() -> None:
    assert Admission(request_limits(deadline_ms=40)).deadline(None, 5.0) == Deadline(40, 5.0)
    assert Admission(request_limits(deadline_ms=40)).deadline(7, 5.0) == Deadline(7, 5.0)
    assert Admission(request_limits()).deadline(None, 5.0).remaining() is None


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
        with working(pipeline.admission, 100 if reason == "overload" else 0):
            return await rank(pipeline, request)

    if allow_degraded:
        ranking = run(ranker, ask, max_outstanding_tokens=100)
        assert (ranking.exit, ranking.scored, ranking.degraded) == ("input_order", None, {reason})
        assert ranking.unknown == (3,) and ranking.history.dropped > 0 and ranking.history.used == 0
    else:
        with pytest.raises((OverloadedUndegraded, DeadlineExceeded)):
            run(ranker, ask, max_outstanding_tokens=100)


def test_ranking_is_frozen(ranker: Ranker) -> None:
    ranking = run(ranker, lambda p: rank(p, draw_request(ranker, 5, 5, 2)))
    for value in (ranking, ranking.scored, ranking.history, ranking.meta):
        name = dataclasses.fields(value)[0].name  # type: ignore[arg-type]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
