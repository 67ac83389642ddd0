"""Threads that run the model, one chunk of a job at a time, with start-time fair queueing.

A job is a generator that computes one chunk after each `yield`. The `yield` gives the cost of this chunk, in rows
through the model. The size of a chunk is bounded (`engine.HISTORY_CHUNK`, `engine.CANDIDATE_CHUNK`). A job can be
interrupted or cancelled only between two chunks. A thread continues with its job unless a queued job comes first.

A job may have work with independent parts (`chunks.run_parts`). If other threads are idle at that time, each of them
takes a part; otherwise the job goes on alone. A job of low priority (above 0) always goes on alone, and leaves the
threads to others. Each part pays the cost of all, so a job gets one share of the threads, divided or not.

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
from slatewise.inference.chunks import Chunks, Result, Split

JOIN_SECONDS = 1.5  # for the running chunks, at the end
PRIORITY_ROWS = 64  # of virtual time, by which a level of priority is ahead of the next one


class Task:
    """A generator that runs chunk by chunk: a job, or a part of a job."""

    def __init__(self, chunks: Chunks[Any], priority: int, virtual_start: float, number: int, shares: int) -> None:
        self.chunks = chunks
        self.priority = priority
        self.number = number
        self.virtual_start = virtual_start  # virtual time at which the next chunk starts, in rows
        self.cost = 0  # cost of the next chunk, in rows
        self.shares = shares  # parts of the job: each pays for all, so the job as a whole gets one share of the threads
        self.split: Split | None = None  # the generator asks for parts, in place of the next chunk

    def __lt__(self, other: Task) -> bool:
        """Return whether this task comes before the other one in the queue."""
        return self.place < other.place

    @property
    def place(self) -> tuple[float, int]:
        return self.virtual_start + PRIORITY_ROWS * self.priority, self.number

    def advance(self, answer: list[Any] | None = None) -> None:
        """Run the generator up to its next `yield`. Raises StopIteration, with the result, after the last one."""
        found = self.chunks.send(answer)
        self.split = found if isinstance(found, Split) else None
        self.cost = 0 if isinstance(found, Split) else found * self.shares


class Job(asyncio.Future[Result], Task):
    """A future for the return value or the exception of a generator. After cancellation no further chunk runs."""

    def __init__(self, chunks: Chunks[Result], priority: int, virtual_start: float, number: int) -> None:
        asyncio.Future.__init__(self)
        Task.__init__(self, chunks, priority, virtual_start, number, shares=1)
        self.queued_at: float | None = time.perf_counter()  # `None` while a chunk or the parts run
        self.waited = 0.0
        self.begun_at: float | None = None  # of the chunk that runs
        self.run_before = 0.0  # seconds of the chunks before
        self.results: list[Any] | None = None  # of the parts
        self.missing = 0  # parts that have not ended
        self.failure: BaseException | None = None  # of a part

    @property
    def queued(self) -> float:
        """Seconds that the job has spent in the queue so far. A wait of its parts does not count."""
        since = self.queued_at
        return self.waited + (0.0 if since is None else time.perf_counter() - since)

    @property
    def ran(self) -> float:
        """Seconds that the job has run so far, those of its parts added up as soon as they end."""
        since = self.begun_at
        return self.run_before + (0.0 if since is None else time.perf_counter() - since)

    def run_chunk(self) -> None:
        """Run the next chunk. Raises StopIteration, with the result, after the last one."""
        self.waited = self.queued
        self.queued_at = None
        self.virtual_start += self.cost
        begin = self.begun_at = time.perf_counter()
        try:
            if self.failure is not None:
                self.chunks.throw(self.failure)
            answer, self.results = self.results, None
            self.advance(answer)
        finally:
            now = time.perf_counter()
            self.begun_at = None
            self.run_before += now - begin
        self.queued_at = now

    def divide(self, threads: int) -> list[Part]:
        """Divide the work that the generator asks to divide into at most `threads` parts, if it can be divided."""
        assert self.split is not None
        parts = self.split.parts(threads)
        if len(parts) < 2:
            return []
        self.waited = self.queued
        self.queued_at = None
        self.missing = len(parts)
        self.results = [None] * len(parts)
        return [Part(self, k, chunks, len(parts)) for k, chunks in enumerate(parts)]


class Part(Task):
    """A part of a job, which runs while other parts of it run in other threads."""

    def __init__(self, job: Job[Any], index: int, chunks: Chunks[Any], shares: int) -> None:
        super().__init__(chunks, job.priority, job.virtual_start, job.number, shares)
        self.job = job
        self.index = index
        self.ran = 0.0  # seconds

    def run_chunk(self) -> None:
        self.virtual_start += self.cost
        begin = time.perf_counter()
        try:
            self.advance()
        finally:
            self.ran += time.perf_counter() - begin

    def end(self, result: Any, error: BaseException | None) -> bool:
        """Give the job the result of this part. Return whether it was the last one."""
        job = self.job
        assert job.results is not None
        job.results[self.index] = result
        job.failure = job.failure or error
        job.run_before += self.ran
        job.virtual_start = max(job.virtual_start, self.virtual_start)
        job.missing -= 1
        if job.missing == 0:
            job.split = None
            job.queued_at = time.perf_counter()
        return job.missing == 0


def job_of(task: Job[Any] | Part) -> Job[Any]:
    return task.job if isinstance(task, Part) else task


class Workers:
    """`async with Workers(threads)`. On exit queued jobs are cancelled and running chunks are awaited."""

    def __init__(self, threads: int) -> None:
        self.queue: list[Job[Any] | Part] = []
        self.lock = threading.Lock()
        self.tickets: SimpleQueue[None] = SimpleQueue()  # at least one for each queued task; `get` waits in C
        self.number = 0
        self.busy = 0  # threads that have a task
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
            for task in self.queue:
                if isinstance(task, Part):
                    task.job.missing -= 1
                job_of(task).cancel()
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
                job.advance()
            except StopIteration as end:  # it has no chunks
                job.set_result(end.value)
                return job
            heapq.heappush(self.queue, job)
        self.tickets.put(None)
        job.add_done_callback(self.withdraw)
        return job

    def withdraw(self, job: asyncio.Future[Any]) -> None:
        """Remove a job that was cancelled from the queue, and its parts.

        Their tickets stay, and the threads that take them go on. What runs ends behind its chunk.
        """
        assert isinstance(job, Job)
        if not job.cancelled():
            return
        with self.lock:
            mine = [task for task in self.queue if job_of(task) is job]
            if not mine:
                return
            self.queue = [task for task in self.queue if job_of(task) is not job]
            heapq.heapify(self.queue)
            job.missing = max(0, job.missing - len(mine))
            if job.missing:
                mine = [task for task in mine if task is not job]
            elif job not in mine:
                mine.append(job)
        for task in mine:
            close(task)

    def work(self) -> None:
        """Run jobs until the workers close: the main function of each thread."""
        while True:
            self.tickets.get()
            with self.lock:
                if self.stopping:
                    return
                if not self.queue:  # the task of this ticket was cancelled
                    continue
                task: Job[Any] | Part | None = heapq.heappop(self.queue)
                self.busy += 1
            while task is not None:
                task = self.take_turn(task)  # `None` at the end, so that an idle thread keeps no request in memory

    def take_turn(self, task: Job[Any] | Part) -> Job[Any] | Part | None:
        """Run one chunk. Return the task to continue with, or `None` if the thread has no more."""
        if job_of(task).cancelled():
            self.drop(task)
            return None
        if isinstance(task, Job) and task.split is not None and (part := self.divide(task)) is not None:
            return part
        virtual_start = task.virtual_start
        cost = task.cost
        begin = time.perf_counter()
        answer: tuple[Any, BaseException | None] | None = None
        try:
            task.run_chunk()
        except StopIteration as end:
            answer = (end.value, None)
        except BaseException as error:  # every accepted job is settled, whatever it raises
            answer = (None, error)
        with self.lock:
            if job_of(task).cancelled():
                metrics.DEAD_SECONDS.inc(time.perf_counter() - begin)
            self.virtual_time = max(self.virtual_time, virtual_start) + cost / (self.busy + len(self.queue))
            if answer is None and not self.stopping:
                return heapq.heappushpop(self.queue, task)
            answer = answer or (None, asyncio.CancelledError())
            if isinstance(task, Part) and task.end(*answer):
                return heapq.heappushpop(self.queue, task.job)
            # before the result is set: the next job of the same request must not find this thread busy
            self.busy -= 1
        if isinstance(task, Job):
            with suppress(RuntimeError):  # the loop is closed
                task.get_loop().call_soon_threadsafe(settle, task, *answer)
        return None

    def divide(self, job: Job[Any]) -> Part | None:
        """Divide a job among this thread and those that are idle. Return the part that this thread runs.

        `None` if no thread is idle, for a low priority, or if the work is not worth it: the job then does it itself.
        """
        with self.lock:
            idle = 0 if self.stopping or job.priority > 0 else len(self.threads) - self.busy - len(self.queue)
            parts = job.divide(idle + 1) if idle > 0 else []
            for part in parts[1:]:
                heapq.heappush(self.queue, part)
                self.tickets.put(None)
        return parts[0] if parts else None

    def drop(self, task: Job[Any] | Part) -> None:
        """Leave a cancelled job behind: close this task, and behind the last part the job itself."""
        close(task)
        with self.lock:
            last = isinstance(task, Part) and task.end(None, None)
            self.busy -= 1
        if last:
            close(job_of(task))


def close(task: Job[Any] | Part) -> None:
    with suppress(Exception):  # the caller is gone
        task.chunks.close()


def settle(job: Job[Any], result: Any, error: BaseException | None) -> None:
    if job.done():
        return
    if error is not None:
        job.set_exception(error)
    else:
        job.set_result(result)
