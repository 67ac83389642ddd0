"""Threads that run the model, a quantum at a time.

A quantum is one call of one graph, bounded in size (engine.HISTORY_QUANTUM, engine.CANDIDATE_QUANTUM), and the unit of
scheduling and cancellation: the queue is served in the order of priority, then arrival, so a large request takes turns
with the small ones, and what nobody waits for any more is not run. Knows callables, nothing of ranking.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass(order=True)
class Job:
    priority: int
    number: int
    call: Callable[[], Any] = field(compare=False)
    future: asyncio.Future[Any] = field(compare=False)
    loop: asyncio.AbstractEventLoop = field(compare=False)
    queued_at: float = field(compare=False)


class Workers:
    """`async with Workers(threads)`; at the end queued jobs are cancelled and running ones waited for."""

    def __init__(self, threads: int) -> None:
        self.queue: list[Job] = []
        self.number = 0
        self.stopping = False
        self.changed = threading.Condition()
        self.threads = [threading.Thread(target=self.work, name=f"slatewise-{k}", daemon=True) for k in range(threads)]

    async def __aenter__(self) -> Workers:
        for thread in self.threads:
            thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        with self.changed:
            self.stopping = True
            for job in self.queue:
                job.future.cancel()
            self.queue.clear()
            self.changed.notify_all()
        for thread in self.threads:
            await asyncio.to_thread(thread.join)

    async def run(self, call: Callable[[], Result], priority: int = 0) -> tuple[Result, float]:
        """The result of `call`, run in a worker thread, and the seconds it waited for one.

        Raises what it raises. A caller that is cancelled while its job waits takes the job out of the queue.
        """
        loop = asyncio.get_running_loop()
        job = Job(priority, 0, call, loop.create_future(), loop, time.perf_counter())
        with self.changed:
            if self.stopping:
                raise asyncio.CancelledError
            self.number += 1
            job.number = self.number
            heapq.heappush(self.queue, job)
            self.changed.notify()
        try:
            result: tuple[Result, float] = await job.future
        finally:
            if job.future.cancelled():
                self.forget(job)
        return result

    def forget(self, job: Job) -> None:
        with self.changed:
            if job in self.queue:
                self.queue.remove(job)
                heapq.heapify(self.queue)

    def work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.queue or self.stopping)
                if self.stopping:
                    return
                job = heapq.heappop(self.queue)
            waited = time.perf_counter() - job.queued_at
            try:
                answer: tuple[Any, BaseException | None] = ((job.call(), waited), None)
            except BaseException as error:  # every accepted call is answered, with what it raised if need be
                answer = (None, error)
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                job.loop.call_soon_threadsafe(settle, job.future, *answer)
            del job, answer  # an idle thread keeps no request alive


def settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if isinstance(error, StopIteration):  # a future refuses it
        future.set_exception(RuntimeError(f"a job raised {error!r}"))
    elif error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
