"""One Redis server: batches reads into round trips, and has a circuit breaker that opens after repeated failures.

`RedisNode.read` returns a future at once. A background task sends the reads in batches and resolves each with its
reply. So cancelling a request never leaves a part of a reply on a connection. The callers decode the values.
Called by: `nodes.py`, which makes and probes the nodes, `lookup.py` and `events/redis_histories.py` (reads). Calls: the
redis-py client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from slatewise import metrics
from slatewise.store.client import disconnect, is_wrong_type
from slatewise.store.spaces import Live, Space

log = logging.getLogger("slatewise")

CLOSED, HALF_OPEN, OPEN = range(3)
STALL_SECONDS = 0.003
LOG_SECONDS = 10.0  # least time between two lines of the log about one server


def call_after(seconds: float, then: Callable[[], None]) -> Callable[[], None]:
    """Call `then` after some seconds. Return a function that cancels the timer.

    If the event loop was blocked past that time, replies that have arrived are read before `then` is called.
    """
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


class Read(asyncio.Future[Any]):
    """A future for the reply to one command: its value, or the exception. Subclasses name the command.

    The node cancels a read instead of sending it if no request waits for it any more.
    """

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
        self.waiters = 0  # requests that wait; counted by the caller
        self.is_late = False  # whether the round trip has exceeded the time budget; set by the node

    def send(self, pipe: Any) -> None:
        """Add the command to a pipeline of redis-py."""
        raise NotImplementedError

    def is_answer(self, reply: object) -> bool:
        """Return whether a reply that is not an error has the form that the command answers."""
        raise NotImplementedError


class VectorRead(Read):
    """HMGET of a user's vectors: a value or `None` for each of `live.fields`."""

    def __init__(self, key: str, space: Space) -> None:
        super().__init__(key)
        self.space = space
        self.live: Live | None = None  # the generations that were requested; set when the read is sent

    def send(self, pipe: Any) -> None:
        self.live = self.space.live
        pipe.hmget(self.key, self.live.fields)

    def is_answer(self, reply: object) -> bool:
        assert self.live is not None
        return isinstance(reply, list) and len(reply) == len(self.live.fields)


class ValueRead(Read):
    """GET of one value: bytes, or `None`."""

    def send(self, pipe: Any) -> None:
        pipe.get(self.key)

    def is_answer(self, reply: object) -> bool:
        return isinstance(reply, bytes | None)


