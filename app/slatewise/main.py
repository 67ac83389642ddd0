"""The assembly: settings to parts, parts to an application. python -m slatewise.main serves it.

The rankers are loaded before the port is opened; `open_pipeline` lists the other parts, opened and closed by the lifespan.
"""

from __future__ import annotations

import asyncio
import ctypes
import hmac
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from slatewise import VERSION, metrics
from slatewise.bundle.loader import Ranker, load_rankers
from slatewise.bundle.manifest import ManifestError
from slatewise.errors import NotFound, RankingError, Unauthorized
from slatewise.http.rank import request_id, rerank, routes, score
from slatewise.http.request_log import open_request_log
from slatewise.inference.workers import Workers
from slatewise.ranking.history_cache import HistoryCache
from slatewise.ranking.pipeline import Pipeline
from slatewise.schemas import Problem, RankRequest
from slatewise.settings import Settings
from slatewise.store.lookup import EmbeddedStore, RedisStore, Store

log = logging.getLogger("slatewise")

LARGE_BLOCK = 2 << 20  # bytes: no tensor of an ordinary request is larger
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3  # of mallopt(3)


def cpu_quota() -> int:
    """Whole CPUs that the cgroup lets this process use: its quota where there is one, else what it may be scheduled on."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def memory_limit() -> int:
    """Bytes: the cgroup's limit where there is one, else the machine's memory."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return machine if limit == "max" else min(machine, int(limit))
    except (OSError, ValueError):
        return machine


@asynccontextmanager
async def open_pipeline(settings: Settings, rankers: dict[str, Ranker]) -> AsyncIterator[Pipeline]:
    """The parts in order, each opened and closed here."""
    async with AsyncExitStack() as stack:
        threads = settings.threads or cpu_quota()
        workers = await stack.enter_async_context(Workers(threads))
        metrics.THREADS.set(threads)
        metrics.MEMORY_LIMIT.set(memory_limit())
        metrics.IN_FLIGHT_LIMIT.set(settings.max_in_flight)
        metrics.OUTSTANDING_TOKENS_LIMIT.set(settings.max_outstanding_tokens)
        metrics.HISTORY_CACHE_LIMIT.set(int(settings.history_cache_mb * 2**20))
        url = settings.redis_url.get_secret_value()
        store: Store = EmbeddedStore(settings.embedding_max_age_s)
        if url:
            redis = RedisStore(
                url,
                settings.redis_timeout_ms / 1e3,
                rankers.values(),
                cache_seconds=settings.embedding_cache_s,
                cache_users=settings.embedding_cache_users,
                max_age_seconds=settings.embedding_max_age_s,
            )
            store = await stack.enter_async_context(redis)
        yield Pipeline(
            rankers,
            store,
            HistoryCache(int(settings.history_cache_mb * 2**20)),
            workers,
            max_candidates=settings.max_candidates,
            max_history=settings.max_history,
            max_outstanding_tokens=settings.max_outstanding_tokens,
            default_deadline_ms=settings.deadline_ms,
            pack_history=settings.history_cache_dtype == "int8",
        )


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


def create_app(settings: Settings, rankers: dict[str, Ranker]) -> FastAPI:
    """The application on rankers that are loaded and warm."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with open_request_log(settings) as app.state.lines:
            async with open_pipeline(settings, rankers) as app.state.pipeline:
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


class Server(uvicorn.Server):
    """SIGTERM drains: /readyz says no, requests are served on for a while, then those in flight end, and the exit status is 0.

    A second SIGTERM skips the wait; SIGINT stops at once.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_seconds: float) -> None:
        super().__init__(config)
        self.app = app
        self.drain_seconds = drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig != signal.SIGTERM:
            super().handle_exit(sig, frame)
        elif self.app.state.draining or not self.started:
            self.should_exit = True
        else:
            self.app.state.draining = True
            asyncio.get_running_loop().call_later(self.drain_seconds, setattr, self, "should_exit", True)


def bound_malloc() -> None:
    """Where the C library is glibc: blocks above LARGE_BLOCK go back to the system when they are freed, and so does the end of the heap.

    By itself glibc keeps them, and a server grows with the largest requests that ever came together (docs/performance.md).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, 4 * LARGE_BLOCK)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # while the rankers load
    try:
        settings = Settings()
        bound_malloc()
        begin = time.perf_counter()
        rankers = load_rankers(settings.bundles, settings.threads or cpu_quota(), settings.chosen_variants())
    except (ValidationError, ManifestError) as error:
        raise SystemExit(str(error)) from None
    for ranker in rankers.values():
        metrics.MODEL_LOAD.labels(ranker.name).set(time.perf_counter() - begin)
        for variant in ranker.engines:
            metrics.MODEL_INFO.labels(ranker.name, str(ranker.manifest.version), variant).set(1)
        log.info("serving %s version %d, variants %s", ranker.name, ranker.manifest.version, ", ".join(ranker.engines))
    log.info("listening on http://%s:%d", settings.host, settings.port)
    app = create_app(settings, rankers)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # nobody reads the client's address
        timeout_graceful_shutdown=30,
        server_header=False,
    )
    Server(config, app, settings.drain_seconds).run()


if __name__ == "__main__":
    main()
