"""In-process cache of meta-embeddings: bounded, least recently used first out, and each entry expires.

Called by: `lookup.py` (get, put), `poll.py` (clear). Calls: `metrics.py`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import NamedTuple

from slatewise import metrics
from slatewise.inference.arrays import Float32

UserKey = tuple[str, str, str]  # (ranker's name, space, user)


class Found(NamedTuple):
    """The newest vector in Redis for a user; `vector` is `None` if Redis has no vector for the user."""

    vector: Float32 | None  # (M,)
    version: str = ""  # generation of the vector
    created_at: float = 0.0  # unix seconds


class EmbeddingCache:
    """Caches at most `users` results for `seconds` each; 0 seconds: no cache. Absent users are cached, too."""

    def __init__(self, users: int, seconds: float) -> None:
        self.users = users
        self.seconds = seconds
        self.entries: OrderedDict[UserKey, tuple[float, Found]] = OrderedDict()  # (monotonic expiry, result), LRU first

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, key: UserKey) -> Found | None:
        entry = self.entries.get(key)
        if entry is None or entry[0] <= time.monotonic():
            return None
        self.entries.move_to_end(key)
        return entry[1]

    def put(self, key: UserKey, found: Found) -> None:
        if not self.seconds:
            return
        self.entries[key] = time.monotonic() + self.seconds, found
        self.entries.move_to_end(key)
        while len(self.entries) > self.users:
            self.entries.popitem(last=False)
        metrics.EMBEDDING_CACHE_ENTRIES.set(len(self.entries))

    def clear(self) -> None:
        self.entries.clear()
        metrics.EMBEDDING_CACHE_ENTRIES.set(0)
