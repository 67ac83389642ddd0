"""The errors of a request: each class is one problem type of RFC 9457.

    bytes ---> JSON ---> RankRequest ---> arrays ---> result
           |         |               |            |
           |         |               |            +-- DeadlineExceeded 504, RankingError 500
           |         |               +--------------- NotFound 404, Invalid 422, OverloadedUndegraded 503
           |         +------------------------------- Invalid 422
           +----------------------------------------- NotJson and UpgradeRefused 400, BodyTimeout 408, TooLarge 413,
                                                      UnsupportedType 415

Checked before the body is read: BadRequest 400, HeadersTooSlow 408, HeadersTooLarge 431, NoPlace 503 (by
`http/connection.py`), then Unauthorized 401 and TooManyRequests 429; when it has arrived, NotReady 503 and Overloaded
429. Of commands to `/admin`: Conflict 409, Refused 422.

The detail of an error is sent to the client: it names limits and never repeats values.

Called by: `http/` and `ranking/`; `http/problems.py` renders the errors.
"""

from dataclasses import dataclass
from math import ceil

MOST_FAULTS = 20  # most faults in one response
LATER = "try again after the seconds of Retry-After"


def pointer(*path: str | int) -> str:
    """Build an RFC 6901 pointer into the request body. Each step is cut at 100 characters: clients choose the names."""
    return "".join("/" + str(step)[:100].replace("~", "~0").replace("/", "~1") for step in path)


@dataclass(frozen=True)
class Fault:
    """One wrong member of a request: an RFC 6901 pointer into the body, and the reason."""

    pointer: str
    detail: str


class RankingError(Exception):
    """Base class of all errors; itself an internal error. Subclasses set `status`, `title` and `headers`."""

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
        """Return the title in lower case with hyphens, for the problem type and the request log."""
        return self.title.lower().replace(" ", "-")


class BadRequest(RankingError):
    """The headers are not those of an HTTP/1.1 request, or contradict each other."""

    status = 400
    title = "Bad request"


class HeadersTooSlow(RankingError):
    status = 408
    title = "Headers too slow"


class HeadersTooLarge(RankingError):
    status = 431
    title = "Headers too large"


class NoPlace(RankingError):
    """The server has no place for another connection."""

    status = 503
    title = "Too many connections"
    headers = {"Retry-After": "1"}


class NotJson(RankingError):
    status = 400
    title = "Not JSON"


class UpgradeRefused(RankingError):
    """The client asked for another protocol. The HTTP parser has dropped the body, so the connection is closed."""

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


class Conflict(RankingError):
    """The command cannot be carried out now. It changed nothing."""

    status = 409
    title = "Conflict"
    headers = {"Retry-After": "1"}


class Refused(RankingError):
    """A version cannot be served; the one that was served still is.

    again: whether its folder may become good without seeming to change: bytes or vectors may still arrive.
    """

    status = 422
    title = "Version refused"

    def __init__(self, detail: str, faults: tuple[Fault, ...] = (), again: bool = False) -> None:
        super().__init__(detail, faults)
        self.again = again


class BodyTimeout(RankingError):
    status = 408
    title = "Body too slow"
    headers = {"Connection": "close"}


class TooLarge(RankingError):
    status = 413
    title = "Too large"

    @classmethod
    def body(cls, limit: int) -> "TooLarge":
        """Build the error for a body that is longer, as sent, than `limit` bytes."""
        return cls(f"the body is longer than {limit} bytes")


class UnsupportedType(RankingError):
    status = 415
    title = "Unsupported type"


class Invalid(RankingError):
    status = 422
    title = "Invalid request"

    @classmethod
    def at(cls, pointer: str, detail: str) -> "Invalid":
        """Build the error for a single fault."""
        return cls.of((Fault(pointer, detail),))

    @classmethod
    def of(cls, faults: tuple[Fault, ...]) -> "Invalid":
        """Build the error for faults. The detail has the first three."""
        texts = [f"{fault.pointer or '/'}: {fault.detail}" for fault in faults[:3]]
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        return cls("; ".join(texts) + more, faults)


class Overloaded(RankingError):
    """Too many requests. seconds: until the work in progress is done."""

    status = 429
    title = "Overloaded"

    def __init__(self, detail: str, faults: tuple[Fault, ...] = (), *, seconds: float = 0.0) -> None:
        super().__init__(detail, faults)
        self.headers = {"Retry-After": str(max(1, ceil(seconds)))}


class TooManyRequests(Overloaded):
    """More than a key or an address may ask, whatever the load is. seconds: until another request has a chance."""

    title = "Too many requests"


class NotReady(RankingError):
    status = 503
    title = "Not ready"
    headers = {"Retry-After": "1"}


class OverloadedUndegraded(Overloaded):
    """The server is overloaded and the request has `allow_degraded: false`."""

    status = 503
    title = "Overloaded and not to be degraded"


class StoreFault(RankingError):
    """Redis did not take a write. The client may repeat the request: events and deletions are idempotent."""

    status = 503
    title = "Store fault"
    headers = {"Retry-After": "1"}


class DeadlineExceeded(RankingError):
    status = 504
    title = "Deadline exceeded"
