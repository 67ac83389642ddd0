"""Renders every error as RFC 9457 problem details.

The errors are those of `errors.py`, faults that Pydantic finds, errors of Starlette, and unexpected errors.

Called by: `rank.py`, `auth.py`, and FastAPI through `HANDLERS`. Calls: `errors.py` and `schemas.py`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Coroutine
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from slatewise.errors import MOST_FAULTS, Fault, Invalid, NotFound, NotJson, RankingError, pointer
from slatewise.schemas import REQUEST_ID, FaultBody, Problem

log = logging.getLogger("slatewise")

TOO_MANY_FAULTS = 1_000  # faults above which they are not listed one by one

PROBLEMS: dict[int | str, dict[str, Any]] = {  # for the OpenAPI document
    status: {"model": Problem, "description": text, "content": {"application/problem+json": {}}}
    for status, text in {
        400: "The body is not JSON, or its coding is broken.",
        401: "The API key is missing or wrong.",
        404: "No such ranker, variant or path.",
        408: "The body did not arrive in time.",
        413: "The body is too long, as sent or inflated.",
        415: "The body's type or coding is not supported.",
        422: "A member is missing, unknown or outside its limits: `errors[].pointer` says which.",
        429: "Overloaded: try again after `Retry-After` seconds.",
        500: "The model failed on this request.",
        503: "Not ready, or overloaded and `allow_degraded` is false.",
        504: "The deadline passed and `allow_degraded` is false.",
    }.items()
}


def problem(error: RankingError, request_id: str | None) -> Response:
    """Build the response for an error."""
    body = Problem(
        type=error.type,
        title=error.title,
        status=error.status,
        detail=error.detail,
        error=error.detail,
        message=error.detail,
        request_id=request_id,
        errors=[FaultBody(pointer=fault.pointer, detail=fault.detail) for fault in error.faults],
    )
    headers = dict(error.headers) | ({"X-Request-ID": request_id} if request_id else {})
    return Response(body.model_dump_json(), error.status, headers, media_type="application/problem+json")


def header_request_id(headers: Headers) -> str | None:
    """Return the header X-Request-ID, or `None` if it is missing or not a valid id."""
    identifier = headers.get("x-request-id", "")
    return identifier if re.fullmatch(REQUEST_ID, identifier) else None


def schema_error(error: ValidationError) -> RankingError:
    """Convert Pydantic's error to Invalid or NotJson. The faults do not repeat the values that were sent."""
    if error.error_count() > TOO_MANY_FAULTS:
        return Invalid.at("", f"more than {TOO_MANY_FAULTS} faults")
    faults: dict[str, Fault] = {}
    for found in error.errors(include_url=False, include_input=False, include_context=False):
        if found["type"] == "json_invalid":
            return NotJson(found["msg"])
        where = pointer(*member_path(found["loc"]))
        if where in faults:
            faults[where] = Fault(where, f"{faults[where].detail}, or: {found['msg']}"[:400])
        elif len(faults) < MOST_FAULTS:
            faults[where] = Fault(where, found["msg"][:300])
    first = next(iter(faults.values()))
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return Invalid(f"{first.pointer or '/'}: {first.detail}{more}", tuple(faults.values()))


def member_path(location: tuple[int | str, ...]) -> list[int | str]:
    """Convert Pydantic's location to a path in the body: without branches of unions and keys of dictionaries."""
    path = [step for step in location if not str(step).startswith(("constrained-", "list["))]
    return path[:-1] if path[-1:] == ["[key]"] else path


async def on_ranking_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RankingError)
    return problem(error, header_request_id(request.headers))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Render Starlette's own errors, for an unknown path or method."""
    assert isinstance(error, HTTPException)
    wrapped = NotFound("no such path") if error.status_code == 404 else RankingError(str(error.detail))
    wrapped.status = error.status_code
    if error.status_code != 404:
        wrapped.title = str(error.detail)
    wrapped.headers = dict(error.headers or {})
    return problem(wrapped, header_request_id(request.headers))


async def on_unexpected_error(request: Request, error: Exception) -> Response:
    return problem(unexpected(error), header_request_id(request.headers))


def unexpected(error: Exception) -> RankingError:
    """Log the error with its traceback. Return the error to send, which does not contain them."""
    log.error("unexpected error", exc_info=error)
    return RankingError("an unexpected error; the log has more")


HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    RankingError: on_ranking_error,
    HTTPException: on_http_exception,
    Exception: on_unexpected_error,
}
