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
        self.detail = detail
        self.faults = faults

    @property
    def type(self) -> str:
        return "urn:slatewise:problem:" + self.slug

    @property
    def slug(self) -> str:
        return self.title.lower().replace(" ", "-")


class NotJson(RankingError):
    status = 400
    title = "Not JSON"


class UpgradeRefused(RankingError):
    """The client asked for another protocol; the HTTP parser is lost to this connection."""

    status = 400
    title = "Upgrade refused"
    headers = {"Connection": "close"}


class Unauthorized(RankingError):
    status = 401
    title = "Unauthorized"
    headers = {"WWW-Authenticate": "Bearer"}


class NotFound(RankingError):
    status = 404
    title = "Not found"


class BodyTimeout(RankingError):
    status = 408
    title = "Body too slow"
    headers = {"Connection": "close"}


class TooLarge(RankingError):
    status = 413
    title = "Too large"


class UnsupportedType(RankingError):
    status = 415
    title = "Unsupported type"


class Invalid(RankingError):
    status = 422
    title = "Invalid request"

    @classmethod
    def at(cls, pointer: str, detail: str) -> "Invalid":
        return cls(f"{pointer or '/'}: {detail}", (Fault(pointer, detail),))


class Overloaded(RankingError):
    status = 429
    title = "Overloaded"
    headers = {"Retry-After": "1"}


class NotReady(RankingError):
    status = 503
    title = "Not ready"
    headers = {"Retry-After": "1"}


class OverloadedUndegraded(RankingError):
    """Overloaded, and the client did not allow a degraded answer."""

    status = 503
    title = "Overloaded and not to be degraded"
    headers = {"Retry-After": "1"}


class DeadlineExceeded(RankingError):
    status = 504
    title = "Deadline exceeded"
