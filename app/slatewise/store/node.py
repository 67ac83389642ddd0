"""The way to one Redis server: look-ups that share round trips, and a circuit that opens when these fail in a row.

What a request waits for is a future with a timer; the round trips run in tasks of their own, so that a request that goes away
never leaves half a reply in a connection. Knows look-ups and replies, and nothing of vectors.
Before: `meta_embeddings.RedisStore` sends look-ups here. After: it gets each back with its reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from slatewise import metrics

log = logging.getLogger("slatewise")

CLOSED, HALF_OPEN, OPEN = range(3)
STALL_SECONDS = 0.003


def call_after(seconds: float, then: Callable[[], None]) -> Callable[[], None]:
    """A timer; returns what cancels it. Where the loop itself stood still meanwhile, what has arrived is read before `then` is called."""
    loop = asyncio.get_running_loop()
    due = loop.time() + seconds

    handle = loop.call_at(due, lambda: fire())

    def fire() -> None:
        nonlocal handle
        if loop.time() - due > STALL_SECONDS:
            handle = loop.call_later(STALL_SECONDS, then)
        else:
            then()

    return lambda: handle.cancel()


@dataclass(eq=False)
class LookUp:
    """A look-up on its way, and the requests that wait for it."""

    user: tuple[str, str]  # ranker, user
    key: str
    waiting: list[asyncio.Future[Any]] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)  # what is asked for, as of when it was sent
    epoch: int = 0  # of the pointers when it was sent

    @property
    def wanted(self) -> bool:
        return not all(future.done() for future in self.waiting)


class RedisNode:
    """One round trip after the other; a second one only where the one before takes its time."""

    CONNECTION_SECONDS = 1.0  # after which a connection is given up; nobody waits so long, but a connection may take longer to make than a look-up may
    ROUND_TRIPS = 4  # at a time
    BATCH = 32  # users of one round trip: redis-py takes about a tenth of a millisecond for each, and all of them must be inside the budget
    FAILURES = 5  # round trips in a row, each begun after the one before had failed, that open the circuit

    def __init__(
        self,
        name: str,
        timeout_seconds: float,
        fetch: Callable[[list[LookUp]], Awaitable[list[Any]]],
        complete: Callable[[LookUp, Any], None],  # with a reply or an exception
        drop: Callable[[LookUp], None],  # who asks for this user from now on does so anew
        circuit: int,
    ) -> None:
        self.name = name
        self.timeout = timeout_seconds
        self.fetch = fetch
        self.complete = complete
        self.drop = drop
        self.circuit = circuit
        self.failures = 0
        self.failed_at = 0.0
        self.queue: list[LookUp] = []
        self.arrived = asyncio.Event()
        self.under_way: set[asyncio.Task[None]] = set()
        self.late: set[asyncio.Task[None]] = set()  # past the budget: nobody waits for them, and they hold nobody up
        self.dispatcher = asyncio.create_task(self.dispatch())

    async def close(self) -> None:
        self.dispatcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.dispatcher
        await asyncio.gather(*self.under_way, *self.late, return_exceptions=True)
        self.refuse_queue()

    def send(self, look_up: LookUp) -> None:
        self.queue.append(look_up)
        self.arrived.set()

    async def dispatch(self) -> None:
        while True:
            await self.arrived.wait()
            self.arrived.clear()
            while self.queue:
                while len(self.under_way) >= self.ROUND_TRIPS or len(self.late) >= 2 * self.ROUND_TRIPS:
                    await asyncio.wait(
                        self.under_way | self.late, timeout=self.timeout / 4, return_when=asyncio.FIRST_COMPLETED
                    )
                batch = self.queue[: self.BATCH]
                self.queue = self.queue[self.BATCH :]
                for look_up in batch:
                    if not look_up.wanted:
                        self.drop(look_up)
                batch = [look_up for look_up in batch if look_up.wanted]
                if batch:
                    task = asyncio.create_task(self.round_trip(batch))
                    self.under_way.add(task)
                    task.add_done_callback(self.under_way.discard)
                    task.add_done_callback(self.late.discard)
                    await asyncio.wait([task], timeout=self.timeout / 4)

    async def round_trip(self, batch: list[LookUp]) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        begin = loop.time()

        def overdue() -> None:
            self.under_way.discard(task)
            self.late.add(task)
            self.failed(begin)
            if len(self.late) >= 2 * self.ROUND_TRIPS:  # nothing comes back at all
                self.switch(OPEN)
            for look_up in batch:
                self.drop(look_up)

        cancel_timer = call_after(self.timeout, overdue)
        try:
            async with asyncio.timeout(max(self.timeout, self.CONNECTION_SECONDS)):
                try:
                    replies = await self.fetch(batch)
                except RedisConnectionError:  # a connection that the server had closed
                    if loop.time() - begin > self.timeout:
                        raise
                    replies = await self.fetch(batch)
        except Exception as error:  # also what redis-py makes of bytes that are no Redis
            metrics.REDIS_ERRORS.labels(type(error).__name__).inc()
            replies = [error] * len(batch)
        finally:
            cancel_timer()
            metrics.REDIS_DURATION.labels("hmget").observe(loop.time() - begin)
        if task not in self.late:
            if all(isinstance(reply, Exception) and not is_wrong_type(reply) for reply in replies):
                self.failed(begin)
            else:
                self.failures = 0
        for look_up, reply in zip(batch, replies, strict=True):
            self.complete(look_up, reply)

    def failed(self, begin: float) -> None:
        """Count a failed round trip that began then. Those that were under way together count once: it may have been us who stood still."""
        if begin < self.failed_at:
            return
        self.failures = self.failures + 1
        self.failed_at = asyncio.get_running_loop().time()
        if self.failures >= self.FAILURES:
            self.switch(OPEN)

    def switch(self, circuit: int) -> None:
        if circuit == CLOSED != self.circuit:
            self.failures = 0
            log.info("redis%s: answers", self.name and f" {self.name}")
        if circuit == OPEN and self.circuit == CLOSED:
            log.warning(
                "redis%s: no answer in time, meta-embeddings fall back to the default vector",
                self.name and f" {self.name}",
            )
        self.circuit = circuit
        if circuit == OPEN:
            self.refuse_queue()

    def refuse_queue(self) -> None:
        """Those that were not sent are answered now."""
        for look_up in self.queue:
            self.complete(look_up, RedisError("not asked"))
        self.queue = []

    async def probe(self, ask: Callable[[], Awaitable[object]]) -> None:
        """Close an open circuit if an answer comes inside the budget. The first try is off the clock, for it may have to connect."""
        loop = asyncio.get_running_loop()
        least = float("inf")
        self.switch(HALF_OPEN)
        try:
            async with asyncio.timeout(max(self.timeout, self.CONNECTION_SECONDS)):
                for timed in (False, True, True, True):
                    begin = loop.time()
                    await ask()
                    if timed:
                        least = min(least, loop.time() - begin)
        except Exception:  # also what redis-py makes of bytes that are no Redis
            least = float("inf")
        self.switch(CLOSED if least <= self.timeout else OPEN)


def is_wrong_type(reply: object) -> bool:
    """The key holds no hash: one user's fault, and no sign that Redis is ill."""
    return isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE")
