"""The ASGI application: middleware, routes, problem responses."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from slatewise import VERSION, metrics
from slatewise.errors import NotFound, RankingError, Unauthorized
from slatewise.http.rank import request_id, rerank, routes, score
from slatewise.http.request_log import open_request_log
from slatewise.ranking.pipeline import Pipeline
from slatewise.schemas import Problem, RankRequest
from slatewise.settings import Settings

log = logging.getLogger("slatewise")


class Gate:
    """Before the routes: notes when a request entered, where its deadline starts, and asks for a key where keys are set.

    The ranking endpoints are called from here: what FastAPI does around an endpoint (matching, dependencies, exit stacks)
    costs more than reading the request does (docs/performance.md), and they use none of it.
    """

    OPEN = ("/livez", "/readyz", "/metrics")
    RANKING = {"/rerank": rerank, "/score": score}

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope["slatewise.entered"] = time.perf_counter()
        request = Request(scope, receive)
        endpoint = self.RANKING.get(scope["path"])
        try:
            if self.keys and scope["path"] not in self.OPEN and not self.admits(request.headers):
                metrics.REJECTED.labels("key").inc()
                raise Unauthorized("an `Authorization: Bearer` header with a valid key is needed")
            if endpoint is None or scope["method"] != "POST":
                return await self.app(scope, receive, send)
            response = await endpoint(request)
        except RankingError as error:
            response = problem(request, error)
        await response(scope, receive, send)

    def admits(self, headers: Headers) -> bool:
        """Every key is compared, in constant time."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        matches = [
            hmac.compare_digest(given.strip().encode("latin-1"), key) for key in self.keys
        ]  # the bytes as they came
        return scheme.lower() == "bearer" and any(matches)


def problem(request: Request, error: RankingError) -> Response:
    """RFC 9457 problem details, with the request's id: the body's where it was read, else the header's."""
    identifier = request_id(request)
    body = Problem(
        type=error.type,
        title=error.title,
        status=error.status,
        detail=error.detail,
        error=error.detail,
        message=error.detail,
        request_id=identifier,
        errors=[{"pointer": fault.pointer, "detail": fault.detail} for fault in error.faults],
    )
    headers = dict(error.headers) | ({"X-Request-ID": identifier} if identifier else {})
    return Response(body.model_dump_json(), error.status, headers, media_type="application/problem+json")


async def on_ranking_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RankingError)
    return problem(request, error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, or no such method."""
    assert isinstance(error, HTTPException)
    wrapped = NotFound("no such path") if error.status_code == 404 else RankingError(str(error.detail))
    wrapped.status = error.status_code
    wrapped.title = "Not found" if error.status_code == 404 else str(error.detail)
    wrapped.headers = dict(error.headers or {})
    return problem(request, wrapped)


async def on_any_error(request: Request, error: Exception) -> Response:
    log.exception("unexpected error", exc_info=error)
    return problem(request, RankingError("an unexpected error; the log has more"))


def create_app(settings: Settings, open_pipeline: Callable[[], AbstractAsyncContextManager[Pipeline]]) -> FastAPI:
    """The application; `open_pipeline` opens the parts that rank, for the lifespan of the application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with open_request_log(settings) as app.state.lines:
            async with open_pipeline() as app.state.pipeline:
                yield
                app.state.pipeline = None

    app = FastAPIOffline(
        title="Slatewise",
        version=VERSION,
        description="Ranks candidates for a user.",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={RankingError: on_ranking_error, HTTPException: on_http_exception, Exception: on_any_error},
    )
    app.state.settings = settings
    app.state.in_flight = 0
    app.state.pipeline = None
    app.state.draining = False
    app.include_router(routes)
    app.add_middleware(Gate, keys=settings.keys())
    describe_request(app)
    return app


def describe_request(app: FastAPI) -> None:
    """Put RankRequest, which the routes parse themselves, into the OpenAPI document; take out the fault of FastAPI's own parsing."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        schema = RankRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        document["components"]["schemas"].update(schema.pop("$defs", {}))
        document["components"]["schemas"]["RankRequest"] = schema
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        document["paths"]["/models/{ranker}"]["get"]["responses"].pop("422", None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
