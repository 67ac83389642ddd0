"""In-process cache of encoded histories.

Key: (ranker, version, digest of the bundle, variant, user). Value: the events as rows, and their immutable state. The
size is bounded in bytes, and the least recently used entries are evicted first. A request reuses the state of the
longest common prefix of its own and the cached events. Causal attention makes this exact, also for edited and shorter
histories. All methods run on the event loop, so there is no lock.

Called by: `pipeline.py`; `main.py` builds it. Calls: `inference/arrays.py` and `inference/workers.py` for their types.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial

from slatewise.inference.arrays import History, KeptState
from slatewise.inference.workers import Job
from slatewise.schemas import CacheResult

BLOCK = 1_000  # entries that are looked at before other work goes on
ENTRY_OVERHEAD = 4_000  # bytes of the objects around the arrays of an entry: 3,600 for one event and two blocks


@dataclass(frozen=True)
class Entry:
    history: History
    state: KeptState

    @property
    def nbytes(self) -> int:
        return self.history.nbytes + self.state.nbytes + ENTRY_OVERHEAD


@dataclass(frozen=True)
class Reuse:
    """The result of a cache look-up: the cached state, and the length of the prefix that a history shares with it."""

    result: CacheResult
    events: int
    state: KeptState | None


@dataclass
class Encoding:
    """An encoding in progress, and the number of requests that wait for its result."""

    history: History
    job: Job[KeptState]
    waiters: int = 0


class HistoryCache:
    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self.entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self.encoding: dict[Hashable, list[Encoding]] = {}
        self.deletions = 0  # a state that was begun at another number is not cached: its user may be deleted

    def get(self, key: Hashable) -> Entry | None:
        """Return the entry, which becomes the most recently used one."""
        entry = self.entries.get(key)
        if entry is not None:
            self.entries.move_to_end(key)
        return entry

    def events(self, key: Hashable) -> int:
        """Return the number of events in the cached state, 0 without one. The order of use stays as it is."""
        entry = self.entries.get(key)
        return 0 if entry is None else len(entry.history)

    def find(self, key: Hashable, history: History) -> Reuse:
        """Look up the longest prefix of a history (at least one event) that the cached state covers."""
        entry = self.get(key)
        if entry is None:
            return Reuse("miss", 0, None)
        shared = entry.history.common_prefix(history)
        if shared == len(history) == len(entry.history):
            return Reuse("hit", shared, entry.state)
        shared = min(shared, len(history) - 1)  # encode the newest event again: its hidden state is the user vector
        return Reuse("extended" if shared else "miss", shared, entry.state)

    def put(self, key: Hashable, entry: Entry) -> None:
        """Cache an entry, unless the cached entry starts with all of its events and has more."""
        cached = self.entries.get(key)
        if cached is not None and len(cached.history) > len(entry.history) == entry.history.common_prefix(
            cached.history
        ):
            return
        self.remove(key)
        if entry.nbytes > self.limit_bytes:
            return
        self.entries[key] = entry
        self.nbytes += entry.nbytes
        while self.nbytes > self.limit_bytes:
            self.remove(next(iter(self.entries)))

    def remove(self, key: Hashable) -> None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.nbytes -= entry.nbytes

    def forget(self, keys: Iterable[Hashable] | None) -> None:
        """Remove the entries of a deleted user, or with `None` all entries, also those that are being encoded."""
        self.deletions += 1
        for key in list(self.entries) if keys is None else keys:
            self.remove(key)

    async def forget_version(self, identity: tuple[Hashable, ...]) -> None:
        """Remove the entries whose key begins with `identity`, in blocks, so that requests go on in between."""
        keys = list(self.entries)
        for first in range(0, len(keys), BLOCK):
            for key in keys[first : first + BLOCK]:
                if isinstance(key, tuple) and key[: len(identity)] == identity:
                    self.remove(key)
            await asyncio.sleep(0)

    async def once(self, key: Hashable, history: History, encode: Callable[[], Job[KeptState]]) -> KeptState:
        """Return the result of `encode()`. Concurrent requests of one user with equal events share one call.

        The job is cancelled when the last of the waiting requests is cancelled.
        """
        encoding = next((other for other in self.encoding.get(key, ()) if other.history.equals(history)), None)
        if encoding is None:
            encoding = Encoding(history, encode())
            encoding.job.add_done_callback(partial(self.end, key, encoding))
            self.encoding.setdefault(key, []).append(encoding)
        encoding.waiters += 1
        try:
            return await asyncio.shield(encoding.job)
        finally:
            encoding.waiters -= 1
            if not encoding.waiters and not encoding.job.done():
                self.end(key, encoding, encoding.job)  # before the cancellation, so that no request joins this job
                encoding.job.cancel()

    def end(self, key: Hashable, encoding: Encoding, job: Job[KeptState]) -> None:
        """Remove an encoding that has ended or is about to be cancelled."""
        rest = [other for other in self.encoding.get(key, ()) if other is not encoding]
        if rest:
            self.encoding[key] = rest
        else:
            self.encoding.pop(key, None)
        if job.done() and not job.cancelled():
            job.exception()  # mark as retrieved: all waiters may be gone, and asyncio would log the exception
