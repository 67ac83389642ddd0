"""Timings and facts of one request, for the metrics and the request log.

The response is made from `pipeline.Ranking`. A trace also describes a request that fails, with the last stage it
reached.

Called by: `pipeline.py`, which writes it on the event loop, `http/rank.py` and `http/request_log.py`. Calls:
`metrics.py`.
"""

from __future__ import annotations

import time

from slatewise import metrics
from slatewise.bundle.ranker import Ranker
from slatewise.schemas import AnsweredExit, HistoryUse, MetaStatus


class Timings:
    """Seconds of one request by stage. The stages do not overlap, so they add up to the duration."""

    def __init__(self, entered: float) -> None:
        self.entered = entered  # time.perf_counter()
        self.marked = entered  # end of the last lap; a lap is the time between two calls of `lap`
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str, queued: float = 0.0) -> None:
        """Add the time since the last lap to a stage, except for `queued` seconds, which are added to `queue`."""
        now = time.perf_counter()
        queued = min(queued, now - self.marked)
        if queued:
            self.add("queue", queued)
        self.add(stage, now - self.marked - queued)
        self.marked = now

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def observe(self, exemplar: dict[str, str] | None = None) -> None:
        """Observe each stage in its histogram. Called once, at the end of the request."""
        for stage, seconds in self.seconds.items():
            metrics.STAGES_BY_NAME[stage].observe(seconds, exemplar)


class Trace:
    """Facts that are known about a request so far. No result is computed from them."""

    def __init__(self, entered: float) -> None:
        self.timings = Timings(entered)
        self.ranker: Ranker | None = None
        self.exit: AnsweredExit = "input_order"  # highest stage of the cascade that is complete
        self.variant = ""  # the variant that computed this stage
        self.history = HistoryUse(0, 0, 0, 0, 0, "none")
        self.meta: MetaStatus | None = None
