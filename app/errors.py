"""Every way a request can fail.

    bytes ---> JSON ---> RankRequest ---> arrays ---> result
           |         |               |            |
           |         |               |            +-- DeadlineExceeded 504, Overloaded 429 or 503
           |         |               +--------------- NotFound 404, Invalid 422
           |         +------------------------------- Invalid 422
           +----------------------------------------- NotJson, UpgradeRefused 400, TooLarge 413, UnsupportedType 415, BodyTimeout 408

Unauthorized 401 comes before all of these, NotReady 503 before the model. Each class is one row of RFC 9457's problem
types; `main.py` turns them into answers. The detail reaches the client: it names limits, never values.
"""

from dataclasses import dataclass

MOST_FAULTS = 20  # that one answer lists


def pointer(*path: str | int) -> str:
    """An RFC 6901 pointer into the body; names of the client's own are cut at 100 characters."""
    return "".join("/" + str(step)[:100].replace("~", "~0").replace("/", "~1") for step in path)


@dataclass(frozen=True)
class Fault:
    """One member of a request that is wrong: an RFC 6901 pointer into the body, and why."""

    pointer: str
    detail: str


class RankingError(Exception):
    status = 500
    title = "Internal error"
    headers: dict[str, str] = {}

    def __init__(self, detail: str, faults: tuple[Fault, ...] = ()) -> None:
        super().__init__(detail)
        self.detail, self.faults = detail, faults

    @property
    def type(self) -> str:
        return "urn:slatewise:problem:" + self.slug

    @property
    def slug(self) -> str:
        return self.title.lower().replace(" ", "-")


class NotJson(RankingError):
    status, title = 400, "Not JSON"


class UpgradeRefused(RankingError):
    """The client asked for another protocol; the HTTP parser is lost to this connection."""

    status, title, headers = 400, "Upgrade refused", {"Connection": "close"}


class Unauthorized(RankingError):
    status, title, headers = 401, "Unauthorized", {"WWW-Authenticate": "Bearer"}


class NotFound(RankingError):
    status, title = 404, "Not found"


class BodyTimeout(RankingError):
    status, title, headers = 408, "Body too slow", {"Connection": "close"}


class TooLarge(RankingError):
    status, title = 413, "Too large"


class UnsupportedType(RankingError):
    status, title = 415, "Unsupported type"


class Invalid(RankingError):
    status, title = 422, "Invalid request"

    @classmethod
    def at(cls, pointer: str, detail: str) -> "Invalid":
        return cls(f"{pointer or '/'}: {detail}", (Fault(pointer, detail),))


class Overloaded(RankingError):
    status, title, headers = 429, "Overloaded", {"Retry-After": "1"}


class NotReady(RankingError):
    status, title, headers = 503, "Not ready", {"Retry-After": "1"}


class OverloadedUndegraded(RankingError):
    """Overloaded, and the client did not allow a degraded answer."""

    status, title, headers = 503, "Overloaded and not to be degraded", {"Retry-After": "1"}


class DeadlineExceeded(RankingError):
    status, title = 504, "Deadline exceeded"
