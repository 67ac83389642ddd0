"""Encoded histories, kept between requests.

Per (ranker, version, variant, user): the events as rows, and their immutable state. Bounded in bytes, least recently
used out first. A request takes the longest common prefix of its events and the kept ones; causality makes that exact,
for edited and shorter histories too. In process; lives on the event loop, so it needs no lock.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

from slatewise.inference.arrays import History, KeptState
from slatewise.inference.workers import Job

ENTRY_OVERHEAD = 1_000  # bytes of the Python objects around an entry's arrays, rounded up


@dataclass(frozen=True)
class Entry:
    history: History
    state: KeptState

    @property
    def nbytes(self) -> int:
        return self.history.nbytes + self.state.nbytes + ENTRY_OVERHEAD


@dataclass
class Encoding:
    """One that runs, and how many wait for it."""

    history: History
    job: Job[KeptState]
    waiters: int = 0


class HistoryCache:
    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self.entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self.encoding: dict[Hashable, list[Encoding]] = {}

    def get(self, key: Hashable) -> Entry | None:
        entry = self.entries.get(key)
        if entry is not None:
            self.entries.move_to_end(key)
        return entry

    def put(self, key: Hashable, entry: Entry) -> None:
        """Keep an entry, unless the one that is kept already holds all of its events and more."""
        kept = self.entries.get(key)
        if kept is not None and len(kept.history) > len(entry.history) == entry.history.common_prefix(kept.history):
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

    async def once(self, key: Hashable, history: History, encode: Callable[[], Job[KeptState]]) -> KeptState:
        """`encode()`, shared by all who ask for the same events of the same user while it runs.

        It goes on while anybody waits for it: one caller's cancellation does not take it from the others, the last
        one's stops it.
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
                self.end(key, encoding, encoding.job)  # at once: nobody may join what is being cancelled
                encoding.job.cancel()

    def end(self, key: Hashable, encoding: Encoding, job: Job[KeptState]) -> None:
        rest = [other for other in self.encoding.get(key, ()) if other is not encoding]
        if rest:
            self.encoding[key] = rest
        else:
            self.encoding.pop(key, None)
        if job.done() and not job.cancelled():
            job.exception()  # seen, also where every waiter has gone
