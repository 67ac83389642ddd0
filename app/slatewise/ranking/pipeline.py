"""Ranks one parsed request: `Pipeline.rank`. Knows nothing of HTTP.

Called by: `http/rank.py`, `ahead.py`. Calls: `given.py`, `plan.py`, `admission.py`, `registry.py`,
`history_cache.py`, `store/lookup.py`, and `cascade.py` in chunks on the threads of `inference/workers.py`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from slatewise import metrics
from slatewise.bundle.features import unknown_positions
from slatewise.bundle.ranker import Ranker, Unknown, weighted_mean
from slatewise.errors import RankingError
from slatewise.events.histories import Histories
from slatewise.inference.arrays import (
    UNKNOWN_ITEM,
    Candidates,
    Float32,
    Float64,
    History,
    Int64,
    KeptState,
    PointScores,
)
from slatewise.inference.chunks import Chunks
from slatewise.inference.engine import EngineError
from slatewise.inference.workers import Job, Workers
from slatewise.ranking.admission import Admission
from slatewise.ranking.cascade import StageScores, extend, run_cascade, run_pruned, scored_last
from slatewise.ranking.explain import Ranked, explain
from slatewise.ranking.given import Given, with_history
from slatewise.ranking.history_cache import Entry, HistoryCache, Reuse
from slatewise.ranking.offers import encode_seconds
from slatewise.ranking.plan import Plan, cache_key, make_plan
from slatewise.ranking.registry import Registry
from slatewise.ranking.trace import Timings, Trace
from slatewise.schemas import EXITS, AnsweredExit, DegradedReason, Explanation, HistoryUse, ModelExit, RankRequest
from slatewise.store.lookup import MetaEmbedding, Store

T = TypeVar("T")
FEW = 200  # candidates whose fields are read on the event loop


@dataclass(frozen=True)
class Scored:
    """Scores of the highest stage of the cascade that was complete in time; candidates are in input order."""

    variant: str
    exit: ModelExit
    probabilities: Float64  # (N, heads)
    scores: Float64  # (N,), in [0, 1]
    scored_by: NDArray[np.int8] | None = None  # see `StageScores`

    @property
    def pruned(self) -> dict[ModelExit, int] | None:
        """Numbers of candidates that the exits after `dot` scored; `None`: all."""
        by = self.scored_by
        if by is None:
            return None
        return {exit: int((by >= k).sum()) for k, exit in enumerate(EXITS[: EXITS.index(self.exit) + 1]) if k}

    def by_exit(self) -> NDArray[np.bool_]:
        """Return which candidates `exit` scored: (N,)."""
        return scored_last(self.exit, self.scored_by, len(self.scores))

    def exit_scores(self) -> Float64:
        """Return the scores of these candidates."""
        return self.scores if self.scored_by is None else self.scores[self.by_exit()]


@dataclass(frozen=True)
class Ranking:
    """The result for one request."""

    ranker: Ranker
    candidates: int  # number of candidates
    scored: Scored | None  # `None`: no model scored the request, and the exit is `input_order`
    unknown: tuple[int, ...]  # positions of candidates whose id the ranker does not know
    adapted: tuple[int, ...]  # those of them that have a vector of their own
    unknown_values: dict[str, int]  # field -> number of unknown values that describe these candidates
    history: HistoryUse
    meta: MetaEmbedding
    degraded: frozenset[DegradedReason]
    explanations: list[Explanation] | None = None

    @property
    def exit(self) -> AnsweredExit:
        return "input_order" if self.scored is None else self.scored.exit

    def order(self, top_n: int | None) -> Int64:
        """Return at most `top_n` positions by descending score. Ties and unscored candidates keep the input order.

        If the request was pruned, the candidates of a later exit are before those of the exits before it.
        """
        if self.scored is None:
            return np.arange(self.candidates)[:top_n]
        if self.scored.scored_by is not None:
            return np.lexsort((-self.scored.scores, -self.scored.scored_by))[:top_n]
        return np.argsort(-self.scored.scores, kind="stable")[:top_n]


@dataclass
class Progress:
    """The results of one request so far. A deadline keeps those that are set."""

    history: HistoryUse
    meta: MetaEmbedding | None = None
    completed: list[StageScores] = field(default_factory=list)  # stages of the cascade, cheapest first
    explanations: list[Explanation] | None = None


AfterAnswer = Callable[[RankRequest | None, Ranking | None, Trace, int], None]  # the last one: the status code


class Pipeline:
    """Ranks requests. `main.py` opens and closes its parts."""

    def __init__(
        self,
        registry: Registry,
        store: Store,
        cache: HistoryCache,
        workers: Workers,
        admission: Admission,
        *,
        histories: Histories | None = None,
        pack_history: bool = False,
    ) -> None:
        self.registry = registry
        self.store = store
        self.cache = cache
        self.workers = workers
        self.admission = admission
        self.histories = histories
        self.pack_history = pack_history
        self.after_answer: AfterAnswer | None = None  # `main.py` sets what watches over versions

    async def rank(self, request: RankRequest, trace: Trace, ranker: Ranker | None = None) -> Ranking:
        """Rank by the highest exit that the request, the load and the deadline allow.

        ranker: the version to ask; default: the one that the registry chooses. Raises NotFound, Invalid,
        OverloadedUndegraded, DeadlineExceeded, or RankingError if the model fails.
        """
        if ranker is None:
            ranker = self.registry.choose(request.ranker, request.user, request.id)
        trace.ranker = ranker
        given = await self.with_history(request, ranker, trace.timings)
        request = given.request
        plan = self.plan(given, ranker, trace.timings)
        n = len(request.candidates.item_ids)
        progress = Progress(HistoryUse(0, plan.dropped, 0, 0, 0, "none", given.source))
        degraded = set(plan.degraded)
        if given.fault:
            degraded.add("store_error")
        if plan.exit == "input_order":
            return unranked(plan, n, progress, degraded, trace.timings)

        history, late, unknown_actions = ranker.read_history(request)
        progress.history = replace(progress.history, reordered=late, unknown_actions=unknown_actions)
        try:
            candidates, unknown = await self.candidates(plan, trace.timings)
        except TimeoutError:
            self.admission.on_deadline(plan.deadline, request.allow_degraded)
            return unranked(plan, n, progress, degraded | {"deadline"}, trace.timings)
        trace.timings.lap("features")
        try:
            await self.score_until_deadline(plan, history, candidates, progress, trace.timings)
        except TimeoutError:
            self.admission.on_deadline(plan.deadline, request.allow_degraded)
            degraded.add("deadline")
        except EngineError as error:
            raise RankingError("the model failed on this request") from error
        finally:
            # Read once: after a timeout, a chunk that is still running may complete another stage.
            best = progress.completed[-1] if progress.completed else None
            trace.history = progress.history
            trace.meta = None if progress.meta is None else progress.meta.status
            if best is not None:
                trace.exit = best.exit
                trace.variant = plan.variant

        meta = progress.meta or plan.default_meta
        if best is not None and "deadline" in degraded and best.exit != plan.exit:
            degraded.add("exit")
        if request.explain and progress.explanations is None:
            degraded.add("explanations")
        if meta.status == "error":
            degraded.add("store_error")
        scored = None if best is None else weigh(plan, best)
        new = tuple(unknown.positions.tolist()), tuple(unknown.adapted.tolist()), unknown.field_values
        reasons = frozenset(degraded)
        return Ranking(ranker, n, scored, *new, progress.history, meta, reasons, progress.explanations)

    async def with_history(self, request: RankRequest, ranker: Ranker, timings: Timings) -> Given:
        """As `given.with_history`, with the parts of this pipeline."""
        return await with_history(request, ranker, timings, self.histories, self.store, self.admission)

    def plan(self, given: Given, ranker: Ranker, timings: Timings) -> Plan:
        """As `plan.make_plan`, with the parts of this pipeline."""
        return make_plan(given, ranker, timings, self.admission, self.cache)

    async def candidates(self, plan: Plan, timings: Timings) -> tuple[Candidates, Unknown]:
        """Make the arrays of the candidates: those of many with fields in a worker thread. Raises TimeoutError."""
        request = plan.request
        at = time.time() if request.request_time is None else request.request_time
        make = partial(plan.ranker.candidates, request, at, plan.engine.items, self.store.new_items(plan.ranker))
        count = len(request.candidates.item_ids)
        if count <= FEW or not request.candidates.fields:
            return make()
        async with plan.deadline.timeout():
            return await self.run(plan, in_one_chunk(count, make), "features", timings)

    async def score_until_deadline(
        self, plan: Plan, history: History, candidates: Candidates, progress: Progress, timings: Timings
    ) -> None:
        """Look the user up while the history is encoded, then score the candidates. Each result goes to `progress`.

        Raises TimeoutError or EngineError.
        """
        self.admission.begin_work(plan.running)
        try:
            async with plan.deadline.timeout():
                look_up = self.begin_look_up(plan)
                reuse = self.find_cached(plan, history)
                progress.history = replace(progress.history, cache=reuse.result)
                expected = encode_seconds(plan.engine, len(history), reuse.events) + plan.score_seconds
                plan.running.expect(expected)
                state = await self.encode(plan, history, reuse, timings)
                plan.running.expect(plan.score_seconds)
                unknown = int(np.count_nonzero(history.items == UNKNOWN_ITEM))
                progress.history = replace(progress.history, used=len(history), unknown=unknown)
                meta = plan.default_meta if look_up is None else await look_up
                progress.meta = meta
                timings.lap("embed")  # the rest of the look-up, after the encoding
                cascade = cascade_of(plan, candidates, state, meta.vector, progress.completed)
                point = await self.run(plan, cascade, "score", timings)
                if plan.explain:
                    best = progress.completed[-1]
                    ranked = Ranked(
                        plan.ranker, plan.engine, plan.request, history, candidates, state, meta.vector, point, *best
                    )
                    progress.explanations = await self.run(plan, explain(ranked), "score", timings)
                metrics.PREDICTION.observe(plan.running.ran / expected)
        finally:
            self.admission.end_work(plan.running)

    def begin_look_up(self, plan: Plan) -> Awaitable[MetaEmbedding] | None:
        """Start to look the user up, unless that was done with the stored history."""
        user = plan.meta_user
        return plan.given.look_up or (None if user is None else self.store.look_up(plan.ranker, user))

    async def run(self, plan: Plan, chunks: Chunks[T], stage: str, timings: Timings) -> T:
        """Run the generator in a worker thread and return its value. The wait for a thread counts as `queue`."""
        job = self.submit(plan, chunks)
        try:
            return await job
        finally:
            job.cancel()
            plan.running.end_job()
            timings.lap(stage, job.queued)

    def submit(self, plan: Plan, chunks: Chunks[T]) -> Job[T]:
        job = plan.running.job = self.workers.submit(chunks, plan.request.priority)
        return job

    def find_cached(self, plan: Plan, history: History) -> Reuse:
        """Find the cached state to reuse. Without a user nothing is cached, and an empty history needs no cache."""
        if plan.request.user is None or not len(history):
            return Reuse("none", 0, None)
        reuse = self.cache.find(plan.cache_key, history)
        metrics.HISTORY_REUSED.inc(reuse.events)
        return reuse

    async def encode(self, plan: Plan, history: History, reuse: Reuse, timings: Timings) -> KeptState:
        """Return the state of the history: the cached one, the cached one extended, or a new one."""
        engine = plan.engine
        if not len(history):
            return engine.start
        if reuse.result == "none":
            return await self.run(plan, extend(engine, engine.start, 0, history, False), "encode", timings)
        if reuse.result == "hit" and reuse.state is not None:
            return reuse.state
        base = engine.start if reuse.state is None else reuse.state
        deletions = self.cache.deletions
        job: Job[KeptState] | None = None  # stays `None` if another request already encodes the same events

        def submit() -> Job[KeptState]:
            nonlocal job
            job = self.submit(plan, extend(engine, base, reuse.events, history, self.pack_history))
            return job

        try:
            state = await self.cache.once(plan.cache_key, history, submit)
        finally:
            plan.running.end_job()
            timings.lap("encode", 0.0 if job is None else job.queued)
        if deletions == self.cache.deletions:
            self.cache.put(plan.cache_key, Entry(history, state))
        return state

    def forget(self, user: str | None) -> None:
        """Drop the kept states of a deleted user, or with `None` those of all users."""
        keys = [cache_key(ranker, variant, user) for ranker in self.registry.loaded() for variant in ranker.engines]
        self.cache.forget(None if user is None else keys)


def cascade_of(
    plan: Plan, candidates: Candidates, state: KeptState, meta: Float32, completed: list[StageScores]
) -> Chunks[PointScores | None]:
    """Return the chunks of work that score the candidates. Each complete stage is appended to `completed`."""
    engine = plan.engine
    if plan.request.explore:
        yield 1  # the draw runs in the thread of a worker too
        engine = engine.exploring(plan.request.id or "", plan.request.explore)
    if plan.pruned is None:
        dot_first = plan.deadline.milliseconds > 0
        return (yield from run_cascade(engine, candidates, state, meta, plan.exit, dot_first, completed))
    weights = plan.ranker.score_weights(plan.request.head_weights)
    return (yield from run_pruned(engine, candidates, state, meta, plan.pruned, weights, completed))


def in_one_chunk(cost: int, function: Callable[[], T]) -> Chunks[T]:
    yield cost
    return function()


def unranked(plan: Plan, count: int, progress: Progress, degraded: set[DegradedReason], timings: Timings) -> Ranking:
    """Return the ranking in input order."""
    ids = plan.request.candidates.item_ids
    unknown = tuple(unknown_positions(plan.ranker.vocabulary.items, ids))
    timings.lap("features")
    reasons = frozenset(degraded)
    return Ranking(plan.ranker, count, None, unknown, (), {}, progress.history, plan.default_meta, reasons)


def weigh(plan: Plan, best: StageScores) -> Scored:
    """Combine the probabilities of the heads into one score for each candidate."""
    weights = plan.ranker.score_weights(plan.request.head_weights)
    scores = weighted_mean(best.probabilities, weights)
    return Scored(plan.variant, best.exit, best.probabilities, scores, best.scored_by)
