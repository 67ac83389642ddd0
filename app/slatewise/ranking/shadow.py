"""The shadow: a share of the requests is ranked by the other version too, after the answer, and both are compared.

It has the lowest priority among the chunks of work, runs one request at a time, and is dropped while chunks wait for a
thread. Nothing of it reaches a client.

Called by: `versions.py`. Calls: `pipeline.py`, `registry.py`, `metrics.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from slatewise import metrics
from slatewise.bundle.ranker import Ranker
from slatewise.inference.arrays import Float64
from slatewise.ranking.pipeline import Pipeline, Ranking
from slatewise.ranking.trace import Timings, Trace
from slatewise.schemas import RankRequest

log = logging.getLogger("slatewise")

LAST = 101  # priority after all requests, and after encodings ahead of requests
TOP = 10
MOST_COMPARED = 200  # first results among which Kendall's tau counts pairs
DEADLINE_MS = 60_000.0  # instead of a request's own, which has mostly passed


class Agreement(NamedTuple):
    """How alike two rankings of the same candidates are.

    tau and shift are of the candidates that the exit scored in both: a pruned request has others.
    """

    overlap: float  # share of the first ten results that both have
    tau: float  # Kendall's tau-b among the first results of the shown ranking; NaN if all scores are equal
    shift: float  # mean difference of the scores, candidate version minus served version; NaN without a candidate
    latency_ratio: float | None  # model time, candidate version over served version; `None`: unequal use of the cache


class Shadow:
    """Compares answers with those of the other version."""

    def __init__(self, pipeline: Pipeline, on_agreement: Callable[[Ranker, Ranker, Agreement], None]) -> None:
        self.pipeline = pipeline
        self.on_agreement = on_agreement  # (version that answered, other version, agreement)
        self.task: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    def offer(self, request: RankRequest, shown: Ranking, trace: Trace, other: Ranker) -> None:
        """Rank the request by `other` too, unless there is other work. Called when the answer is ready.

        A request that explores is left out: two draws say nothing about the versions.
        """
        name = other.name
        if shown.scored is None or shown.degraded or request.explore:
            return
        if self.task is not None or self.pipeline.workers.queue:
            metrics.series(metrics.SHADOW_REQUESTS, name, "dropped").inc()
            return
        changes: dict[str, object] = {"priority": LAST, "explain": False, "exit": shown.scored.exit}
        if self.pipeline.admission.deadline(request.deadline_ms, 0.0).milliseconds:
            changes["deadline_ms"] = DEADLINE_MS
        if request.request_time is None:
            changes["request_time"] = time.time()
        if request.variant not in other.engines:
            changes["variant"] = "auto"
        self.task = asyncio.create_task(self.compare(request.model_copy(update=changes), shown, trace.timings, other))
        self.task.add_done_callback(self.ended)

    def ended(self, task: asyncio.Task[None]) -> None:
        self.task = None

    async def compare(self, request: RankRequest, shown: Ranking, timings: Timings, other: Ranker) -> None:
        trace = Trace(time.perf_counter())
        try:
            ranking = await self.pipeline.rank(request, trace, other)
        except Exception as error:
            metrics.series(metrics.SHADOW_REQUESTS, other.name, "failed").inc()
            log.warning("shadow of %s version %d: %s", other.name, other.manifest.version, error)
            return
        if "overload" in ranking.degraded:
            metrics.series(metrics.SHADOW_REQUESTS, other.name, "dropped").inc()
            return
        if ranking.scored is None or ranking.degraded or ranking.history.used != shown.history.used:
            metrics.series(metrics.SHADOW_REQUESTS, other.name, "differs").inc()
            return
        same_work = ranking.history.cache == shown.history.cache
        ratio = model_seconds(trace.timings) / model_seconds(timings) if same_work else None
        self.on_agreement(shown.ranker, other, compare(shown, ranking, ratio))


def model_seconds(timings: Timings) -> float:
    """Return the seconds in the model, at least a microsecond; waiting is not among them."""
    return max(1e-6, timings.seconds.get("encode", 0.0) + timings.seconds.get("score", 0.0))


def compare(shown: Ranking, other: Ranking, latency_ratio: float | None) -> Agreement:
    """Compare two rankings of the same request. shift and latency_ratio are those of `other` over `shown`."""
    assert shown.scored is not None and other.scored is not None
    first, second = (set(ranking.order(TOP).tolist()) for ranking in (shown, other))
    both = shown.scored.by_exit() & other.scored.by_exit()
    rows = shown.order(MOST_COMPARED)
    rows = rows[both[rows]]
    return Agreement(
        overlap=len(first & second) / len(first),
        tau=kendall_tau(shown.scored.scores[rows], other.scored.scores[rows]),
        shift=float((other.scored.scores - shown.scored.scores)[both].mean()) if both.any() else float("nan"),
        latency_ratio=latency_ratio,
    )


def kendall_tau(x: Float64, y: Float64) -> float:
    """Return Kendall's tau-b of two (n,) columns, by all pairs; NaN if one of them has a single value."""
    above = np.triu_indices(len(x), 1)
    a, b = (np.sign(v[:, None] - v[None])[above] for v in (x, y))
    pairs = float(np.sqrt(np.count_nonzero(a) * np.count_nonzero(b)))
    return float(a @ b) / pairs if pairs else float("nan")


def observe(agreement: Agreement, candidate_shown: bool, name: str) -> Agreement:
    """Count a comparison, turned so that shift and ratio are those of the candidate version over the served one."""
    if candidate_shown:
        ratio = agreement.latency_ratio
        agreement = agreement._replace(shift=-agreement.shift, latency_ratio=None if ratio is None else 1 / ratio)
    metrics.series(metrics.SHADOW_REQUESTS, name, "compared").inc()
    metrics.series(metrics.SHADOW_OVERLAP, name).observe(agreement.overlap)
    if not np.isnan(agreement.shift):
        metrics.series(metrics.SHADOW_SHIFT, name).observe(agreement.shift)
    if not np.isnan(agreement.tau):
        metrics.series(metrics.SHADOW_TAU, name).observe(agreement.tau)
    if agreement.latency_ratio is not None:
        metrics.series(metrics.SHADOW_LATENCY, name).observe(agreement.latency_ratio)
    return agreement
