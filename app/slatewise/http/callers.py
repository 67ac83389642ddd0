"""Holders of API keys: what each may ask of the server, and what it asks now.

Called by: `keys.py` makes a caller for each key, `auth.py` lets its requests in, `rank.py` bounds their priority.
Calls: `errors.py`, `door.py`, `metrics.py`, `schemas.py`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from slatewise import metrics
from slatewise.errors import TooManyRequests
from slatewise.http.door import RareLog
from slatewise.schemas import RankRequest

LIMITS: dict[str, tuple[type[int | float | str], re.Pattern[str]]] = {  # in a line of the file of keys
    "in_flight": (int, re.compile(r"[0-9]{1,6}")),
    "rate": (float, re.compile(r"[0-9]{1,6}(\.[0-9]{1,3})?")),
    "priority": (int, re.compile(r"-?([0-9]{1,2}|100)")),
    "name": (str, re.compile(r"[A-Za-z0-9_.-]{1,64}")),
}
SYNTAX = "behind a key may stand in_flight=NUMBER, rate=NUMBER, priority=-100 to 100 and name=TEXT, each once"
REMEDY = "ask for less, or ask the operator for a higher limit of this key"


@dataclass(frozen=True)
class Limits:
    """The limits of one key. 0: no limit of this kind.

    in_flight: requests at once. rate: requests a second. priority: the most important one that a request may have.
    name: what metrics and log call the key; empty: they do not tell it from others.
    """

    in_flight: int = 0
    rate: float = 0.0
    priority: int = 0
    name: str = ""


NO_LIMITS = Limits()


def read_limits(words: Sequence[str], default: Limits) -> Limits:
    """Return the limits in the words behind a key. The message of ValueError repeats no word: it may be of a key."""
    given: dict[str, int | float | str] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name in given or name not in LIMITS or not LIMITS[name][1].fullmatch(text):
            raise ValueError(SYNTAX)
        given[name] = LIMITS[name][0](text)
    return replace(default, **given)  # type: ignore[arg-type]  # the types are those of LIMITS


class Caller:
    """Counts the requests of one key. Lives on the event loop; only `limits` may be set by another thread."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.in_flight = 0
        self.left = max(1.0, limits.rate)  # requests that may come at once: those of a second
        self.counted = time.monotonic()  # when `left` was right
        self.refused = RareLog()

    def enter(self) -> None:
        """Count a request. Raises TooManyRequests above a limit; otherwise `leave` must follow."""
        limits = self.limits
        if 0 < limits.in_flight <= self.in_flight:
            self.refuse("in_flight", f"more than {limits.in_flight} requests of this key are in flight", 1.0)
        if limits.rate:
            now = time.monotonic()
            self.left = min(max(1.0, limits.rate), self.left + (now - self.counted) * limits.rate)
            self.counted = now
            if self.left < 1:
                text = f"more than {limits.rate:g} requests a second come with this key"
                self.refuse("rate", text, (1 - self.left) / limits.rate)
            self.left -= 1
        self.in_flight += 1
        if limits.name:
            metrics.series(metrics.KEY_REQUESTS, limits.name, "admitted").inc()

    def leave(self) -> None:
        self.in_flight -= 1

    def refuse(self, limit: str, reason: str, seconds: float) -> None:
        name = self.limits.name
        metrics.series(metrics.REJECTED, f"key_{limit}").inc()
        if name:
            metrics.series(metrics.KEY_REQUESTS, name, limit).inc()
        self.refused.warning("requests of the key %s are refused: %s", name or "without a name", reason)
        raise TooManyRequests(f"{reason}: {REMEDY} ({limit})", seconds=seconds)

    def bounded(self, request: RankRequest) -> RankRequest:
        """Return the request with the most important priority that the key allows, if it asks for more."""
        most = self.limits.priority
        return request if request.priority >= most else request.model_copy(update={"priority": most})
