"""Threads that run the model, a quantum at a time.

A job is a generator of quanta: each `yield` says what the next one costs (rows through the model), and is answered, when
its turn has come, with whether the other threads are idle and have been for a while. A quantum is bounded in size
(engine.HISTORY_QUANTUM, engine.CANDIDATE_QUANTUM) and the unit of scheduling and cancellation: a thread goes on with a
job as long as nobody has a better claim, and what nobody waits for any more is not run. Among jobs of a priority the
claim is start-time fair queueing (Goyal, Vin and Cheng 1996): each job has a virtual time, which advances by what its
quanta cost, and the job that is least ahead is next. So a large request takes turns with small ones, row for row. A new
job starts at the time that all are at, which advances by each quantum's cost over the number of jobs (as in WF2Q+,
Bennett and Zhang 1997), so that no endless row of small new ones holds up a large one. Knows generators, nothing of
ranking.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from math import inf
from queue import SimpleQueue
from typing import Any, TypeVar

QUIET_SECONDS = 0.1  # after two jobs were at work at once, until one counts as alone again

Result = TypeVar("Result")
Chunks = Generator[int, bool, Result]


class Job(asyncio.Future[Result]):
    """The result of a generator's return, or what it raises; cancelled, it is not run any further."""

    def __init__(self, quanta: Chunks[Result], priority: int, virtual_start: float, number: int) -> None:
        super().__init__()
        self.quanta = quanta
        self.priority = priority
        self.number = number
        self.virtual_start = virtual_start  # of its next quantum, in rows
        self.cost = 0  # of its next quantum, in rows
        self.queued_at: float | None = time.perf_counter()  # None while it runs
        self.waited = 0.0

    def __lt__(self, other: Job[Any]) -> bool:
        """Which has the better claim to a thread."""
        return (self.priority, self.virtual_start, self.number) < (other.priority, other.virtual_start, other.number)

    @property
    def queued(self) -> float:
        """Seconds in the queue, so far."""
        since = self.queued_at
        return self.waited + (0.0 if since is None else time.perf_counter() - since)

    def run_chunk(self, alone: bool) -> None:
        """Raises StopIteration, with the result, after the last."""
        self.waited = self.queued
        self.queued_at = None
        self.virtual_start += self.cost
        self.cost = self.quanta.send(alone)
        self.queued_at = time.perf_counter()


class Workers:
    """`async with Workers(threads)`; at the end queued jobs are cancelled and running ones waited for."""

    def __init__(self, threads: int) -> None:
        self.queue: list[Job[Any]] = []
        self.lock = threading.Lock()
        self.tickets: SimpleQueue[None] = SimpleQueue()  # one for each job that enters the queue; its `get` waits in C
        self.number = 0
        self.busy = 0  # threads that have a job
        self.crowded_at = -inf  # when a job last came while another was at work
        self.virtual_time = 0.0  # rows that each of the jobs at work has had, had they all been served at once
        self.stopping = False
        self.threads = [threading.Thread(target=self.work, name=f"slatewise-{k}", daemon=True) for k in range(threads)]

    async def __aenter__(self) -> Workers:
        for thread in self.threads:
            thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        with self.lock:
            self.stopping = True
            for job in self.queue:
                job.cancel()
            self.queue.clear()
        for _thread in self.threads:
            self.tickets.put(None)
        for thread in self.threads:
            await asyncio.to_thread(thread.join)

    def submit(self, quanta: Chunks[Result], priority: int = 0) -> Job[Result]:
        """The job that runs the generator in a thread; its first cost is taken here, so nothing heavy may come before that."""
        with self.lock:
            self.number += 1
            job = Job(quanta, priority, self.virtual_time, self.number)
            if self.stopping:
                job.cancel()
                return job
            try:
                job.cost = next(quanta)
            except StopIteration as end:  # nothing to run
                job.set_result(end.value)
                return job
            if self.busy or self.queue:
                self.crowded_at = time.perf_counter()
            heapq.heappush(self.queue, job)
        self.tickets.put(None)
        return job

    def work(self) -> None:
        while True:
            self.tickets.get()
            with self.lock:
                if self.stopping:
                    return
                job: Job[Any] | None = heapq.heappop(self.queue)
                self.busy += 1
            while job is not None:
                job = self.take_turn(job)  # an idle thread keeps no request alive

    def take_turn(self, job: Job[Any]) -> Job[Any] | None:
        """Runs one quantum of a job; what this thread goes on with, None where the job is done and the thread no longer busy."""
        if job.cancelled():
            with suppress(Exception):  # nobody waits for what it says
                job.quanta.close()
            with self.lock:
                self.busy -= 1
            return None
        begun = job.virtual_start
        cost = job.cost
        answer: tuple[Any, BaseException | None] | None = None
        try:
            job.run_chunk(
                alone=self.busy == 1 and not self.queue and time.perf_counter() > self.crowded_at + QUIET_SECONDS
            )
        except StopIteration as end:
            answer = (end.value, None)
        except BaseException as error:  # every accepted job is answered, with what it raised if need be
            answer = (None, error)
        with self.lock:
            self.virtual_time = max(self.virtual_time, begun) + cost / (self.busy + len(self.queue))
            if answer is None and not self.stopping:
                return heapq.heappushpop(self.queue, job)
            self.busy -= (
                1  # before anybody hears of the end: the next job of the same request does not find this one at work
            )
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            job.get_loop().call_soon_threadsafe(settle, job, *(answer or (None, asyncio.CancelledError())))
        return None


def settle(job: Job[Any], result: Any, error: BaseException | None) -> None:
    if job.done():
        return
    if error is not None:
        job.set_exception(error)
    else:
        job.set_result(result)
