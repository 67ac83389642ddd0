"""Stored histories of users: the interface, and the histories that live in this process.

Called by: `writer.py` (writes), `ranking/stored.py` (reads); `main.py` makes the histories. Calls: `packed.py`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from typing import NamedTuple, Protocol

from slatewise import metrics
from slatewise.events.event import Event
from slatewise.events.packed import OLD, Unreadable, merge, tombstone, unpack
from slatewise.schemas import History

DELETED_SECONDS = 60  # time for which events that were received before a deletion are refused
ENTRY_OVERHEAD = 300  # bytes of the Python objects around a user and a value, rounded up
FAILED = "F"  # not stored, because of a fault of the store


class Stored(NamedTuple):
    """The result of a read."""

    history: History | None  # `None`: no events are stored, or a fault
    fault: bool = False


def unpacked(value: bytes | None, most: int) -> Stored:
    """Decode a value that was read, and count the result."""
    try:
        history = None if value is None else unpack(value, most)
    except Unreadable:
        metrics.HISTORY_READS_BY_RESULT["corrupt"].inc()
        return Stored(None, fault=True)
    metrics.HISTORY_READS_BY_RESULT["miss" if history is None else "hit"].inc()
    return Stored(history)


class Histories(Protocol):
    def read(self, user: str, most: int) -> Awaitable[Stored]:
        """Start to read the newest events of a user, at most `most`. Never raises, and ends in the time budget."""

    async def write(self, events: Sequence[tuple[Event, float]]) -> str:
        """Store (event, time at which it was received) pairs. Return a letter of `packed.py` or FAILED for each."""

    async def delete(self, user: str) -> None:
        """Delete the history of a user, and refuse events that were received before. Raises StoreFault."""


def by_user(events: Sequence[tuple[Event, float]]) -> dict[str, list[int]]:
    """Return the positions of each user's events."""
    users: dict[str, list[int]] = {}
    for position, (event, _) in enumerate(events):
        users.setdefault(event.user, []).append(position)
    return users


def entry_bytes(user: str, value: bytes) -> int:
    return len(value) + sys.getsizeof(user) + ENTRY_OVERHEAD  # a text may take four bytes a character


class EmbeddedHistories:
    """Histories in this process. They end with it. Users who were not read or written for longest go first."""

    def __init__(self, most_events: int, ttl_seconds: float, limit_bytes: int) -> None:
        self.most_events = most_events
        self.ttl = ttl_seconds or float("inf")
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self.values: OrderedDict[str, tuple[float, bytes]] = OrderedDict()  # (monotonic expiry, value)

    def get(self, user: str) -> bytes | None:
        """Return the value of a user, who becomes the most recently used one."""
        entry = self.values.get(user)
        if entry is None:
            return None
        if entry[0] <= time.monotonic():
            self.remove(user)
            return None
        self.values.move_to_end(user)
        return entry[1]

    def put(self, user: str, value: bytes, seconds: float) -> None:
        self.remove(user)
        self.values[user] = time.monotonic() + seconds, value
        self.nbytes += entry_bytes(user, value)
        while self.nbytes > self.limit_bytes:
            self.remove(next(iter(self.values)))
        metrics.HISTORIES_USERS.set(len(self.values))
        metrics.HISTORIES_BYTES.set(self.nbytes)

    def remove(self, user: str) -> None:
        entry = self.values.pop(user, None)
        if entry is not None:
            self.nbytes -= entry_bytes(user, entry[1])

    def read(self, user: str, most: int) -> Awaitable[Stored]:
        found: asyncio.Future[Stored] = asyncio.get_running_loop().create_future()
        found.set_result(unpacked(self.get(user), most))
        return found

    async def write(self, events: Sequence[tuple[Event, float]]) -> str:
        letters = [FAILED] * len(events)
        for user, positions in by_user(events).items():
            before = self.get(user)
            value, answers = merge(before, [events[k] for k in positions], self.most_events)
            if value is not None and entry_bytes(user, value) > self.limit_bytes:
                value, answers = before, OLD * len(positions)  # it would be removed at once
            if value is not None and value is not before:
                self.put(user, value, self.ttl)
            for position, answer in zip(positions, answers, strict=True):
                letters[position] = answer
        return "".join(letters)

    async def delete(self, user: str) -> None:
        self.put(user, tombstone(time.time()), DELETED_SECONDS)
