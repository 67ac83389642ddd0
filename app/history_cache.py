"""Encoded histories, kept between requests.

Per (ranker, version, variant, user): the events as rows, and their immutable state. Bounded in bytes, least recently
used out first. A request takes the longest common prefix of its events and the kept ones; causality makes that exact,
for edited and shorter histories too. In process; lives on the event loop, so it needs no lock.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass

from app.engine import History, HistoryState

ENTRY_OVERHEAD = 1_000  # bytes of the Python objects around an entry's arrays, rounded up


@dataclass(frozen=True)
class Entry:
    history: History
    state: HistoryState

    @property
    def nbytes(self) -> int:
        return self.history.nbytes + self.state.nbytes + ENTRY_OVERHEAD


class HistoryCache:
    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self.entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self.encoding: dict[Hashable, list[tuple[History, asyncio.Task[HistoryState]]]] = {}

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

    async def once(self, key: Hashable, history: History, encode: Callable[[], Awaitable[HistoryState]]) -> HistoryState:
        """`encode()`, shared by all who ask for the same events of the same user while it runs.

        It goes on while anybody waits for it: one caller's cancellation does not take it from the others, the last
        one's stops it.
        """
        running = self.encoding.setdefault(key, [])
        for other, task in running:
            if len(other) == len(history) == history.common_prefix(other):
                break
        else:
            task = asyncio.ensure_future(encode())
            task.waiters = 0  # type: ignore[attr-defined]
            running.append((history, task))
            task.add_done_callback(lambda done: self.finished(key, done))
        task.waiters += 1  # type: ignore[attr-defined]
        try:
            return await asyncio.shield(task)
        finally:
            task.waiters -= 1  # type: ignore[attr-defined]
            if not task.waiters and not task.done():  # type: ignore[attr-defined]
                task.cancel()

    def finished(self, key: Hashable, done: asyncio.Task[HistoryState]) -> None:
        rest = [(history, task) for history, task in self.encoding.get(key, ()) if task is not done]
        if rest:
            self.encoding[key] = rest
        else:
            self.encoding.pop(key, None)
        if not done.cancelled():
            done.exception()  # seen, also where every waiter has gone
