"""User, id and deadline of a call that ranks, which may come from headers.

Called by: `rank.py`. Calls: `problems.py`.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import Headers

from slatewise.errors import Invalid
from slatewise.http.problems import new_request_id, schema_error
from slatewise.schemas import MOST_MILLISECONDS, RankRequest

# The deadline is the earliest of these and of the body's `deadline_ms`. Envoy sets the second one.
DEADLINE_HEADERS = ("x-request-timeout-ms", "x-envoy-expected-rq-timeout-ms")
MILLISECONDS = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?")


def with_headers(parsed: RankRequest, headers: Headers) -> RankRequest:
    """Add user, id and deadline, which may also come from the headers; without an id, a new one is made.

    Raises Invalid.
    """
    changes: dict[str, Any] = {}
    user = header_text(headers, "x-user-id")
    identifier = header_text(headers, "x-request-id")
    if user is not None:
        if parsed.user is not None and parsed.user != user:
            raise Invalid.at("/user", "differs from the header X-User-ID")
        changes["user"] = user
    if parsed.id is None and identifier is not None:
        changes["id"] = identifier
    given = [ms for name in DEADLINE_HEADERS if (ms := header_milliseconds(headers, name))]
    if given:
        changes["deadline_ms"] = min([*given, *filter(None, (parsed.deadline_ms,))])
    if changes:
        try:
            RankRequest.model_validate({"candidates": {"item_ids": ["0"]}, **changes})
        except ValidationError as error:
            raise schema_error(error) from None
        parsed = parsed.model_copy(update=changes)
    if parsed.id is None:
        parsed.__dict__["id"] = new_request_id()  # frozen, but nobody else has it yet, and a copy costs more
    return parsed


def header_milliseconds(headers: Headers, name: str) -> float | None:
    """Return the milliseconds in a header; `None` if it is missing or 0. Raises Invalid."""
    text = headers.get(name)
    if text is None:
        return None
    if not MILLISECONDS.fullmatch(text):
        raise Invalid.at("", f"the header {name} must be a number of milliseconds, at most {MOST_MILLISECONDS:.0f}")
    return min(float(text), MOST_MILLISECONDS) or None


def header_text(headers: Headers, name: str) -> str | None:
    """Decode a header as UTF-8, because Starlette decodes headers as Latin-1. Raises Invalid."""
    value = headers.get(name)
    try:
        return None if value is None else value.encode("latin-1").decode()
    except UnicodeDecodeError:
        raise Invalid.at("", f"the header {name} is not UTF-8") from None
