"""Events as clients of other services send them: PutEvents of Amazon Personalize, and the feedback of Metarank.

Unknown members are ignored.
Called by: `http/events.py`. Calls: `event.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from slatewise.errors import Invalid, pointer
from slatewise.events.event import SHOWN, Event
from slatewise.schemas import Id, RequestId, Text, UnixSeconds

ForeignId = Annotated[Id, AfterValidator(str)]


class Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class PutEvent(Lenient):
    eventType: Text  # the action
    sentAt: UnixSeconds
    itemId: ForeignId | None = None  # an event without an item is no history
    eventId: Text | None = None
    recommendationId: RequestId | None = None


class PutEventsBody(Lenient):
    """PutEvents of Amazon Personalize. Without `userId`, the session is the user, as it is for AWS."""

    userId: ForeignId | None = None
    sessionId: ForeignId
    eventList: Annotated[list[PutEvent], Field(min_length=1, fail_fast=True)]

    def events(self) -> list[Event]:
        user = str(self.userId or self.sessionId)
        return [
            Event(user, str(e.itemId), e.eventType, float(e.sentAt), e.recommendationId or "", e.eventId or "")
            for e in self.eventList
            if e.itemId is not None
        ]


def metarank_seconds(value: Any) -> Any:
    """Convert a Metarank time to unix seconds: milliseconds as a number or text, or ISO 8601. Raises ValueError."""
    if isinstance(value, str):
        try:
            if value.lstrip("-").isdecimal():
                return int(value) / 1000 if len(value) < 20 else value
            moment = datetime.fromisoformat(value)
        except ValueError:  # whose text repeats the value, however long
            raise ValueError("must be milliseconds since 1970, or ISO 8601") from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return value / 1000 if abs(value) < 1e18 else value  # a larger integer may be no float


MetarankTime = Annotated[
    UnixSeconds,
    BeforeValidator(metarank_seconds),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}], "description": "Milliseconds, or ISO 8601."}),
]


class Shown(Lenient):
    id: ForeignId


class Feedback(Lenient):
    """One event of Metarank. Events of the kinds `item` and `user` are taken and ignored."""

    event: Literal["item", "user", "ranking", "interaction"]
    id: RequestId | None = None
    timestamp: MetarankTime | None = None
    user: ForeignId | None = None
    session: ForeignId | None = None
    item: ForeignId | None = None
    type: Text | None = None
    ranking: RequestId | None = None
    items: list[Shown] = []

    def events(self, now: float, position: int) -> Iterator[Event]:
        """Yield the interaction, or the items that were shown. Raises Invalid for a missing member."""
        if self.event not in ("ranking", "interaction"):
            return
        user = self.user or self.session
        at = now if self.timestamp is None else float(self.timestamp)
        if user is None:
            raise Invalid.at(pointer(position, "user"), "an event of this kind needs `user` or `session`")
        if self.event == "ranking":
            for shown in self.items:
                yield Event(str(user), str(shown.id), SHOWN, at, self.id or "", "", True)
        elif self.item is None or self.type is None:
            raise Invalid.at(pointer(position, "item"), "an interaction needs `item` and `type`")
        else:
            yield Event(str(user), str(self.item), self.type, at, self.ranking or "", self.id or "")


class FeedbackAnswer(BaseModel):
    """Metarank's answer. `updated` counts the new events, `ignored` those of the kinds `item` and `user`."""

    accepted: int
    status: str
    tookMillis: int
    updated: int
    ignored: int
