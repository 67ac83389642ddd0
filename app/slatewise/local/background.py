"""A pipeline on an event loop of its own thread, for callers without one, or with a running one (a notebook).

Called by: `ranker.py`. Calls: `ranking/pipeline.py`, the constructors of its parts, and `http/rank.py` for the
members of an answer.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from slatewise.bundle.ranker import Ranker
from slatewise.errors import RankingError
from slatewise.http.rank import response_members
from slatewise.inference.workers import Workers
from slatewise.ranking.admission import Admission, RequestLimits
from slatewise.ranking.history_cache import HistoryCache
from slatewise.ranking.pipeline import Pipeline
from slatewise.ranking.registry import Registry
from slatewise.ranking.trace import Trace
from slatewise.schemas import RankRequest, RankResponse
from slatewise.store.lookup import EmbeddedStore

T = TypeVar("T")

# The limits of requests are the server's defaults. Load is no reason to refuse: each caller waits for its own answer.
LIMITS = RequestLimits(
    max_in_flight=1 << 31,
    max_queue_s=float("inf"),
    max_body_bytes=1 << 62,
    body_timeout_s=1.0,
    max_values=2**62,
    max_candidates=4096,
    max_history=4096,
    deadline_ms=0.0,
)


class Background:
    """Runs a pipeline for one ranker until `stop`. `call` may be used by any thread of the process that made it."""

    def __init__(self, ranker: Ranker, threads: int, cache_bytes: int) -> None:
        self.process = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.workers = Workers(threads)
        self.pipeline = Pipeline(
            Registry([ranker]), EmbeddedStore(), HistoryCache(cache_bytes), self.workers, Admission(LIMITS, threads)
        )
        self.lock = threading.Lock()  # nothing is scheduled behind `end`, where it would wait for ever
        self.stopped = False
        self.thread = threading.Thread(target=self.run, name="slatewise-loop", daemon=True)
        self.thread.start()
        self.call(self.workers.__aenter__())

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and return its result. If the caller is interrupted, the work is cancelled.

        Raises RuntimeError after `stop`, and in a forked process: it has no copy of the threads.
        """
        forked = os.getpid() != self.process
        with self.lock:
            if not (self.stopped or forked):
                future = asyncio.run_coroutine_threadsafe(work, self.loop)
            else:
                work.close()
                where = "in a process that forked from its own" if forked else "after close()"
                raise RuntimeError(f"this ranker cannot be used {where}; call slatewise.load again")
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def rank(self, request: RankRequest, by_score: bool, entered: float) -> RankResponse:
        """Rank a request, and return the members that the server would send. Raises RankingError."""
        trace = Trace(entered)
        trace.timings.lap("parse")
        try:
            ranking = await self.pipeline.rank(request, trace)
        except asyncio.CancelledError:
            if not self.stopped:  # the caller was interrupted, and waits no longer
                raise
            raise RankingError("the ranker was closed") from None
        return response_members(request, ranking, by_score, trace.timings)

    def run(self) -> None:
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()

    def stop(self) -> None:
        """Let the threads end, without waiting: the garbage collector may call this in one of them."""
        with self.lock:
            if not self.stopped and os.getpid() == self.process:
                self.stopped = True
                asyncio.run_coroutine_threadsafe(self.end(), self.loop)

    async def end(self) -> None:
        """End the workers. Requests that are not answered yet raise RankingError."""
        await self.workers.__aexit__()
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(rest)
        await self.loop.shutdown_default_executor()
        self.loop.stop()

    def join(self) -> None:
        if os.getpid() == self.process:
            self.thread.join()
