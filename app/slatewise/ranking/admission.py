"""Admission control: decides whether a request is served in full, degraded or refused. It needs counts only, no arrays.

    when the body is there     requests in flight                    else 429; 413 by Content-Length, unread
    before parsing             the wait for a turn (`turns.py`)      else 429
    after parsing              the wait for other requests           else a cheaper offer, the input order, or 503
    after parsing              the deadline, by prediction           else a cheaper offer, the input order, or 504
    during the ranking         the deadline                          else the highest complete exit, or 504

Offers are the ways to answer (`offers.py`). An offer is taken if the wait that `load.py` predicts for it is within a
share of the limit: the cheaper the offer, the larger the share, and the last offer may use all of it.

Called by: `http/rank.py` when the body has arrived, `pipeline.py` after parsing. Calls: `load.py`, `turns.py`,
`metrics.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from slatewise import metrics
from slatewise.errors import LATER, DeadlineExceeded, Overloaded, OverloadedUndegraded, TooLarge
from slatewise.ranking.load import Load, Running
from slatewise.ranking.loop_lag import LoopLag
from slatewise.ranking.offers import STALE_SECONDS, Offer
from slatewise.ranking.turns import Turns
from slatewise.schemas import DegradedReason, ModelExit

SHARES: dict[ModelExit, float] = {"set": 0.8, "point": 0.9, "dot": 0.95}  # of the limit; of the last offer, all of it
TURN_SHARE = 0.5  # of the limit, in which a request must be parsed
HELD_SECONDS = 1.0  # in which an exit that was too costly comes back only below
HELD_SHARE = 0.75  # of its share
PRIORITY_SCALE = 10  # the priority that may wait for half as long as priority 0
MARGIN = 1.1  # of the predicted duration, for errors of the prediction
RENDER_SECONDS = 0.001  # from the last score to the answer, beside the lag of the event loop
MOST_RESERVED = 0.25  # of a deadline


@dataclass(frozen=True)
class RequestLimits:
    """Limits that the operator sets, equal for all rankers. See the settings of the same names."""

    max_in_flight: int
    max_queue_s: float
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
    reserved: float = 0.0  # seconds before the deadline at which the model must be done

    @property
    def due(self) -> float | None:
        """The time.perf_counter() at which the model must be done; `None` without a deadline."""
        return self.entered + self.milliseconds / 1e3 - self.reserved if self.milliseconds else None

    def remaining(self) -> float | None:
        """Return the seconds left for the model, negative if they are over; `None` without a deadline."""
        return None if self.due is None else self.due - time.perf_counter()

    def timeout(self) -> asyncio.Timeout:
        """Return an `asyncio.timeout` for the seconds left. This call raises TimeoutError if none are left."""
        remaining = self.remaining()
        if remaining is not None and remaining <= 0:
            raise TimeoutError
        return asyncio.timeout(remaining)


@dataclass(frozen=True)
class Standing:
    """What decides, beside its work, how long a request may wait."""

    priority: int = 0
    waited: float = 0.0  # seconds so far


@dataclass(frozen=True)
class Admitted:
    """The offer to carry out (`None`: answer in input order), and the reasons if it is not the first one."""

    offer: Offer | None
    degraded: frozenset[DegradedReason] = frozenset()


class Admission:
    """Counts requests in flight and the work in progress, and refuses above the limits. Lives on the event loop."""

    def __init__(self, limits: RequestLimits, threads: int = 1) -> None:
        self.limits = limits
        self.in_flight = 0
        self.load = Load(threads)
        self.loop_lag = LoopLag()
        self.turns = Turns(TURN_SHARE * limits.max_queue_s)
        self.tried_at: dict[tuple[ModelExit, str], float] = {}  # time.perf_counter()
        self.held_until: dict[ModelExit, float] = {}  # time.perf_counter()
        metrics.IN_FLIGHT_LIMIT.set(limits.max_in_flight)
        metrics.QUEUE_LIMIT.set(limits.max_queue_s)

    def enter(self) -> None:
        """Count the request as in flight. Raises Overloaded if too many are. `leave` must follow in both cases."""
        self.in_flight += 1
        metrics.IN_FLIGHT.inc()
        if self.in_flight > self.limits.max_in_flight:
            metrics.REJECTED.labels("in_flight").inc()
            raise Overloaded(
                f"more than {self.limits.max_in_flight} requests are in flight (SLATEWISE_MAX_IN_FLIGHT): {LATER}",
                seconds=self.load.backlog(),
            )

    async def turn(self) -> None:
        """Wait until the request may be parsed. Raises Overloaded if that took too long."""
        if not await self.turns.wait():
            metrics.REJECTED.labels("event_loop").inc()
            raise Overloaded(f"more requests arrive than this server can read: {LATER}", seconds=self.load.backlog())

    def leave(self) -> None:
        self.in_flight -= 1
        metrics.IN_FLIGHT.dec()

    def check_content_length(self, length: int | None) -> None:
        """Raise TooLarge if the length exceeds the limit. With `None` (unknown), `body.py` applies the limit later."""
        if length is not None and length > self.limits.max_body_bytes:
            raise TooLarge.body(self.limits.max_body_bytes)

    def deadline(self, deadline_ms: float | None, entered: float) -> Deadline:
        """Return the deadline of a request that was received at `entered` (time.perf_counter())."""
        milliseconds = deadline_ms or self.limits.deadline_ms
        reserved = min(MOST_RESERVED * milliseconds / 1e3, RENDER_SECONDS + self.loop_lag.mean)
        return Deadline(milliseconds, entered, reserved)

    def admit(
        self, offers: Sequence[Offer], deadline: Deadline, allow_degraded: bool, standing: Standing = Standing()
    ) -> Admitted:
        """Return the first offer that the load and the deadline allow.

        If no other request is being ranked, the load allows every offer, and an offer with an old prediction is tried
        even if it is too late by it. Raises OverloadedUndegraded or DeadlineExceeded.
        """
        first = offers[0]
        alone = not self.load.running
        remaining = deadline.remaining()
        reasons: set[DegradedReason] = set()
        for offer in offers if allow_degraded else offers[:1]:
            is_last = offer is offers[-1] or not allow_degraded
            if not self.has_room(offer.exit, offer.seconds, standing, is_last):
                reasons.add("overload")
                self.held_until[offer.exit] = time.perf_counter() + HELD_SECONDS
            elif remaining is not None and not self.in_time(offer, remaining, alone):
                reasons.add("deadline")
            else:
                if offer.exit != first.exit:
                    reasons.add("exit")
                if offer.variant != first.variant:
                    reasons.add("variant")
                return Admitted(offer, frozenset(reasons))
        if "overload" in reasons:
            metrics.REJECTED.labels("queue").inc()
            if not allow_degraded:
                milliseconds = self.limits.max_queue_s * 1e3
                raise OverloadedUndegraded(
                    f"the wait for other requests is more than {milliseconds:g} ms (SLATEWISE_MAX_QUEUE_MS): {LATER}, "
                    "or allow degraded answers",
                    seconds=self.load.backlog(),
                )
        if "deadline" in reasons:
            self.on_deadline(deadline, allow_degraded)
        return Admitted(None, frozenset(reasons))

    def has_room(self, exit: ModelExit, seconds: float, standing: Standing = Standing(), is_last: bool = False) -> bool:
        """Return whether the wait for other requests is short enough for so much work that ends with this exit."""
        if not self.load.running:
            return True
        share = 1.0 if is_last else SHARES[exit]
        if not is_last and time.perf_counter() < self.held_until.get(exit, 0.0):
            share *= HELD_SHARE
        share *= PRIORITY_SCALE / (PRIORITY_SCALE + max(0, standing.priority))
        return standing.waited + self.load.wait(seconds) <= share * self.limits.max_queue_s

    def in_time(self, offer: Offer, remaining: float, alone: bool) -> bool:
        """Return whether the offer is worth trying with so many seconds left."""
        if remaining <= 0:
            return False
        if alone:
            return offer.seconds <= remaining or (offer.stale and self.is_time_to_try(offer))
        duration = MARGIN * self.load.duration(offer.seconds) + self.load.slip
        return duration <= remaining and not self.load.delays(offer.seconds)

    def is_time_to_try(self, offer: Offer) -> bool:
        """Return whether an offer with an old prediction was not tried lately, and note that it is tried now.

        A call that comes too late may end before the graph whose prediction is old.
        """
        now = time.perf_counter()
        if now < self.tried_at.get((offer.exit, offer.variant), -inf) + STALE_SECONDS:
            return False
        self.tried_at[offer.exit, offer.variant] = now
        return True

    def begin_work(self, running: Running) -> None:
        """Count the work of an admitted request. The caller must call `end_work` afterwards."""
        self.load.begin(running)

    def end_work(self, running: Running) -> None:
        self.load.end(running)

    def on_deadline(self, deadline: Deadline, allow_degraded: bool) -> None:
        """Count a deadline that passed, or would pass. Raises DeadlineExceeded unless a degraded answer is allowed."""
        metrics.DEADLINE_EXCEEDED.inc()
        if not allow_degraded:
            raise DeadlineExceeded(f"not done within deadline_ms = {deadline.milliseconds:g}")
