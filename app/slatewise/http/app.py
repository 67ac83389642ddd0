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
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from slatewise import VERSION
from slatewise.http import health, items, models
from slatewise.http.auth import OPEN_PATHS, PAGE_PATHS, RequireKey
from slatewise.http.capture import open_capture
from slatewise.http.openapi import complete, example_request, require_key
from slatewise.http.page import page_routes
from slatewise.http.problems import HANDLERS, PROBLEMS, on_unexpected_error
from slatewise.http.rank import rerank, score
from slatewise.http.request_log import open_request_log
from slatewise.ranking.pipeline import Pipeline
from slatewise.schemas import RankResponse
from slatewise.settings import Settings

Handler = Callable[[Request, float], Awaitable[Response]]

HOT_ROUTES: dict[tuple[str, str], Handler] = {
    ("POST", "/rerank"): rerank,
    ("POST", "/score"): score,
}


def create_app(settings: Settings, open_pipeline: Callable[[], AbstractAsyncContextManager[Pipeline]]) -> FastAPI:
    """Build the application. It opens the pipeline with `open_pipeline` when it starts, and closes it when it ends."""
    open_paths = OPEN_PATHS + (PAGE_PATHS if settings.open_pages else ())
    middleware = [  # outermost first
        *allow_origins(settings.origins()),
        Middleware(RequireKey, keys=settings.keys(), counted=HOT_ROUTES.keys(), open_paths=open_paths),
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
            app.state.pipeline = await stack.enter_async_context(open_pipeline())
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
        generate_unique_id_function=lambda route: route.name,  # names of operations, which clients are generated from
    )
    app.state.pipeline = None
    app.state.draining = False
    app.state.capture = None
    app.include_router(health.routes)
    app.include_router(models.routes)
    app.include_router(items.routes)
    if settings.page:
        app.include_router(page_routes())
    document_hot_routes(app)
    complete_document(app, settings.keys(), open_paths)
    return app


def allow_origins(origins: tuple[str, ...]) -> list[Middleware]:
    """Return the layers that let web pages of these origins call: outermost, so that errors carry the headers too.

    A preflight needs no key. An unexpected error is answered inside of CORSMiddleware, since Starlette's own layer for
    it is outside of all middleware.
    """
    if not origins:
        return []
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=("Server-Timing", "X-Request-ID", "Retry-After"),
    )
    return [cors, Middleware(ServerErrorMiddleware, handler=on_unexpected_error)]


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

    The handlers parse the body themselves, so the schema of the body is stated here.
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


def complete_document(app: FastAPI, keys: tuple[str, ...], open_paths: tuple[str, ...]) -> None:
    """Make the OpenAPI document complete. With keys it shows no data of the rankers, since it may be open."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        pipeline: Pipeline | None = app.state.pipeline
        complete(document, example_request(() if pipeline is None else pipeline.registry.serving(), not keys))
        if keys:
            require_key(document, open_paths)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


async def never_called(request: Request) -> Response:
    """Endpoint of the hot routes in the router. Never runs, because `HotRoutes` answers these requests first."""
    raise NotImplementedError
