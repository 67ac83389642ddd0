"""Threads that run the model, one chunk of a job at a time, with start-time fair queueing.

A job is a generator that computes one chunk after each `yield`. The `yield` gives the cost of this chunk, in rows
through the model. The size of a chunk is bounded (`engine.HISTORY_CHUNK`, `engine.CANDIDATE_CHUNK`). A job can be
interrupted or cancelled only between two chunks. A thread continues with its job unless a queued job comes first.

Jobs are ordered by virtual time (start-time fair queueing; Goyal, Vin and Cheng 1996). The virtual time of a job
advances by the cost of each of its chunks, and the job with the smallest virtual time is next, so large and small
requests get equal numbers of rows. A new job starts at the virtual time of the system, which advances by the cost of
each chunk divided by the number of jobs (as in WF2Q+; Bennett and Zhang 1997). So a stream of small jobs cannot starve
a large one.

A level of priority counts as PRIORITY_ROWS rows of virtual time. So an important job comes first, and every job ages:
one that waits is overtaken for a bounded time only, whatever the priorities of those that arrive later.

A job that is cancelled while it waits leaves the queue at once, and no further chunk of a cancelled job runs. The time
of the chunk that it may be in is counted: nobody waits for the result.

Called by: `ranking/pipeline.py`, `ranking/history_cache.py`; `main.py` opens the threads. Calls: the generators, which
call `engine.py`; `metrics.py`.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
import time
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from slatewise import metrics
from slatewise.inference.chunks import Chunks, Result

JOIN_SECONDS = 1.5  # for the running chunks, at the end
PRIORITY_ROWS = 64  # of virtual time, by which a level of priority is ahead of the next one


class Job(asyncio.Future[Result]):
    """A future for the return value or the exception of a generator. After cancellation no further chunk runs."""

    def __init__(self, chunks: Chunks[Result], priority: int, virtual_start: float, number: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.priority = priority
        self.number = number
        self.virtual_start = virtual_start  # virtual time at which the next chunk starts, in rows
        self.cost = 0  # cost of the next chunk, in rows
        self.queued_at: float | None = time.perf_counter()  # `None` while a chunk runs
        self.waited = 0.0
        self.begun_at: float | None = None  # of the chunk that runs
        self.run_before = 0.0  # seconds of the chunks before

    def __lt__(self, other: Job[Any]) -> bool:
        """Return whether this job comes before the other one in the queue."""
        return self.place < other.place

    @property
    def place(self) -> tuple[float, int]:
        return self.virtual_start + PRIORITY_ROWS * self.priority, self.number

    @property
    def queued(self) -> float:
        """Seconds that the job has spent in the queue so far."""
        since = self.queued_at
        return self.waited + (0.0 if since is None else time.perf_counter() - since)

    @property
    def ran(self) -> float:
        """Seconds that the job has run so far."""
        since = self.begun_at
        return self.run_before + (0.0 if since is None else time.perf_counter() - since)

    def run_chunk(self) -> None:
        """Run the next chunk. Raises StopIteration, with the result, after the last one."""
        self.waited = self.queued
        self.queued_at = None
        self.virtual_start += self.cost
        begin = self.begun_at = time.perf_counter()
        try:
            self.cost = next(self.chunks)
        finally:
            now = time.perf_counter()
            self.begun_at = None
            self.run_before += now - begin
        self.queued_at = now


class Workers:
    """`async with Workers(threads)`. On exit queued jobs are cancelled and running chunks are awaited."""

    def __init__(self, threads: int) -> None:
        self.queue: list[Job[Any]] = []
        self.lock = threading.Lock()
        self.tickets: SimpleQueue[None] = SimpleQueue()  # at least one for each queued job; `get` waits in C
        self.number = 0
        self.busy = 0  # threads that have a job
        self.virtual_time = 0.0  # rows that each present job would have received if all were served at once
        self.stopping = False
        self.threads = [threading.Thread(target=self.work, name=f"slatewise-{k}", daemon=True) for k in range(threads)]

    async def __aenter__(self) -> Workers:
        for thread in self.threads:
            thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()
        end = time.monotonic() + JOIN_SECONDS
        for thread in self.threads:  # they are daemons: a chunk that never ends does not keep the process
            await asyncio.to_thread(thread.join, max(0.0, end - time.monotonic()))

    def stop(self) -> None:
        """Cancel the queued jobs. A running job is cancelled behind its chunk, and a later one at once."""
        with self.lock:
            self.stopping = True
            for job in self.queue:
                job.cancel()
            self.queue.clear()
        for _thread in self.threads:
            self.tickets.put(None)

    def submit(self, chunks: Chunks[Result], priority: int = 0) -> Job[Result]:
        """Queue a generator as a job; lower priorities come first.

        The code before the first `yield` runs in the caller's thread, so it must be short.
        """
        with self.lock:
            self.number += 1
            job = Job(chunks, priority, self.virtual_time, self.number)
            if self.stopping:
                job.cancel()
                return job
            try:
                job.cost = next(chunks)
            except StopIteration as end:  # it has no chunks
                job.set_result(end.value)
                return job
            heapq.heappush(self.queue, job)
        self.tickets.put(None)
        job.add_done_callback(self.withdraw)
        return job

    def withdraw(self, job: asyncio.Future[Any]) -> None:
        """Remove a job that was cancelled from the queue. Its ticket stays, and the thread that takes it goes on."""
        if not job.cancelled():
            return
        with self.lock:
            if job not in self.queue:
                return
            self.queue.remove(job)
            heapq.heapify(self.queue)
        with suppress(Exception):  # the caller is gone
            job.chunks.close()

    def work(self) -> None:
        """Run jobs until the workers close: the main function of each thread."""
        while True:
            self.tickets.get()
            with self.lock:
                if self.stopping:
                    return
                if not self.queue:  # the job of this ticket was cancelled
                    continue
                job: Job[Any] | None = heapq.heappop(self.queue)
                self.busy += 1
            while job is not None:
                job = self.take_turn(job)  # `None` at the end, so that an idle thread keeps no request in memory

    def take_turn(self, job: Job[Any]) -> Job[Any] | None:
        """Run one chunk of a job. Return the job to continue with, or `None` if the job ended."""
        if job.cancelled():
            with suppress(Exception):  # the caller is gone
                job.chunks.close()
            with self.lock:
                self.busy -= 1
            return None
        virtual_start = job.virtual_start
        cost = job.cost
        begin = time.perf_counter()
        answer: tuple[Any, BaseException | None] | None = None
        try:
            job.run_chunk()
        except StopIteration as end:
            answer = (end.value, None)
        except BaseException as error:  # every accepted job is settled, whatever it raises
            answer = (None, error)
        with self.lock:
            if job.cancelled():
                metrics.DEAD_SECONDS.inc(time.perf_counter() - begin)
            self.virtual_time = max(self.virtual_time, virtual_start) + cost / (self.busy + len(self.queue))
            if answer is None and not self.stopping:
                return heapq.heappushpop(self.queue, job)
            # before the result is set: the next job of the same request must not find this thread busy
            self.busy -= 1
        with suppress(RuntimeError):  # the loop is closed
            job.get_loop().call_soon_threadsafe(settle, job, *(answer or (None, asyncio.CancelledError())))
        return None


def settle(job: Job[Any], result: Any, error: BaseException | None) -> None:
    if job.done():
        return
    if error is not None:
        job.set_exception(error)
    else:
        job.set_result(result)
