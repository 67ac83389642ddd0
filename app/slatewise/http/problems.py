"""Renders every error as RFC 9457 problem details.

The errors are those of `errors.py`, faults that Pydantic finds, errors of Starlette, and unexpected errors.

Called by: `rank.py`, `auth.py`, and FastAPI through `HANDLERS`. Calls: `errors.py` and `schemas.py`.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Coroutine
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from slatewise.errors import MOST_FAULTS, Fault, Invalid, NotFound, NotJson, RankingError, pointer
from slatewise.http.trace_context import caller_of
from slatewise.logs import fields
from slatewise.schemas import REQUEST_ID, FaultBody, Problem

log = logging.getLogger("slatewise")

TOO_MANY_FAULTS = 1_000  # faults above which they are not listed one by one

PROBLEMS: dict[int | str, dict[str, Any]] = {  # for the OpenAPI document
    status: {"model": Problem, "description": text, "content": {"application/problem+json": {}}}
    for status, text in {
        400: "The headers contradict each other, or the body is not JSON, or its coding is broken.",
        401: "The API key is missing or wrong.",
        404: "No such ranker, variant or path.",
        408: "The headers or the body did not arrive in time.",
        409: "Another command is in progress, or this one does not fit the state.",
        413: "The body is too long, as sent or inflated.",
        415: "The body's type or coding is not supported.",
        422: "A member is missing, unknown or outside its limits: `errors[].pointer` says which.",
        429: "Overloaded, or above a limit of the key: try again after `Retry-After` seconds.",
        431: "The headers are too large.",
        500: "The model failed on this request.",
        503: "Not ready, too many connections, or overloaded and `allow_degraded` is false.",
        504: "The deadline passed and `allow_degraded` is false.",
    }.items()
}


def problem(error: RankingError, request_id: str) -> Response:
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
    headers = {**error.headers, "X-Request-ID": request_id}
    return Response(body.model_dump_json(), error.status, headers, media_type="application/problem+json")


def new_request_id() -> str:
    """Return a random id of 80 bits. It is unique, but not secret. Cheap: no system call."""
    return f"{random.getrandbits(80):020x}"


def request_id_of(headers: Headers) -> str:
    """Return the header X-Request-ID, or a new id if it is missing or not a valid one."""
    identifier = headers.get("x-request-id", "")
    return identifier if re.fullmatch(REQUEST_ID, identifier) else new_request_id()


def schema_error(error: ValidationError) -> RankingError:
    """Convert Pydantic's error to Invalid or NotJson. The faults do not repeat the values that were sent."""
    if error.error_count() > TOO_MANY_FAULTS:
        return Invalid.at("", f"more than {TOO_MANY_FAULTS} faults")
    found = error.errors(include_url=False, include_input=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        return NotJson(found[0]["msg"])
    return faults_of(found, lambda fault: fault["msg"])


def faults_of(errors: list[ErrorDetails], describe: Callable[[ErrorDetails], str]) -> Invalid:
    """Build the error for the faults of a body, each with the text that `describe` returns.

    Faults of the same member, such as those of the branches of a union, become one.
    """
    faults: dict[str, Fault] = {}
    for found in errors:
        where = pointer(*member_path(found["loc"]))
        if where not in faults and len(faults) == MOST_FAULTS:
            continue
        text = describe(found)[:300]
        if where not in faults:
            faults[where] = Fault(where, text)
        elif text not in faults[where].detail:
            faults[where] = Fault(where, f"{faults[where].detail}, or: {text}"[:400])
    return Invalid.of(tuple(faults.values()))


def member_path(location: tuple[int | str, ...]) -> list[int | str]:
    """Convert Pydantic's location to a path in the body: without branches of unions and keys of dictionaries."""
    path = [step for step in location if not str(step).startswith(("constrained-", "list["))]
    return path[:-1] if path[-1:] == ["[key]"] else path


async def on_ranking_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RankingError)
    return problem(error, request_id_of(request.headers))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Render Starlette's own errors, for an unknown path or method."""
    assert isinstance(error, HTTPException)
    wrapped = NotFound("no such path") if error.status_code == 404 else RankingError(str(error.detail))
    wrapped.status = error.status_code
    if error.status_code != 404:
        wrapped.title = str(error.detail)
    wrapped.headers = dict(error.headers or {})
    return problem(wrapped, request_id_of(request.headers))


async def on_unexpected_error(request: Request, error: Exception) -> Response:
    return problem(unexpected(error, request.headers), request_id_of(request.headers))


def unexpected(error: Exception, headers: Headers) -> RankingError:
    """Log the error with its traceback and the caller's trace. Return the error to send, which has neither."""
    caller = caller_of(headers)
    log.error("unexpected error", exc_info=error, extra=fields({} if caller is None else caller.ids()))
    return RankingError("an unexpected error; the log has more")


HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    RankingError: on_ranking_error,
    HTTPException: on_http_exception,
    Exception: on_unexpected_error,
}
