"""Events, histories and checks for the tests of this folder."""

from __future__ import annotations

import time
from collections.abc import Sequence

from slatewise.events.event import Event
from slatewise.events.histories import Histories
from slatewise.schemas import History

NOW = 1_700_000_000.0


def event(item: str, at: float = NOW, user: str = "u", action: str = "", event_id: str = "") -> Event:
    return Event(user, item, action, at, "", event_id)


def pairs(events: Sequence[Event], received: float | None = None) -> list[tuple[Event, float]]:
    return [(each, time.time() if received is None else received) for each in events]


async def items(histories: Histories, user: str = "u", most: int = 10_000) -> list[str]:
    """The items of the stored history, oldest first; it must be readable."""
    stored = await histories.read(user, most)
    assert not stored.fault
    return [] if stored.history is None else stored.history.item_ids


async def stored(histories: Histories, user: str = "u", most: int = 10_000) -> History:
    found = await histories.read(user, most)
    assert found.history is not None
    return found.history
