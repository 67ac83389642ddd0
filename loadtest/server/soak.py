"""Memory over time: the server's resident memory under requests of random sizes, from new and returning users.

Called by: `__main__.py` (--soak). Calls: `client.py`, `workload.py`; `report.py` plots the samples.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from loadtest.client import closed_loop, limit_time, post
from loadtest.server_process import ServerProcess
from loadtest.workload import Workload

CONNECTIONS = 4
MOST_HISTORY = 2_048
MOST_CANDIDATES = 4_096
HISTORY_CACHE_MB = 32
SAMPLE_SECONDS = 2.0
PROGRESS_SECONDS = 20.0

Sample = tuple[float, float]  # seconds, resident MB


def slope(samples: list[Sample]) -> float:
    """Growth in megabytes an hour, by least squares."""
    n = len(samples)
    time_mean = sum(t for t, _ in samples) / n
    mb_mean = sum(mb for _, mb in samples) / n
    square = sum((t - time_mean) ** 2 for t, _ in samples)
    return 3_600 * sum((t - time_mean) * (mb - mb_mean) for t, mb in samples) / square if square else 0.0


def after_first_third(samples: list[Sample]) -> list[Sample]:
    """The samples after the first third of the time, when caches and arenas are full."""
    return [sample for sample in samples if sample[0] >= samples[-1][0] / 3]


def soak(server: ServerProcess, workload: Workload, seconds: float) -> tuple[dict[str, Any], list[Sample]]:
    """Return a row and the samples. Requests are drawn during the run, so its speed is not a measurement."""
    requests = (post("/rerank", body) for body in workload.endless(MOST_HISTORY, MOST_CANDIDATES))
    samples = [(0.0, server.resident_mb())]
    begin = time.monotonic()
    said = 0.0
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(closed_loop, server.port, limit_time(seconds, requests), CONNECTIONS)
        while not run.done():
            time.sleep(min(SAMPLE_SECONDS, seconds / 20))
            samples.append((round(time.monotonic() - begin, 2), round(server.resident_mb(), 1)))
            if samples[-1][0] >= said + PROGRESS_SECONDS:
                said = samples[-1][0]
                print(f"soak: {said:.0f} of {seconds:.0f} s, {samples[-1][1]:.0f} MB", file=sys.stderr)
    outcome = run.result()
    row = {"group": "soak", "connections": CONNECTIONS, "seconds": round(outcome.seconds, 1)} | outcome.summary()
    memory = {
        "first_mb": round(samples[0][1], 1),
        "largest_mb": max(mb for _, mb in samples),
        "last_mb": samples[-1][1],
    }
    return row | memory | {"slope_mb_per_hour": round(slope(after_first_third(samples)), 1)}, samples
