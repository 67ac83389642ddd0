"""The life of a request: `Pipeline.rank`. Knows rankers, state and deadlines, and nothing of HTTP.

Before: `routes.py` (bytes in, RankRequest out). After: `engine.py`, a quantum at a time through `workers.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from app import metrics
from app.bundle import Ranker
from app.engine import CANDIDATE_QUANTUM, HISTORY_QUANTUM, Candidates, Engine, EngineError, History, HistoryState, join
from app.errors import MOST_FAULTS, DeadlineExceeded, Fault, Invalid, NotFound, OverloadedUndegraded, RankingError, pointer
from app.features import UNKNOWN_ITEM, Float32, Float64, Int64
from app.history_cache import Entry, HistoryCache
from app.meta_embeddings import MetaEmbedding, Store
from app.metrics import Timings
from app.schemas import RankRequest
from app.workers import Workers

LADDER = ("dot", "point", "set")


@dataclass
class Call:
    """One request on its way: what was asked, and what is known so far."""

    request: RankRequest
    entered: float  # time.perf_counter()
    timings: Timings = field(default_factory=Timings)
    ranker: Ranker | None = None
    variant: str | None = None
    exit: str = "input_order"  # of the scores below: the highest rung that is complete
    probabilities: Float64 | None = None  # (N, heads)
    history_used: int = 0
    history_dropped: int = 0
    history_unknown: int = 0
    cache: str = "none"
    meta: MetaEmbedding | None = None
    unknown: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    degraded: set[str] = field(default_factory=set)

    @property
    def user(self) -> str | None:
        return None if self.request.user is None else str(self.request.user)


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
    ) -> None:
        self.rankers, self.store, self.cache, self.workers = rankers, store, cache, workers
        self.max_candidates, self.max_history = max_candidates, max_history
        self.max_outstanding_tokens, self.default_deadline_ms = max_outstanding_tokens, default_deadline_ms
        self.outstanding_tokens = 0  # events and candidates of the requests that are admitted and not answered

    async def rank(self, call: Call) -> Call:
        """Fill in a call: the highest exit of the ladder that was asked for and that the deadline and the load allow."""
        request = call.request
        ranker, variant, wanted = self.check(call)
        engine = ranker.engines[variant]
        with call.timings.stage("features"):
            history, call.history_dropped = ranker.history(request)
            candidates, call.unknown = ranker.candidates(request, time.time() if request.request_time is None else request.request_time)
        tokens = len(history) + len(candidates)
        wanted = self.admit(call, wanted, tokens)
        if wanted == "input_order":
            return call
        deadline_ms = request.deadline_ms or self.default_deadline_ms
        deadline = call.entered + deadline_ms / 1e3 if deadline_ms else None
        self.outstanding_tokens += tokens
        try:
            if deadline is not None and time.perf_counter() >= deadline:
                raise TimeoutError
            async with asyncio.timeout(None if deadline is None else deadline - time.perf_counter()):
                looking = asyncio.ensure_future(self.look_up(ranker, call.user))
                try:
                    state = await self.encode(call, ranker, variant, history)
                    call.history_used, call.history_unknown = len(history), int((history.items == UNKNOWN_ITEM).sum())
                    with call.timings.stage("embed"):  # the time waited for it beyond the encoding
                        call.meta = await looking
                finally:
                    looking.cancel()
                if call.meta.status == "error":
                    call.degraded.add("store_error")
                await self.climb(call, engine, candidates, state, call.meta.vector, wanted, insured=deadline is not None)
        except TimeoutError:
            metrics.DEADLINE_EXCEEDED.inc()
            if not request.allow_degraded:
                raise DeadlineExceeded(f"not done within deadline_ms = {deadline_ms:g}") from None
            call.degraded.add("deadline")
            if call.probabilities is not None:
                call.degraded.add("exit")
        except EngineError as error:
            raise RankingError("the model failed on this request") from error
        finally:
            self.outstanding_tokens -= tokens
        return call

    def check(self, call: Call) -> tuple[Ranker, str, str]:
        """Ranker, variant and exit that the request asks for. Raises NotFound, or Invalid with every fault, before any work."""
        request, names = call.request, self.rankers
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
        n, events = len(request.candidates.item_ids), len(request.history.item_ids)
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
                    yield Fault(pointer("candidates", member, name), f"unknown name; known: {', '.join(known[member]) or 'none'}")
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
        if not call.request.allow_degraded or LADDER.index(wanted) <= LADDER.index(allowed):
            return wanted
        call.degraded |= {"overload", "exit"}
        return allowed

    async def look_up(self, ranker: Ranker, user: str | None) -> MetaEmbedding:
        if user is None:
            return MetaEmbedding(ranker.default_meta, "off")
        return await self.store.look_up(ranker, user)

    async def run(self, call: Call, stage: str, work: Callable[[], Any]) -> Any:
        """One quantum in a worker thread: the wait counts as `queue`, the rest as its stage."""
        begin = time.perf_counter()
        result, waited = await self.workers.run(work, call.request.priority)
        call.timings.add("queue", waited)
        call.timings.add(stage, time.perf_counter() - begin - waited)
        return result

    async def encode(self, call: Call, ranker: Ranker, variant: str, history: History) -> HistoryState:
        """The state of the history: kept, extended by what is new, or encoded; nothing is kept without a user."""
        engine = ranker.engines[variant]
        if not len(history):
            return engine.start
        if call.user is None:
            return await self.extend(call, engine, engine.start, history)
        key = (ranker.name, ranker.manifest.version, variant, call.user)
        entry = self.cache.get(key)
        reused = 0 if entry is None else entry.history.common_prefix(history)
        if entry is not None and entry.history.equals(history):
            call.cache = "hit"
            metrics.HISTORY_REUSED.inc(reused)
            return entry.state
        reused = min(reused, len(history) - 1)  # the newest event is always read: its hidden state is the user vector
        base = engine.start if entry is None else engine.prefix(entry.state, reused)
        call.cache = "extended" if reused else "miss"
        metrics.HISTORY_REUSED.inc(reused)
        rest = History(history.items[reused:], history.actions[reused:], history.gaps[reused:])
        begin = time.perf_counter()
        state, led = await self.cache.once(key, history, lambda: self.extend(call, engine, base, rest))
        if not led:  # waited for the same encoding of another request
            call.timings.add("encode", time.perf_counter() - begin)
        self.cache.put(key, Entry(history, state))
        return state

    async def extend(self, call: Call, engine: Engine, state: HistoryState, events: History) -> HistoryState:
        for first in range(0, len(events), HISTORY_QUANTUM):
            rows = slice(first, first + HISTORY_QUANTUM)
            chunk = History(events.items[rows], events.actions[rows], events.gaps[rows])
            state = await self.run(call, "encode", partial(engine.extend, state, chunk))
            metrics.HISTORY_ENCODED.inc(len(chunk))
        return state

    async def climb(self, call: Call, engine: Engine, candidates: Candidates, state: HistoryState, meta: Float32, wanted: str, *, insured: bool) -> None:
        """Up the ladder to the exit that is wanted; under a deadline each rung is an answer as soon as it is complete."""
        if wanted == "dot" or insured:
            call.probabilities, call.exit = await self.run(call, "score", partial(engine.dot, candidates, state)), "dot"
        if wanted == "dot":
            return
        chunks = []
        for first in range(0, len(candidates), CANDIDATE_QUANTUM):
            rows = slice(first, first + CANDIDATE_QUANTUM)
            chunks.append(await self.run(call, "score", partial(engine.point, candidates, meta, state, rows)))
        point = join(chunks)
        call.probabilities, call.exit = point.probabilities, "point"
        if wanted == "set":
            call.probabilities, call.exit = await self.run(call, "score", partial(engine.set, point)), "set"


def order(call: Call, by_score: bool) -> tuple[Int64, Float64]:
    """Positions of the candidates in the order of the answer, and their scores in that order.

    Sorted by score, ties by input order, cut to `top_n`; or in input order, uncut.
    """
    request, n = call.request, len(call.request.candidates.item_ids)
    if call.probabilities is None or call.ranker is None:
        scores = (n - np.arange(n)) / n  # first-stage order
    else:
        scores = call.probabilities @ call.ranker.score_weights(request.head_weights)
    if not by_score:
        return np.arange(n), scores
    index = np.argsort(-scores, kind="stable")[: request.top_n]
    return index, scores[index]
