"""How late the event loop is for a timer of its own.

Called by: `main.py`, which watches; `admission.py`. Calls: `metrics.py`.
"""

from __future__ import annotations

import asyncio
import time

from slatewise import metrics

SECONDS = 0.05  # between two measurements
STEP = 0.1


class LoopLag:
    def __init__(self) -> None:
        self.mean = 0.0  # seconds, of about the last ten measurements

    async def watch(self) -> None:
        """Measure until the task is cancelled."""
        while True:
            due = time.perf_counter() + SECONDS
            await asyncio.sleep(SECONDS)
            lag = max(0.0, time.perf_counter() - due)
            metrics.LOOP_LAG.observe(lag)
            self.mean += STEP * (lag - self.mean)