class RedisNode:
    """Sends reads to one server in batches. A second round trip runs at the same time only if the first is slow."""

    CONNECTION_SECONDS = 1.0  # connect timeout; longer than the time budget, because no request waits for it
    ROUND_TRIPS = 4  # most concurrent round trips, without the late ones
    BATCH = 32  # users in a round trip: redis-py takes about 0.1 ms for each, and all must fit into the budget
    FAILURES = 5  # failed round trips in a row that open the circuit, each begun after the one before had failed

    def __init__(self, name: str, client: Any, timeout_seconds: float, circuit: int) -> None:
        self.name = name
        self.client = client
        self.timeout = timeout_seconds
        self.circuit = circuit
        self.logged = True if circuit == CLOSED else None  # whether the last line of the log says that it answers
        self.may_log_at = 0.0
        self.later: asyncio.TimerHandle | None = None
        self.failures = 0
        self.failed_at = 0.0
        self.queue: list[Read] = []
        self.arrived = asyncio.Event()
        self.under_way: set[asyncio.Task[None]] = set()
        self.late: set[asyncio.Task[None]] = set()  # round trips over the budget; they do not delay others
        self.dispatcher = asyncio.create_task(self.dispatch())

    async def close(self) -> None:
        self.dispatcher.cancel()
        if self.later is not None:
            self.later.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.dispatcher
        await asyncio.gather(*self.under_way, *self.late, return_exceptions=True)
        self.refuse_queue()

    def read(self, key: str, space: Space) -> VectorRead:
        """Queue a read of a user's hash. It requests the generations that are live when it is sent."""
        read = VectorRead(key, space)
        self.enqueue(read)
        return read

    def enqueue(self, read: Read) -> None:
        """Queue a read. Reads that are queued before the event loop continues share a round trip."""
        self.queue.append(read)
        self.arrived.set()

    async def dispatch(self) -> None:
        """Send the queued reads until the task is cancelled."""
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
                for read in batch:
                    if not read.waiters:
                        read.cancel()
                batch = [read for read in batch if read.waiters]
                if batch:
                    task = asyncio.create_task(self.round_trip(batch))
                    self.under_way.add(task)
                    task.add_done_callback(self.under_way.discard)
                    task.add_done_callback(self.late.discard)
                    await asyncio.wait([task], timeout=self.timeout / 4)

    async def round_trip(self, batch: list[Read]) -> None:
        """Resolve every read of the batch within the longer of `CONNECTION_SECONDS` and the time budget."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        begin = loop.time()

        def overdue() -> None:
            self.under_way.discard(task)
            self.late.add(task)
            self.failed(begin)
            if len(self.late) >= 2 * self.ROUND_TRIPS:  # no reply arrives at all
                self.switch(OPEN)
            for read in batch:
                read.is_late = True

        cancel_timer = call_after(self.timeout, overdue)
        replies: list[Any]
        try:
            async with asyncio.timeout(max(self.timeout, self.CONNECTION_SECONDS)):
                try:
                    replies = await self.fetch(batch)
                except RedisConnectionError:  # a connection that the server had closed
                    if loop.time() - begin > self.timeout:
                        raise
                    replies = await self.fetch(batch)
        except Exception as error:  # includes errors of redis-py's parser on bytes that are not Redis' protocol
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
        for read, reply in zip(batch, replies, strict=True):
            read.set_result(reply)

    async def fetch(self, batch: list[Read]) -> list[Any]:
        """Send the reads in one round trip. Return a reply or an exception for each. Raises redis-py's exceptions."""
        pipe = self.client.pipeline(transaction=False)
        for read in batch:
            read.send(pipe)
        replies: list[Any] = await pipe.execute(raise_on_error=False)
        for read, reply in zip(batch, replies, strict=True):
            if not isinstance(reply, Exception) and not read.is_answer(reply):
                await disconnect(self.client)  # the stream may be out of step: its next bytes may answer another read
                raise RedisError("not an answer to the command")
        return replies

    def failed(self, begin: float) -> None:
        """Count a failed round trip that began at `begin`. Open the circuit after `FAILURES` in a row.

        Concurrent failures count once, because this process may have been blocked while the server worked.
        """
        if begin < self.failed_at:
            return
        self.failures += 1
        self.failed_at = asyncio.get_running_loop().time()
        if self.failures >= self.FAILURES:
            self.switch(OPEN)

    def switch(self, circuit: int) -> None:
        """Set the state of the circuit. An open circuit refuses its queue."""
        if circuit == CLOSED != self.circuit:
            self.failures = 0
        self.circuit = circuit
        if circuit != HALF_OPEN:
            self.log_state()
        if circuit == OPEN:
            self.refuse_queue()

    def log_state(self) -> None:
        """Log whether the server answers, if that has changed. Within ten seconds after a line, log it after these."""
        loop = asyncio.get_running_loop()
        answers = self.circuit == CLOSED
        if self.later is not None or answers == self.logged:
            return
        if loop.time() < self.may_log_at:
            self.later = loop.call_at(self.may_log_at, self.log_later)
            return
        self.logged = answers
        self.may_log_at = loop.time() + LOG_SECONDS
        name = self.name and f" {self.name}"
        if answers:
            log.info("redis%s: answers", name)
        else:
            without = "requests do without stored histories and meta-embeddings"
            log.warning("redis%s: no answer in time, %s", name, without)

    def log_later(self) -> None:
        self.later = None
        self.log_state()

    def refuse_queue(self) -> None:
        """Resolve the reads that were not sent with an error."""
        for read in self.queue:
            read.set_result(RedisError("not sent: the circuit is open"))
        self.queue = []

    async def probe(self, ask: Callable[[], Awaitable[object]]) -> None:
        """Close the circuit if three calls of `ask` succeed and the fastest is within the time budget; else open it.

        One untimed call comes first, because it may have to connect.
        """
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
        except Exception:  # includes errors of redis-py's parser on bytes that are not Redis' protocol
            least = float("inf")
        self.switch(CLOSED if least <= self.timeout else OPEN)
