"""The life of a request: `Pipeline.rank`. Knows rankers, state and deadlines, and nothing of HTTP.

Before: `routes.py` (bytes in, RankRequest out). After: `engine.py`, a quantum at a time through `workers.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from slatewise import metrics
from slatewise.bundle.ranker import Ranker
from slatewise.errors import (
    MOST_FAULTS,
    DeadlineExceeded,
    Fault,
    Invalid,
    NotFound,
    OverloadedUndegraded,
    RankingError,
    pointer,
)
from slatewise.inference.arrays import UNKNOWN_ITEM, Candidates, Float32, Float64, History, Int64, KeptState, join
from slatewise.inference.engine import CANDIDATE_CHUNK, HISTORY_CHUNK, Engine, EngineError
from slatewise.inference.workers import Chunks, Job, Workers
from slatewise.metrics import Timings
from slatewise.ranking.history_cache import Entry, HistoryCache
from slatewise.schemas import RankRequest
from slatewise.store.lookup import MetaEmbedding, Store

EXITS = ("dot", "point", "set")
T = TypeVar("T")


@dataclass
class Call:
    """One request on its way: what was asked, and what is known so far."""

    request: RankRequest
    timings: Timings
    ranker: Ranker | None = None
    variant: str | None = None
    rungs: list[tuple[str, Float64]] = field(
        default_factory=list
    )  # the exits that are complete, lowest first: name, (N, heads) probabilities
    history_used: int = 0
    history_dropped: int = 0
    history_unknown: int = 0
    cache: str = "none"
    meta: MetaEmbedding | None = None
    unknown: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    degraded: set[str] = field(default_factory=set)
    best_score: float | None = None  # by the ranker's own head weights; none where the request brought others

    @property
    def exit(self) -> str:
        return self.rungs[-1][0] if self.rungs else "input_order"

    @property
    def probabilities(self) -> Float64 | None:
        return self.rungs[-1][1] if self.rungs else None


class Pipeline:
    """Everything that a request needs, put together in `main.py`."""

    def __init__(
        self,
        rankers: dict[str, Ranker],
        store: Store,
        cache: HistoryCache,
        workers: Workers,
        *,
        max_candidates: int,
        max_history: int,
        max_outstanding_tokens: int,
        default_deadline_ms: float,
        pack_history: bool = False,
    ) -> None:
        self.rankers = rankers
        self.store = store
        self.cache = cache
        self.workers = workers
        self.max_candidates = max_candidates
        self.max_history = max_history
        self.max_outstanding_tokens = max_outstanding_tokens
        self.default_deadline_ms = default_deadline_ms
        self.pack_history = pack_history
        self.outstanding_tokens = 0  # events and candidates of the requests that are admitted and not answered

    async def rank(self, call: Call) -> Call:
        """Fill in a call: the highest exit of the ladder that was asked for and that the deadline and the load allow."""
        request = call.request
        ranker, variant, wanted = self.check(call)
        engine = ranker.engines[variant]
        history, call.history_dropped = ranker.history(request)
        request_time = time.time() if request.request_time is None else request.request_time
        candidates, call.unknown = ranker.candidates(request, request_time, engine.items)
        call.timings.lap("features")
        tokens = len(history) + len(candidates)
        wanted = self.admit(call, wanted, tokens)
        if wanted == "input_order":
            return call
        deadline_ms = request.deadline_ms or self.default_deadline_ms
        remaining = call.timings.entered + deadline_ms / 1e3 - time.perf_counter() if deadline_ms else None
        self.outstanding_tokens += tokens
        try:
            if remaining is not None and remaining <= 0:
                raise TimeoutError
            async with asyncio.timeout(remaining):
                user = request.user if ranker.manifest.meta_size else None
                looking = None if user is None else self.store.look_up(ranker, user)  # begins at once
                state = await self.encode(call, ranker, variant, history)
                call.history_used = len(history)
                call.history_unknown = int(np.count_nonzero(history.items == UNKNOWN_ITEM))
                call.meta = MetaEmbedding(ranker.default_meta, "off") if looking is None else await looking
                call.timings.lap("embed")  # what was waited for it beyond the encoding
                if call.meta.status == "error":
                    call.degraded.add("store_error")
                quanta = run_cascade(
                    engine, candidates, state, call.meta.vector, wanted, remaining is not None, call.rungs
                )
                await self.run(call, "score", quanta)
        except TimeoutError:
            metrics.DEADLINE_EXCEEDED.inc()
            if not request.allow_degraded:
                raise DeadlineExceeded(f"not done within deadline_ms = {deadline_ms:g}") from None
            call.rungs = call.rungs[:]  # a quantum that still runs finds another list
            call.degraded |= {"deadline", "exit"} if call.rungs else {"deadline"}
        except EngineError as error:
            raise RankingError("the model failed on this request") from error
        finally:
            self.outstanding_tokens -= tokens
        return call

    def check(self, call: Call) -> tuple[Ranker, str, str]:
        """Ranker, variant and exit that the request asks for. Raises NotFound, or Invalid with every fault, before any work."""
        request = call.request
        names = self.rankers
        if request.ranker is None and len(names) > 1:
            raise Invalid.at("/ranker", f"must be one of {', '.join(names)}")
        name = request.ranker or next(iter(names))
        if name not in names:
            raise NotFound(f"no such ranker; served: {', '.join(names)}")
        ranker = call.ranker = names[name]
        variant = ranker.default_variant if request.variant == "auto" else request.variant
        if variant not in ranker.engines:
            raise NotFound(f"ranker {name} serves no such variant; served: {', '.join(ranker.engines)}")
        if faults := tuple(islice(self.faults(request, ranker), MOST_FAULTS)):
            raise Invalid("; ".join(f"{fault.pointer}: {fault.detail}" for fault in faults[:3]), faults)
        wanted = ranker.manifest.default_exit if request.exit == "auto" else request.exit
        if wanted == "set" and len(request.candidates.item_ids) > ranker.manifest.limits.set_wise:
            wanted = "point"  # stated in `limits.set_wise`, so no degradation
        call.variant = variant
        return ranker, variant, wanted

    def faults(self, request: RankRequest, ranker: Ranker) -> Iterator[Fault]:
        """What the schema cannot know: counts against limits, columns against each other and names against the bundle."""
        n = len(request.candidates.item_ids)
        events = len(request.history.item_ids)
        if n > self.max_candidates:
            yield Fault("/candidates/item_ids", f"{n} candidates, limit {self.max_candidates}")
        if events > self.max_history:
            yield Fault("/history/item_ids", f"{events} events, limit {self.max_history}")
        for name, column in (("actions", request.history.actions), ("timestamps", request.history.timestamps)):
            if column is not None and len(column) != events:
                yield Fault(f"/history/{name}", f"{len(column)} entries for {events} item_ids")
        known: dict[str, Any] = {"features": ranker.manifest.features, "fields": ranker.manifest.fields}
        for member, columns in (("features", request.candidates.features), ("fields", request.candidates.fields)):
            for name, values in columns.items():
                if name not in known[member]:
                    yield Fault(
                        pointer("candidates", member, name),
                        f"unknown name; known: {', '.join(known[member]) or 'none'}",
                    )
                elif len(values) != n:
                    yield Fault(pointer("candidates", member, name), f"{len(values)} entries for {n} item_ids")
        for name in request.head_weights or ():
            if name not in ranker.manifest.heads:
                yield Fault(pointer("head_weights", name), f"unknown head; known: {', '.join(ranker.manifest.heads)}")
        if request.exit not in ("auto", *ranker.manifest.exits):
            yield Fault("/exit", f"this ranker has: {', '.join(ranker.manifest.exits)}")

    def admit(self, call: Call, wanted: str, tokens: int) -> str:
        """The second door: the exit that the work at hand allows. Raises OverloadedUndegraded. Alone, any request may pass."""
        load = (self.outstanding_tokens + tokens) / self.max_outstanding_tokens
        if load <= 0.5 or not self.outstanding_tokens:
            return wanted
        if load > 1:
            metrics.REJECTED.labels("tokens").inc()
            if not call.request.allow_degraded:
                raise OverloadedUndegraded(f"more than {self.max_outstanding_tokens} events and candidates are at work")
            call.degraded.add("overload")
            return "input_order"
        allowed = "dot" if load > 0.75 else "point"
        if not call.request.allow_degraded or EXITS.index(wanted) <= EXITS.index(allowed):
            return wanted
        call.degraded |= {"overload", "exit"}
        return allowed

    async def run(self, call: Call, stage: str, quanta: Chunks[T]) -> T:
        """The generator's result, from a worker thread; the wait for one counts as `queue`, the rest as its stage."""
        job = self.workers.submit(quanta, call.request.priority)
        try:
            return await job
        finally:
            job.cancel()
            call.timings.lap(stage, job.queued)

    async def encode(self, call: Call, ranker: Ranker, variant: str, history: History) -> KeptState:
        """The state of the history: kept, extended by what is new, or encoded; nothing is kept without a user."""
        engine = ranker.engines[variant]
        request = call.request
        user = call.request.user
        if not len(history):
            return engine.start
        if user is None:
            return await self.run(call, "encode", extend(engine, engine.start, 0, history, False))
        key = (ranker.name, ranker.manifest.version, variant, user)
        entry = self.cache.get(key)
        reused = 0 if entry is None else entry.history.common_prefix(history)
        if entry is not None and reused == len(history) == len(entry.history):
            call.cache = "hit"
            metrics.HISTORY_REUSED.inc(reused)
            return entry.state
        reused = min(reused, len(history) - 1)  # the newest event is always read: its hidden state is the user vector
        base = engine.start if entry is None else entry.state
        call.cache = "extended" if reused else "miss"
        metrics.HISTORY_REUSED.inc(reused)
        job: Job[KeptState] | None = None  # none where another request's is awaited

        def submit() -> Job[KeptState]:
            nonlocal job
            job = self.workers.submit(extend(engine, base, reused, history, self.pack_history), request.priority)
            return job

        try:
            state = await self.cache.once(key, history, submit)
        finally:
            call.timings.lap("encode", 0.0 if job is None else job.queued)
        self.cache.put(key, Entry(history, state))
        return state


