"""The ASGI application: middleware, hot routes, FastAPI's routes and their documentation.

Hot routes are those that rank, native and foreign; they bypass FastAPI.

Called by: `main.py`. Calls: the other files of this folder, except `server.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import Scope

from slatewise import VERSION
from slatewise.events.writer import EventWriter
from slatewise.http import admin, events, health, items, models
from slatewise.http.auth import OPEN_PATHS, PAGE_PATHS, RequireKey
from slatewise.http.calls import aws, cohere, metarank, model_list, oip, tei
from slatewise.http.calls.common import WARNINGS
from slatewise.http.capture import open_capture
from slatewise.http.head import AnswerHead
from slatewise.http.hot_routes import HotRoutes, Routes, document_hot_routes
from slatewise.http.keys import Keys, open_keys
from slatewise.http.openapi import complete, describe_admin_key, example_request, require_key
from slatewise.http.page import page_routes
from slatewise.http.problems import HANDLERS, on_unexpected_error
from slatewise.http.rank import RERANK, SCORE
from slatewise.http.request_log import open_request_log
from slatewise.http.reread import Watched, following, look
from slatewise.http.telemetry import fastapi_telemetry, open_tracing
from slatewise.http.whole_bodies import WholeBodies
from slatewise.http.wrong_keys import WrongKeys
from slatewise.ranking.pipeline import Pipeline
from slatewise.ranking.versions import Versions
from slatewise.settings import Settings
from slatewise.version_schemas import VersionBody

FOREIGN_HEADERS = (WARNINGS, aws.ERROR_TYPE, oip.HEADER_LENGTH)  # of the answers of foreign calls
ROUTES = Routes((RERANK, SCORE, *cohere.DIALECTS, aws.DIALECT, metarank.DIALECT, *oip.DIALECTS, tei.DIALECT))


def create_app(
    settings: Settings,
    open_pipeline: Callable[[], AbstractAsyncContextManager[Pipeline]],
    open_events: Callable[[Pipeline], AbstractAsyncContextManager[EventWriter]],
    open_versions: Callable[[Pipeline], AbstractAsyncContextManager[Versions | None]],
) -> FastAPI:
    """Build the application. It opens pipeline, events and versions when it starts, and closes them when it ends."""
    open_paths = OPEN_PATHS + (PAGE_PATHS if settings.open_pages else ())
    seen = look((settings.api_keys_file,))
    keys, metrics_keys = open_keys(settings)
    wrong_keys = WrongKeys()
    middleware = [  # outermost first
        *allow_origins(settings.origins()),
        Middleware(
            RequireKey,
            keys=keys,
            routes=ROUTES,
            open_paths=open_paths,
            metrics_keys=metrics_keys,
            wrong_keys=wrong_keys,
        ),
        Middleware(
            WholeBodies, max_body_bytes=settings.max_body_bytes, body_timeout_s=settings.body_timeout_s
        ),  # behind the check of keys: a client without one is answered before its body is read
        Middleware(HotRoutes, routes=ROUTES),  # hot routes bypass the layers after it
        Middleware(AnswerHead),
    ]

    tracing = open_tracing()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(following(app.state.followed))
            request_log = open_request_log(settings.slow_ms / 1e3, settings.log_format, settings.log_level)
            app.state.request_log = stack.enter_context(request_log)
            if tracing is not None:
                stack.callback(tracing.close)
            if settings.capture_file:
                most_bytes = int(settings.capture_mb * 2**20)
                key = settings.capture_key.get_secret_value().encode()
                capture = open_capture(Path(settings.capture_file), most_bytes, settings.capture_share, key)
                app.state.capture = stack.enter_context(capture)
            pipeline = await stack.enter_async_context(open_pipeline())
            app.state.events = await stack.enter_async_context(open_events(pipeline))
            app.state.versions = await stack.enter_async_context(open_versions(pipeline))
            app.state.pipeline = pipeline
            app.openapi()  # keeps its result; later it would hold the event loop for up to half a second
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
        telemetry=fastapi_telemetry(tracing, has_own_spans),
        generate_unique_id_function=lambda route: route.name,  # names of operations, which clients are generated from
    )
    app.state.pipeline = None
    app.state.draining = False
    app.state.capture = None
    app.state.versions = None
    app.state.reload_mode = settings.reload
    app.state.tracing = tracing
    app.state.max_events = settings.max_events
    app.state.followed = []  # files that are read again when they change
    if settings.api_keys_file:
        app.state.followed.append(Watched("api_keys", (settings.api_keys_file,), keys.read, seen))
    app.include_router(events.routes)  # first: requests are matched in this order, and events are the most
    app.include_router(health.routes)
    app.include_router(models.routes)
    app.include_router(items.routes)
    if settings.page:
        app.include_router(page_routes())
    app.include_router(model_list.routes)
    app.include_router(oip.routes)
    if admin_key := settings.admin_key.get_secret_value() if settings.versions_may_change() else "":
        app.include_router(admin.admin_routes(admin_key, wrong_keys))
    document_hot_routes(app, ROUTES.dialects)
    bodies = (*events.BODIES, *(admin.BODIES if admin_key else ()))
    complete_document(app, keys, open_paths, bodies)
    return app


def has_own_spans(scope: Scope) -> bool:
    """Whether FastAPI makes no span: `rank.py` makes those of hot routes, and nobody wants those of probes."""
    return scope["path"] in OPEN_PATHS or ROUTES.find(scope) is not None


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
        expose_headers=("Server-Timing", "X-Request-ID", "Retry-After", *FOREIGN_HEADERS),
    )
    return [cors, Middleware(ServerErrorMiddleware, handler=on_unexpected_error)]


def complete_document(
    app: FastAPI, keys: Keys, open_paths: tuple[str, ...], bodies: tuple[type[BaseModel], ...]
) -> None:
    """Make the OpenAPI document complete. With keys it shows no data of the rankers, since it may be open.

    That takes 20 ms of the event loop, and the document may be open, so it is done once for each example, and so is its
    text, which takes another 2 ms.
    """
    generate = app.openapi  # keeps its result
    shown: dict[str, Any] | None = None
    text: bytes | None = None

    def openapi() -> dict[str, Any]:
        nonlocal shown, text
        document = generate()
        pipeline: Pipeline | None = app.state.pipeline
        example = example_request(() if pipeline is None else pipeline.registry.serving(), not keys)
        if example != shown:
            complete(document, ROUTES.dialects, bodies, example)
            if keys:
                require_key(document, open_paths)
            if VersionBody in bodies:
                describe_admin_key(document)
            shown = example
            text = None
        return document

    async def show(_: Request) -> Response:
        nonlocal text
        document = openapi()
        if text is None:
            text = bytes(JSONResponse(document).body)
        return Response(text, media_type="application/json")

    app.openapi = openapi  # type: ignore[method-assign]
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") != app.openapi_url]
    app.add_route(str(app.openapi_url), show, include_in_schema=False)
