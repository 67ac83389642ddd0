"""Admission control: decides whether a request is served in full, degraded or refused. It needs counts only, no arrays.

    when the body is there     requests in flight                    else 429; 413 by Content-Length, unread
    after parsing              outstanding tokens                    else a cheaper exit, the input order, or 503
    during the ranking         deadline                              else the highest complete exit, or 504

A token is one event to read or one candidate. The outstanding tokens are those of all requests that are being ranked.

Called by: `http/rank.py` when the body has arrived, `pipeline.py` after parsing. Calls: `metrics.py`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from slatewise import metrics
from slatewise.errors import DeadlineExceeded, Overloaded, OverloadedUndegraded, TooLarge
from slatewise.schemas import EXITS, AnsweredExit, DegradedReason, ModelExit


@dataclass(frozen=True)
class RequestLimits:
    """Limits that the operator sets, equal for all rankers. See the settings of the same names."""

    max_in_flight: int
    max_outstanding_tokens: int
    max_body_bytes: int
    body_timeout_s: float
    max_values: int  # in a JSON body
    max_candidates: int
    max_history: int
    deadline_ms: float  # for requests that set no deadline; 0: no deadline


@dataclass(frozen=True)
class Deadline:
    """The deadline of one request. `milliseconds` is 0 if the request has no deadline."""

    milliseconds: float
    entered: float  # time.perf_counter()

    def remaining(self) -> float | None:
        """Return the seconds left, negative after the deadline; `None` without a deadline."""
        if not self.milliseconds:
            return None
        return self.entered + self.milliseconds / 1e3 - time.perf_counter()

    def timeout(self) -> asyncio.Timeout:
        """Return an `asyncio.timeout` up to the deadline. This call raises TimeoutError if the deadline has passed."""
        remaining = self.remaining()
        if remaining is not None and remaining <= 0:
            raise TimeoutError
        return asyncio.timeout(remaining)


@dataclass(frozen=True)
class Admitted:
    """The exit to compute (`input_order`: do not run the model), and the reasons if a higher exit was requested."""

    exit: AnsweredExit
    degraded: frozenset[DegradedReason] = frozenset()


class Admission:
    """Counts requests in flight and tokens of work, and refuses above the limits. Lives on the event loop."""

    def __init__(self, limits: RequestLimits) -> None:
        self.limits = limits
        self.in_flight = 0
        self.outstanding_tokens = 0
        metrics.IN_FLIGHT_LIMIT.set(limits.max_in_flight)
        metrics.OUTSTANDING_TOKENS_LIMIT.set(limits.max_outstanding_tokens)

    def enter(self) -> None:
        """Count the request as in flight. Raises Overloaded if too many are. `leave` must follow in both cases."""
        self.in_flight += 1
        metrics.IN_FLIGHT.inc()
        if self.in_flight > self.limits.max_in_flight:
            metrics.REJECTED.labels("in_flight").inc()
            raise Overloaded(f"more than {self.limits.max_in_flight} requests are in flight")

    def leave(self) -> None:
        self.in_flight -= 1
        metrics.IN_FLIGHT.dec()

    def check_content_length(self, length: int | None) -> None:
        """Raise TooLarge if the length exceeds the limit. With `None` (unknown), `body.py` applies the limit later."""
        if length is not None and length > self.limits.max_body_bytes:
            raise TooLarge.body(self.limits.max_body_bytes)

    def deadline(self, deadline_ms: float | None, entered: float) -> Deadline:
        """Return the deadline of a request that was received at `entered` (time.perf_counter())."""
        return Deadline(deadline_ms or self.limits.deadline_ms, entered)

    def admit(self, wanted: ModelExit, tokens: int, deadline: Deadline, allow_degraded: bool) -> Admitted:
        """Return the exit that the outstanding tokens and the deadline allow.

        Up to half of the token limit every exit is allowed, up to three quarters `point`, and up to the limit `dot`. If
        no other request is being ranked, a request is admitted whatever its size. Raises OverloadedUndegraded or
        DeadlineExceeded.
        """
        admitted = self.admit_tokens(wanted, tokens, allow_degraded)
        remaining = deadline.remaining()
        if admitted.exit != "input_order" and remaining is not None and remaining <= 0:
            self.on_deadline(deadline, allow_degraded)
            return Admitted("input_order", admitted.degraded | {"deadline"})
        return admitted

    def admit_tokens(self, wanted: ModelExit, tokens: int, allow_degraded: bool) -> Admitted:
        """Return the exit that the outstanding tokens allow. Raises OverloadedUndegraded."""
        limit = self.limits.max_outstanding_tokens
        load = (self.outstanding_tokens + tokens) / limit
        if self.has_room(tokens):
            return Admitted(wanted)
        if load > 1:
            metrics.REJECTED.labels("tokens").inc()
            if not allow_degraded:
                raise OverloadedUndegraded(f"more than {limit} events and candidates are at work")
            return Admitted("input_order", frozenset({"overload"}))
        allowed: ModelExit = "dot" if load > 0.75 else "point"
        if not allow_degraded or EXITS.index(wanted) <= EXITS.index(allowed):
            return Admitted(wanted)
        return Admitted(allowed, frozenset({"overload", "exit"}))

    def has_room(self, tokens: int) -> bool:
        """Return whether the load is low enough for every exit, and for work that may be left out."""
        total = self.outstanding_tokens + tokens
        return not self.outstanding_tokens or total / self.limits.max_outstanding_tokens <= 0.5

    def begin_work(self, tokens: int) -> None:
        """Count the tokens of an admitted request as outstanding. The caller must call `end_work` afterwards."""
        self.outstanding_tokens += tokens

    def end_work(self, tokens: int) -> None:
        self.outstanding_tokens -= tokens

    def on_deadline(self, deadline: Deadline, allow_degraded: bool) -> None:
        """Count a missed deadline. Raises DeadlineExceeded unless the request accepts a degraded response."""
        metrics.DEADLINE_EXCEEDED.inc()
        if not allow_degraded:
            raise DeadlineExceeded(f"not done within deadline_ms = {deadline.milliseconds:g}")
