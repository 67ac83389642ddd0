"""The calls: each function makes one, with the function that reads its answer. Both clients send them.

Called by: `client.py` and `async_client.py`. Calls: `body.py` and `results.py`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode

from slatewise.client.body import history_columns, rank_body, to_json
from slatewise.client.errors import Invalid
from slatewise.client.libraries import is_frame
from slatewise.client.results import Ranking, titles_of
from slatewise.client.values import column, ids, one_id, scalar

T = TypeVar("T")

EVENT_MEMBERS = ("user", "item_id", "action", "timestamp", "request_id", "event_id")
MOST_TITLES = 200  # ids in one call: an address has a limited length


@dataclass(frozen=True)
class Call(Generic[T]):
    method: str
    path: str
    content: bytes | None  # JSON
    read: Callable[[Any], T]  # the JSON of the answer -> the result
    user: str | int | None = None  # of the whole call, for the header X-User-ID


def as_it_is(answer: Any) -> Any:
    return answer


def rerank(members: Mapping[str, Any]) -> Call[Ranking]:
    return rank("/rerank", members)


def score(members: Mapping[str, Any]) -> Call[Ranking]:
    return rank("/score", members)


def rank(path: str, members: Mapping[str, Any]) -> Call[Ranking]:
    body = rank_body(members)
    return Call("POST", path, to_json(body), Ranking.from_response, body.get("user"))


def models() -> Call[list[dict[str, Any]]]:
    return Call("GET", "/models", None, lambda answer: list(answer["models"]))


def model(name: str) -> Call[dict[str, Any]]:
    return Call("GET", f"/models/{quote(name, safe='')}", None, as_it_is)


def ready() -> Call[Any]:
    return Call("GET", "/readyz", None, as_it_is)


def titles(ranker: str, item_ids: list[str]) -> Call[dict[str, str]]:
    """Titles of at most MOST_TITLES items by id."""
    listed = urlencode([("id", item) for item in item_ids[:MOST_TITLES]])
    return Call("GET", f"/models/{quote(ranker, safe='')}/items?{listed}", None, titles_of)


def encode(user: Any, history: Any, ranker: str | None) -> Call[dict[str, Any]]:
    body: dict[str, Any] = {"user": one_id(user, "/user")}
    if history is not None:
        body["history"] = history_columns(history)
    if ranker is not None:
        body["ranker"] = ranker
    return Call("POST", "/encode", to_json(body), as_it_is, body["user"])


def delete_user(user: Any) -> Call[Any]:
    name = one_id(user, "/user")
    return Call("DELETE", f"/users/{quote(str(name), safe='')}", None, as_it_is, name)


def events(rows: Any) -> Call[dict[str, Any]]:
    """Raises Invalid. An event without an id gets one, so that a repeated call does not count it twice."""
    listed = rows_of_frame(rows) if is_frame(rows) else list(rows)
    members = [event_members(row, k) for k, row in enumerate(listed)]
    users = {str(each["user"]) for each in members}
    only = users.pop() if len(users) == 1 else None
    return Call("POST", "/events", to_json({"events": members}), as_it_is, only)


def event_members(row: Any, k: int) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise Invalid.at(f"/events/{k}", f"must be a mapping, not {type(row).__name__}")
    members = {str(name): scalar(value) for name, value in row.items()}
    members = {name: value for name, value in members.items() if value is not None}
    for name in ("user", "item_id"):
        members[name] = one_id(members.get(name), f"/events/{k}/{name}")
    return {"event_id": uuid.uuid4().hex} | members


def rows_of_frame(frame: Any) -> Iterable[dict[str, Any]]:
    """Return the rows of a frame of events; each column is converted as a whole. Raises Invalid."""
    names = [str(name) for name in frame.columns]
    if unknown := [name for name in names if name not in EVENT_MEMBERS]:
        raise Invalid.at("/events", f"unknown columns: {', '.join(unknown)}; known: {', '.join(EVENT_MEMBERS)}")
    columns = [(ids if name in ("user", "item_id") else column)(frame[name], f"/events/{name}") for name in names]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
