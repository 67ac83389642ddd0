"""How late the event loop is, and whether it stays late: then it has more requests to read than it has time for.

A single pause, of a collection or of another process, is not overload.

Called by: `main.py`, which watches; `admission.py`. Calls: `metrics.py`.
"""

from __future__ import annotations

import asyncio
import time

from slatewise import metrics

SECONDS = 0.05  # between two measurements
LATE_SECONDS = 0.01
BEHIND_AFTER = 4  # late measurements in a row
CAUGHT_UP_AFTER = 10  # measurements in a row that are not late
MEAN_STEP = 0.1


class LoopLag:
    def __init__(self) -> None:
        self.is_behind = False
        self.mean = 0.0  # seconds, of about the last ten measurements
        self.others = 0  # measurements in a row that speak against the present state

    async def watch(self) -> None:
        """Measure until the task is cancelled."""
        while True:
            due = time.perf_counter() + SECONDS
            await asyncio.sleep(SECONDS)
            self.observe(max(0.0, time.perf_counter() - due))

    def observe(self, lag: float) -> None:
        metrics.LOOP_LAG.observe(lag)
        self.mean += MEAN_STEP * (lag - self.mean)
        if (lag > LATE_SECONDS) == self.is_behind:
            self.others = 0
            return
        self.others += 1
        if self.others >= (CAUGHT_UP_AFTER if self.is_behind else BEHIND_AFTER):
            self.is_behind = not self.is_behind
            self.others = 0