def extend(engine: Engine, base: KeptState, reused: int, history: History, pack: bool) -> Chunks[KeptState]:
    """The state of a history whose first `reused` events are those of `base`, a quantum at a time."""
    state = None
    for first in range(reused, len(history), HISTORY_CHUNK):
        chunk = history[first : first + HISTORY_CHUNK]
        alone = yield len(chunk)
        state = engine.extend(
            engine.prefix(base.unpacked(), reused) if state is None else state, chunk, multi_threaded=alone
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
    rungs: list[tuple[str, Float64]],
) -> Chunks[None]:
    """Up the ladder to the exit that is wanted; `rungs` has each that is complete, an answer for a deadline that passes (`insured`: from `dot` on)."""
    n = len(candidates)
    state = None
    if wanted == "dot" or fallback_first:
        yield n
        state = kept.unpacked()
        rungs.append(("dot", engine.dot(candidates, state)))
    if wanted == "dot":
        return
    chunks = []
    for first in range(0, n, CANDIDATE_CHUNK):
        rows = slice(first, min(first + CANDIDATE_CHUNK, n))
        alone = yield rows.stop - rows.start
        state = state or kept.unpacked()
        chunks.append(engine.point(candidates, meta, state, rows, multi_threaded=alone))
    point = join(chunks)
    rungs.append(("point", point.probabilities))
    if wanted == "set":
        alone = yield n
        rungs.append(("set", engine.set(point, multi_threaded=alone)))


def order(call: Call, by_score: bool) -> tuple[Int64, Float64]:
    """Positions of the candidates in the order of the answer, and their scores in that order.

    Sorted by score, ties by input order, cut to `top_n`; or in input order, uncut.
    """
    request = call.request
    n = len(call.request.candidates.item_ids)
    if call.probabilities is None or call.ranker is None:
        scores = (n - np.arange(n)) / n  # first-stage order
    else:
        scores = call.probabilities @ call.ranker.score_weights(request.head_weights)
    if not by_score:
        return np.arange(n), scores
    index = np.argsort(-scores, kind="stable")[: request.top_n]
    return index, scores[index]
