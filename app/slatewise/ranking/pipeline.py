"""The life of one request, from a checked request to a ranking: `Pipeline.rank`. Knows nothing of HTTP.

Called by: `http/rank.py`. Calls: admission, the registry, the history cache, the store, and the engine, whose calls run
in chunks on the threads of `workers.py`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from slatewise import metrics
from slatewise.bundle.features import unknown_positions
from slatewise.bundle.ranker import Ranker
from slatewise.errors import RankingError
from slatewise.inference.arrays import UNKNOWN_ITEM, Candidates, Float32, Float64, History, Int64, KeptState, join
from slatewise.inference.engine import CANDIDATE_CHUNK, HISTORY_CHUNK, Engine, EngineError
from slatewise.inference.workers import Chunks, Job, Workers
from slatewise.ranking.admission import Admission
from slatewise.ranking.history_cache import Entry, HistoryCache
from slatewise.ranking.registry import Registry
from slatewise.ranking.trace import Timings, Trace
from slatewise.ranking.validation import choose
from slatewise.schemas import AnsweredExit, DegradedReason, HistoryUse, ModelExit, RankRequest
from slatewise.store.lookup import MetaEmbedding, Store

T = TypeVar("T")


class StageScores(NamedTuple):
    """Result of one stage of the cascade."""

    exit: ModelExit
    probabilities: Float64  # (N, heads)


@dataclass(frozen=True)
class Scored:
    """Scores of the highest stage of the cascade that was complete in time; candidates are in input order."""

    variant: str
    exit: ModelExit
    probabilities: Float64  # (N, heads)
    scores: Float64  # (N,)


@dataclass(frozen=True)
class Ranking:
    """The result for one request."""

    ranker: Ranker
    scored: Scored | None  # `None`: no model scored the request, and the exit is `input_order`
    unknown: list[int]  # positions of candidates whose id the ranker does not know
    history: HistoryUse
    meta: MetaEmbedding
    degraded: frozenset[DegradedReason]

    @property
    def exit(self) -> AnsweredExit:
        return "input_order" if self.scored is None else self.scored.exit

    def order(self, candidates: int, top_n: int | None) -> Int64:
        """Positions by descending score, at most `top_n`. Equal scores and unscored candidates keep the input order."""
        if self.scored is None:
            return np.arange(candidates)[:top_n]
        return np.argsort(-self.scored.scores, kind="stable")[:top_n]


class Pipeline:
    """Ranks requests. Its parts are opened and closed by `main.py`."""

    def __init__(
        self,
        registry: Registry,
        store: Store,
        cache: HistoryCache,
        workers: Workers,
        admission: Admission,
        *,
        pack_history: bool = False,
    ) -> None:
        self.registry = registry
        self.store = store
        self.cache = cache
        self.workers = workers
        self.admission = admission
        self.pack_history = pack_history

    async def rank(self, request: RankRequest, trace: Trace) -> Ranking:
        """The ranking by the highest exit that the request, the load and the deadline allow.

        Raises NotFound, Invalid, OverloadedUndegraded, DeadlineExceeded, or RankingError if the model fails.
        """
        # Check and admit. Counts suffice, so a request that is turned away costs no array.
        ranker = trace.ranker = self.registry.resolve(request.ranker)
        variant, wanted = choose(request, ranker, self.admission.limits)
        dropped = ranker.window_start(request)
        tokens = len(request.history.item_ids) - dropped + len(request.candidates.item_ids)
        deadline = self.admission.deadline(request.deadline_ms, trace.timings.entered)
        admitted = self.admission.admit(wanted, tokens, deadline, request.allow_degraded)
        user = request.user if ranker.manifest.meta_size else None  # a ranker without a meta block looks nothing up
        meta = MetaEmbedding(ranker.default_meta, "off" if user is None else "default")
        if admitted.exit == "input_order":
            unknown_ids = unknown_positions(ranker.vocabulary.items, request.candidates.item_ids)
            trace.timings.lap("features")
            return Ranking(ranker, None, unknown_ids, HistoryUse(0, dropped, 0, "none"), meta, admitted.degraded)

        # Ids and numbers become arrays
        history, _ = ranker.history(request)
        request_time = time.time() if request.request_time is None else request.request_time
        engine = ranker.engines[variant]
        candidates, unknown = ranker.candidates(request, request_time, engine.items)
        trace.timings.lap("features")

        # Look the user up while the history is encoded, then score the candidates, all until the deadline
        degraded = set(admitted.degraded)
        completed: list[StageScores] = []
        unknown_events = 0
        self.admission.begin_work(tokens)
        try:
            async with deadline.timeout():
                look_up = None if user is None else self.store.look_up(ranker, user)  # starts now
                state = await self.encode(request, ranker, variant, history, trace)
                trace.events = len(history)
                unknown_events = int(np.count_nonzero(history.items == UNKNOWN_ITEM))
                meta = meta if look_up is None else await look_up
                trace.meta = meta.status
                trace.timings.lap("embed")  # the wait that was left after the encoding
                dot_first = deadline.milliseconds > 0
                cascade = run_cascade(engine, candidates, state, meta.vector, admitted.exit, dot_first, completed)
                await self.run(cascade, "score", request.priority, trace.timings)
        except TimeoutError:
            self.admission.deadline_passed(deadline, request.allow_degraded)
            degraded.add("deadline")
        except EngineError as error:
            raise RankingError("the model failed on this request") from error
        finally:
            self.admission.end_work(tokens)
            # Read once: after a timeout, a chunk that is still running may complete another stage.
            best = completed[-1] if completed else None
            if best is not None:
                trace.exit = best.exit
                trace.variant = variant

        if best is not None and "deadline" in degraded:
            degraded.add("exit")
        if meta.status == "error":
            degraded.add("store_error")
        scored = None
        if best is not None:
            scores = best.probabilities @ ranker.score_weights(request.head_weights)
            scored = Scored(variant, best.exit, best.probabilities, scores)
        use = HistoryUse(trace.events, dropped, unknown_events, trace.cache)
        return Ranking(ranker, scored, unknown.tolist(), use, meta, frozenset(degraded))

    async def run(self, chunks: Chunks[T], stage: str, priority: int, timings: Timings) -> T:
        """The return value of the generator, which runs in a worker thread. The wait for a thread counts as `queue`."""
        job = self.workers.submit(chunks, priority)
        try:
            return await job
        finally:
            job.cancel()
            timings.lap(stage, job.queued)

    async def encode(
        self, request: RankRequest, ranker: Ranker, variant: str, history: History, trace: Trace
    ) -> KeptState:
        """The state of the history: from the cache, extended, or encoded anew. Without a user nothing is cached."""
        engine = ranker.engines[variant]
        priority = request.priority
        if not len(history):
            return engine.start
        if request.user is None:
            return await self.run(extend(engine, engine.start, 0, history, False), "encode", priority, trace.timings)
        key = (ranker.name, ranker.manifest.version, variant, request.user)
        reuse = self.cache.find(key, history)
        trace.cache = reuse.result
        metrics.HISTORY_REUSED.inc(reuse.events)
        if reuse.result == "hit" and reuse.state is not None:
            return reuse.state
        base = engine.start if reuse.state is None else reuse.state
        job: Job[KeptState] | None = None  # stays `None` if another request already encodes the same events

        def submit() -> Job[KeptState]:
            nonlocal job
            job = self.workers.submit(extend(engine, base, reuse.events, history, self.pack_history), priority)
            return job

        try:
            state = await self.cache.once(key, history, submit)
        finally:
            trace.timings.lap("encode", 0.0 if job is None else job.queued)
        self.cache.put(key, Entry(history, state))
        return state


def extend(engine: Engine, base: KeptState, reused: int, history: History, pack: bool) -> Chunks[KeptState]:
    """The state of a history whose first `reused` events are in `base`, computed in chunks."""
    state = None
    for first in range(reused, len(history), HISTORY_CHUNK):
        chunk = history[first : first + HISTORY_CHUNK]
        idle = yield len(chunk)
        state = engine.extend(
            engine.prefix(base.unpacked(), reused) if state is None else state, chunk, multi_threaded=idle
        )
        metrics.HISTORY_ENCODED.inc(len(chunk))
    assert state is not None
    return state.packed() if pack else state


def run_cascade(
    engine: Engine,
    candidates: Candidates,
    kept: KeptState,
    meta: Float32,
    wanted: str,
    fallback_first: bool,
    completed: list[StageScores],
) -> Chunks[None]:
    """Compute the exit `wanted` in chunks, and append each complete stage to `completed`, cheapest first.

    If a deadline passes, the caller takes the last complete stage. `fallback_first`: compute `dot` first, so that
    there is one early; otherwise it is skipped unless wanted.
    """
    n = len(candidates)
    state = None
    if wanted == "dot" or fallback_first:
        yield n
        state = kept.unpacked()
        completed.append(StageScores("dot", engine.dot(candidates, state)))
    if wanted == "dot":
        return
    chunks = []
    for first in range(0, n, CANDIDATE_CHUNK):
        rows = slice(first, min(first + CANDIDATE_CHUNK, n))
        idle = yield rows.stop - rows.start
        state = state or kept.unpacked()
        chunks.append(engine.point(candidates, meta, state, rows, multi_threaded=idle))
    point = join(chunks)
    completed.append(StageScores("point", point.probabilities))
    if wanted == "set":
        idle = yield n
        completed.append(StageScores("set", engine.set(point, multi_threaded=idle)))
