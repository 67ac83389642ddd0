"""The header `traceparent` of W3C Trace Context (https://www.w3.org/TR/trace-context/), read without OpenTelemetry.

Called by: `rank.py`, `problems.py`, `request_log.py` and `tracing.py`. Calls: nothing.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from starlette.datastructures import Headers

# Version, trace id, span id and flags. A version above 00 may be followed by more.
TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
SAMPLED = 1


class TraceContext(NamedTuple):
    """Ids of a span in lower-case hexadecimal digits, and whether its trace is recorded."""

    trace_id: str
    span_id: str
    sampled: bool

    def ids(self) -> dict[str, str]:
        return {"trace_id": self.trace_id, "span_id": self.span_id}


def caller_of(headers: Headers) -> TraceContext | None:
    """Return the caller's span. `None` without the header, or if it is not valid: the standard wants no error then."""
    given = headers.get("traceparent")
    if given is None:
        return None
    found = TRACEPARENT.fullmatch(given)
    if found is None or (found[1] == "00" and found[5]) or len(headers.getlist("traceparent")) > 1:
        return None
    return TraceContext(found[2], found[3], bool(int(found[4], 16) & SAMPLED))
