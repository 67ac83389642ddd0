"""One event of a user, and the body of `POST /events`.

Called by: every file of this folder, and `http/events.py`. Calls: `schemas.py` for the types.
"""

from __future__ import annotations

import hashlib
import time
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field

from slatewise.errors import Invalid
from slatewise.schemas import Id, RequestId, RequestModel, Text, UnixSeconds, User

FUTURE_SECONDS = 86_400.0  # how far a client's clock may be ahead: a later event would stay the newest one
SHOWN = "impression"  # action of an item that was only shown


class Event(NamedTuple):
    """An event that passed its checks."""

    user: str
    item_id: str
    action: str  # empty: none
    timestamp: float  # unix seconds
    request_id: str  # the ranking that it answers; empty: none
    event_id: str  # empty: made from the content
    shown: bool = False  # the item was only shown: for the tap, and not part of the history

    @property
    def key(self) -> str:
        """16 hexadecimal digits of the event id. Without an id, of the content: equal events are then one event."""
        content = self.event_id or "\xff".join((self.item_id, self.action, repr(self.timestamp), self.request_id))
        return hashlib.blake2b(content.encode(), digest_size=8, key=b"id" if self.event_id else b"").hexdigest()


class EventBody(RequestModel):
    """One event. A repeated `event_id` of a user counts once.

    Without an id, it is made from the other members. So a repeat is recognized if it has the same timestamp.
    """

    user: User
    item_id: Annotated[Id, AfterValidator(str)]
    action: Text | None = None
    timestamp: UnixSeconds | None = Field(None, description="Unix seconds; default: now.")
    request_id: RequestId | None = Field(None, description="Id of the ranking that the event answers.")
    event_id: Text | None = None

    def event(self, now: float) -> Event:
        return Event(
            self.user,
            str(self.item_id),
            self.action or "",
            now if self.timestamp is None else float(self.timestamp),
            self.request_id or "",
            self.event_id or "",
        )


class EventsBody(RequestModel):
    """Several events, of one user or of many."""

    events: Annotated[list[EventBody], Field(min_length=1, fail_fast=True)]


class EventCounts(RequestModel):
    """Numbers of events: `accepted` were new, `duplicate` were known.

    `dropped` were older than a full stored history, or of a user who was deleted meanwhile.
    """

    accepted: int
    duplicate: int
    dropped: int


def check_times(events: list[Event], pointer: str) -> None:
    """Raise Invalid if an event lies more than a day ahead of this server's clock."""
    if events and max(event.timestamp for event in events) > time.time() + FUTURE_SECONDS:
        raise Invalid.at(pointer, "a time lies more than a day ahead of the server's clock; times are unix seconds")
