"""The ASGI application: middleware, hot routes, FastAPI's routes and their documentation.

Hot routes are those that rank, native and foreign; they bypass FastAPI.

Called by: `main.py`. Calls: the other files of this folder, except `server.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware import Middleware

from slatewise import VERSION
from slatewise.http import health, models
from slatewise.http.auth import RequireKey
from slatewise.http.calls import aws, cohere, metarank, model_list, oip, tei
from slatewise.http.capture import open_capture
from slatewise.http.hot_routes import HotRoutes, Routes, document_hot_routes
from slatewise.http.problems import HANDLERS
from slatewise.http.rank import RERANK, SCORE
from slatewise.http.request_log import open_request_log
from slatewise.ranking.pipeline import Pipeline
from slatewise.settings import Settings

ROUTES = Routes((RERANK, SCORE, *cohere.DIALECTS, aws.DIALECT, metarank.DIALECT, *oip.DIALECTS, tei.DIALECT))


def create_app(settings: Settings, open_pipeline: Callable[[], AbstractAsyncContextManager[Pipeline]]) -> FastAPI:
    """Build the application. It opens the pipeline with `open_pipeline` when it starts, and closes it when it ends."""
    middleware = [  # outermost first
        Middleware(RequireKey, keys=settings.keys(), routes=ROUTES),
        Middleware(HotRoutes, routes=ROUTES),  # last, because hot routes bypass the layers after it
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
    )
    app.state.pipeline = None
    app.state.draining = False
    app.state.capture = None
    app.include_router(health.routes)
    app.include_router(models.routes)
    app.include_router(model_list.routes)
    app.include_router(oip.routes)
    document_hot_routes(app, ROUTES.dialects)
    return app
