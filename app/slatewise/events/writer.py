"""Writes events in batches, off the path of rankings, and answers when they are written.

    POST /events --> queue --> batch --> histories (Redis or this process) --> tap --> answer

While one batch is written, the next one gathers, so a busy server makes large batches and an idle one does not wait.
Called by: `http/events.py` (submit); `main.py` opens it. Calls: `histories.py`, `tap.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from slatewise import metrics
from slatewise.errors import LATER, Overloaded, StoreFault
from slatewise.events.event import Event, EventCounts
from slatewise.events.histories import FAILED, Histories
from slatewise.events.packed import KNOWN, NEW
from slatewise.events.tap import Tap

log = logging.getLogger("slatewise")

BATCH = 1_000  # events; a larger request is written by itself
PATIENCE_SECONDS = 5.0  # longest wait of a request for its batch


class Submitted(asyncio.Future[str]):
    """The events of one request; the result has a letter of `packed.py` for each."""

    def __init__(self, events: Sequence[Event]) -> None:
        super().__init__()
        self.events = events
        self.received = time.time()


class EventWriter:
    """A queue of events and the task that writes them: `async with EventWriter(...)`.

    most_waiting: events in the queue and the batch. written: called with the users of a batch that was stored.
    """

    def __init__(
        self, histories: Histories, tap: Tap | None, most_waiting: int, written: Callable[[Iterable[str]], None] | None
    ) -> None:
        self.histories = histories
        self.tap = tap
        self.most_waiting = most_waiting
        self.written = written
        self.waiting = 0
        self.requests = 0
        self.queue: list[Submitted] = []
        self.arrived = asyncio.Event()
        self.closing = False

    async def __aenter__(self) -> EventWriter:
        self.task = asyncio.create_task(self.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Write what is queued, then end."""
        self.closing = True
        self.arrived.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.task, PATIENCE_SECONDS)
        self.resolve(self.queue, None)

    @contextlib.contextmanager
    def request(self, most: int) -> Iterator[None]:
        """Count a request while it is read and written. Raises Overloaded above `most`."""
        if self.requests >= most:
            raise Overloaded(f"more than {most} requests with events are in flight: {LATER}")
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    async def submit(self, events: Sequence[Event]) -> EventCounts:
        """Return when the events are written.

        Raises Overloaded if too many events wait, and StoreFault if one of them was not stored. Then the client
        repeats all of them: those that were stored are duplicates.
        """
        if self.closing or (self.waiting and self.waiting + len(events) > self.most_waiting):
            metrics.EVENTS_BY_RESULT["refused"].inc(len(events))
            raise Overloaded(
                f"more than {self.most_waiting} events wait to be written (SLATEWISE_MAX_EVENTS_WAITING): {LATER}"
            )
        submitted = Submitted(events)
        self.queue.append(submitted)
        self.waiting += len(events)
        metrics.EVENTS_WAITING.set(self.waiting)
        self.arrived.set()
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                letters = await asyncio.shield(submitted)
        except TimeoutError:
            letters = FAILED
        failed = letters.count(FAILED)
        if failed:
            metrics.EVENTS_BY_RESULT["failed"].inc(len(events))
            raise StoreFault("the events were not all stored in time; repeat the request, which is idempotent")
        new, known = letters.count(NEW), letters.count(KNOWN)
        counts = EventCounts(accepted=new, duplicate=known, dropped=len(events) - new - known)
        for result, number in counts.model_dump().items():
            metrics.EVENTS_BY_RESULT[result].inc(number)
        return counts

    async def run(self) -> None:
        while self.queue or not self.closing:
            await self.arrived.wait()
            if not self.closing:
                self.arrived.clear()
            while self.queue:
                await self.write(self.next_batch())

    def next_batch(self) -> list[Submitted]:
        """Take requests from the queue, up to `BATCH` events, and at least one request."""
        taken = 1
        size = len(self.queue[0].events)
        while taken < len(self.queue) and size + len(self.queue[taken].events) <= BATCH:
            size += len(self.queue[taken].events)
            taken += 1
        batch = self.queue[:taken]
        self.queue = self.queue[taken:]
        return batch

    async def write(self, batch: list[Submitted]) -> None:
        """Write a batch to the histories, then the new events to the tap, and resolve its requests."""
        pairs = [(event, submitted.received) for submitted in batch for event in submitted.events]
        begin = time.perf_counter()
        letters = FAILED * len(pairs)
        try:
            letters = await self.store(pairs)
        except Exception as error:
            log.error("events", exc_info=error)  # the requests get StoreFault, and the next batch its try
        metrics.EVENTS_WRITE_DURATION.observe(time.perf_counter() - begin)
        self.resolve(batch, letters)

    async def store(self, pairs: list[tuple[Event, float]]) -> str:
        """Return a letter for each event. Items that were only shown are new, and go to the tap alone."""
        taken = [pair for pair in pairs if not pair[0].shown]
        stored = iter(await self.histories.write(taken) if taken else "")
        letters = "".join(NEW if event.shown else next(stored) for event, _ in pairs)
        new = [event for (event, _), letter in zip(pairs, letters, strict=True) if letter == NEW]
        if new and self.tap is not None:
            await self.tap.append(new)
        if self.written is not None:
            self.written({event.user for event in new if not event.shown})
        return letters

    def resolve(self, batch: list[Submitted], letters: str | None) -> None:
        first = 0
        for submitted in batch:
            end = first + len(submitted.events)
            if not submitted.done():
                submitted.set_result(FAILED * len(submitted.events) if letters is None else letters[first:end])
            first = end
        self.waiting -= first
        metrics.EVENTS_WAITING.set(self.waiting)
