"""The errors of a call. Each problem type of the server has a class of the same name, found by its slug.

    SlatewiseError
      Invalid NotJson UnsupportedType TooLarge Unauthorized NotFound   the request is wrong: asking again is no help
      BodyTimeout UpgradeRefused                                       the connection failed the request
      Overloaded OverloadedUndegraded NotReady StoreFault              later: `retry_after` seconds
      DeadlineExceeded                                                 the deadline passed; never repeated by the client
      ServerFault                                                      the server failed, or something in front of it
      ConnectionFailed TimedOut                                        no answer

Called by: every file of this folder, `local/` and `commands/`. `slatewise/errors.py` has the server's half.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Fault:
    """One wrong member of a request: an RFC 6901 pointer into the body, and the reason."""

    pointer: str
    detail: str

    def __str__(self) -> str:
        return f"{self.pointer or '/'}: {self.detail}"


class SlatewiseError(Exception):
    """Base class of all errors of a call.

    status: of the answer; `None` without an answer. slug: of the problem type; empty if the answer is not a problem of
    the server. retry_after: seconds that the server asks to wait, if it does.
    """

    slug: str = ""
    status: int | None = None

    def __init__(
        self,
        detail: str,
        faults: Iterable[Fault] = (),
        *,
        status: int | None = None,
        slug: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.faults = tuple(faults)
        self.request_id = request_id
        self.retry_after = retry_after
        if status is not None:
            self.status = status
        if slug is not None:
            self.slug = slug

    def __str__(self) -> str:
        return self.detail if self.request_id is None else f"{self.detail} (request {self.request_id})"


class BadRequest(SlatewiseError):
    """The headers are not those of an HTTP/1.1 request, or contradict each other."""

    status = 400
    slug = "bad-request"


class HeadersTooSlow(SlatewiseError):
    status = 408
    slug = "headers-too-slow"


class HeadersTooLarge(SlatewiseError):
    status = 431
    slug = "headers-too-large"


class NoPlace(SlatewiseError):
    """The server has no place for another connection."""

    status = 503
    slug = "too-many-connections"


class NotJson(SlatewiseError):
    status = 400
    slug = "not-json"


class UpgradeRefused(SlatewiseError):
    status = 400
    slug = "upgrade-refused"


class Unauthorized(SlatewiseError):
    status = 401
    slug = "unauthorized"


class NotFound(SlatewiseError):
    """No such ranker, variant or path."""

    status = 404
    slug = "not-found"


class BodyTimeout(SlatewiseError):
    status = 408
    slug = "body-too-slow"


class TooLarge(SlatewiseError):
    status = 413
    slug = "too-large"


class UnsupportedType(SlatewiseError):
    status = 415
    slug = "unsupported-type"


class Invalid(SlatewiseError, ValueError):
    """A member is missing, unknown or outside its limits: see `faults`.

    The client raises it too, before it sends anything, for values that JSON cannot express.
    """

    status = 422
    slug = "invalid-request"

    @classmethod
    def at(cls, pointer: str, detail: str) -> Invalid:
        fault = Fault(pointer, detail)
        return cls(str(fault), (fault,))


class Conflict(SlatewiseError):
    """A command to `/admin` cannot be carried out now. It changed nothing."""

    status = 409
    slug = "conflict"


class Refused(SlatewiseError):
    """A version cannot be served; the one that was served still is."""

    status = 422
    slug = "version-refused"


class Overloaded(SlatewiseError):
    status = 429
    slug = "overloaded"


class TooManyRequests(Overloaded):
    """More requests than the operator allows this key, or too many wrong keys from this address."""

    slug = "too-many-requests"


class NotReady(SlatewiseError):
    status = 503
    slug = "not-ready"


class OverloadedUndegraded(SlatewiseError):
    """The server is overloaded and the request has `allow_degraded=False`."""

    status = 503
    slug = "overloaded-and-not-to-be-degraded"


class StoreFault(SlatewiseError):
    """Redis did not take events or a deletion. Both may be repeated."""

    status = 503
    slug = "store-fault"


class DeadlineExceeded(SlatewiseError):
    status = 504
    slug = "deadline-exceeded"


class ServerFault(SlatewiseError):
    """The server failed on the request, or the answer is not one of a Slatewise server."""

    status = 500
    slug = "internal-error"


class ConnectionFailed(SlatewiseError, ConnectionError):
    """No connection to the server, or it broke. `sent`: the server may have received the request."""

    sent: ClassVar[bool] = False


class ConnectionLost(ConnectionFailed):
    """The connection broke after the request was sent, so it is not repeated."""

    sent = True


class TimedOut(SlatewiseError, TimeoutError):
    """No answer within the client's `timeout`. The request is not repeated: the server may still work on it."""


OF_THE_SERVER: tuple[type[SlatewiseError], ...] = (
    BadRequest,
    HeadersTooSlow,
    HeadersTooLarge,
    NoPlace,
    NotJson,
    UpgradeRefused,
    Unauthorized,
    NotFound,
    BodyTimeout,
    TooLarge,
    UnsupportedType,
    Invalid,
    Conflict,
    Refused,
    Overloaded,
    TooManyRequests,
    NotReady,
    OverloadedUndegraded,
    StoreFault,
    DeadlineExceeded,
    ServerFault,
)
BY_SLUG = {kind.slug: kind for kind in OF_THE_SERVER}
# For an answer without a known slug: a newer server, or a proxy. A proxy's 504 says nothing of the request's deadline.
BY_STATUS: dict[int | None, type[SlatewiseError]] = {
    401: Unauthorized,
    404: NotFound,
    413: TooLarge,
    422: Invalid,
    429: Overloaded,
    503: NotReady,
}


def from_problem(status: int, problem: Mapping[str, Any], retry_after: float | None = None) -> SlatewiseError:
    """Build the error for an RFC 9457 problem. Members of any type are accepted: a proxy may have written them."""
    slug = str(problem.get("type") or "").rpartition(":")[2]
    default = SlatewiseError if 300 <= status < 500 else ServerFault  # also a 200 that is no answer
    kind = BY_SLUG.get(slug) or BY_STATUS.get(status, default)
    listed = problem.get("errors")
    faults = [
        Fault(str(fault.get("pointer", "")), str(fault.get("detail", "")))
        for fault in (listed if isinstance(listed, list) else [])
        if isinstance(fault, Mapping)
    ]
    identifier = problem.get("request_id")
    return kind(
        str(problem.get("detail") or problem.get("title") or f"the answer has status {status}"),
        faults,
        status=status,
        slug=slug,
        request_id=None if identifier is None else str(identifier),
        retry_after=retry_after,
    )
