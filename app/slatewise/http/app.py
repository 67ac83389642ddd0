"""The ASGI application: middleware, hot routes, FastAPI's routes and their documentation.

Hot routes are the two that rank; they bypass FastAPI.

Called by: `main.py`. Calls: the other files of this folder, except `server.py`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from slatewise import VERSION
from slatewise.events.writer import EventWriter
from slatewise.http import events, health, models
from slatewise.http.auth import RequireKey
from slatewise.http.capture import open_capture
from slatewise.http.problems import HANDLERS, PROBLEMS
from slatewise.http.rank import rerank, score
from slatewise.http.request_log import open_request_log
from slatewise.ranking.pipeline import Pipeline
from slatewise.schemas import RankRequest, RankResponse
from slatewise.settings import Settings

Handler = Callable[[Request, float], Awaitable[Response]]

HOT_ROUTES: dict[tuple[str, str], Handler] = {
    ("POST", "/rerank"): rerank,
    ("POST", "/score"): score,
}


def create_app(
    settings: Settings,
    open_pipeline: Callable[[], AbstractAsyncContextManager[Pipeline]],
    open_events: Callable[[Pipeline], AbstractAsyncContextManager[EventWriter]],
) -> FastAPI:
    """Build the application. It opens pipeline and writer of events when it starts, and closes them when it ends."""
    middleware = [  # outermost first
        Middleware(RequireKey, keys=settings.keys(), counted=HOT_ROUTES.keys()),
        Middleware(HotRoutes, table=HOT_ROUTES),  # last, because hot routes bypass the layers after it
    ]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            app.state.request_log = stack.enter_context(open_request_log(settings.slow_ms / 1e3))
            if settings.capture_file:
                most_bytes = int(settings.capture_mb * 2**20)
                key = settings.capture_key.get_secret_value().encode()
                capture = open_capture(Path(settings.capture_file), most_bytes, settings.capture_share, key)
                app.state.capture = stack.enter_context(capture)
            pipeline = await stack.enter_async_context(open_pipeline())
            app.state.events = await stack.enter_async_context(open_events(pipeline))
            app.state.pipeline = pipeline
            yield
            app.state.pipeline = None

    app = FastAPIOffline(
        title="Slatewise",
        version=VERSION,
        description="Ranks candidates for a user.",
        lifespan=lifespan,
        middleware=middleware,
        exception_handlers=HANDLERS,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.pipeline = None
    app.state.draining = False
    app.state.capture = None
    app.state.max_events = settings.max_events
    app.include_router(health.routes)
    app.include_router(models.routes)
    app.include_router(events.routes)
    document_hot_routes(app)
    events.document_events(app)
    return app


class HotRoutes:
    """Middleware that calls the handlers of its table directly, and passes all other requests on to FastAPI.

    FastAPI's layers around an endpoint (matching, dependencies, exit stacks) cost more time than reading the request
    (docs/performance.md), and these handlers do not need them. A handler receives the time at which its call began,
    and responds to errors itself.
    """

    def __init__(self, app: ASGIApp, table: Mapping[tuple[str, str], Handler]) -> None:
        self.app = app
        self.table = table

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self.table.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if handler is None:
            return await self.app(scope, receive, send)
        entered = time.perf_counter()
        response = await handler(Request(scope, receive), entered)
        await response(scope, receive, send)


def document_hot_routes(app: FastAPI) -> None:
    """Add the hot routes to the router, for two purposes: the OpenAPI document, and status 405 for other methods.

    The handlers parse the body themselves. So the schema of the body is added here, and FastAPI's validation errors,
    which never occur, are removed.
    """
    schema = {"$ref": "#/components/schemas/RankRequest"}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    for (method, path), handler in HOT_ROUTES.items():
        app.add_api_route(
            path,
            never_called,
            methods=[method],
            name=handler.__name__,
            description=handler.__doc__,
            response_model=RankResponse,
            responses=PROBLEMS,
            openapi_extra={"requestBody": body},
        )
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


async def never_called(request: Request) -> Response:
    """Endpoint of the hot routes in the router. Never runs, because `HotRoutes` answers these requests first."""
    raise NotImplementedError
