"""Look-ups of meta-embeddings in Redis without the cache: one at a time, and 64 concurrent ones.

Called by: `__main__.py`; `faults.py` uses its timing. Calls: `slatewise/store/lookup.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from slatewise.store.lookup import RedisStore

BUDGET = 0.01  # seconds: the default of SLATEWISE_REDIS_TIMEOUT_MS
LOOK_UPS = 4_000
CONCURRENT = (1, 64)


def summary(seconds: list[float]) -> tuple[float, float, float]:
    """(p50, p99, longest) in milliseconds."""
    p50, p99 = np.quantile(seconds, (0.5, 0.99))
    return float(p50) * 1e3, float(p99) * 1e3, max(seconds) * 1e3


def ranker_stub(ranker: str, space: str, dim: int) -> Any:
    """The attributes of a ranker that a store reads."""
    return SimpleNamespace(
        name=ranker,
        manifest=SimpleNamespace(space=space, meta_size=dim, version=1, width=dim),
        default_meta=np.zeros(dim, np.float32),
    )


def user_at(users: list[str], turn: int) -> str:
    """A different user each turn, spread over all of them."""
    return users[turn * 7919 % len(users)]


async def timed_look_up(store: RedisStore, ranker: Any, user: str) -> tuple[float, str]:
    """(seconds, status)."""
    begin = time.perf_counter()
    found = await store.look_up(ranker, user)
    return time.perf_counter() - begin, found.status


async def measure_look_ups(ranker: Any, users: list[str], port: int) -> dict[int, Any]:
    """By number of concurrent look-ups: p50, p99 and longest in ms, and statuses."""
    result = {}
    async with RedisStore(f"redis://127.0.0.1:{port}/0", BUDGET, lambda: [ranker]) as store:
        for concurrent in CONCURRENT:
            answers = []
            for first in range(0, LOOK_UPS, concurrent):
                turns = range(first, first + concurrent)
                answers += await asyncio.gather(*(timed_look_up(store, ranker, user_at(users, k)) for k in turns))
            result[concurrent] = {
                "ms": summary([seconds for seconds, _ in answers]),
                "statuses": Counter(status for _, status in answers),
            }
    return result
