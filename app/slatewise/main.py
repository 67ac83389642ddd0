"""The assembly: settings to parts, parts to an application. python -m slatewise.main serves it.

The rankers are loaded before the port is opened; `open_pipeline` lists the other parts, opened and closed by the lifespan.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from slatewise import metrics
from slatewise.bundle.loader import load_rankers
from slatewise.bundle.manifest import ManifestError
from slatewise.bundle.ranker import Ranker
from slatewise.http.app import create_app
from slatewise.inference.workers import Workers
from slatewise.process import bound_malloc, cpu_quota, memory_limit
from slatewise.ranking.admission import Admission, RequestLimits
from slatewise.ranking.history_cache import HistoryCache
from slatewise.ranking.pipeline import Pipeline
from slatewise.ranking.registry import Registry
from slatewise.settings import Settings
from slatewise.store.lookup import EmbeddedStore, RedisStore, Store

log = logging.getLogger("slatewise")


@asynccontextmanager
async def open_pipeline(settings: Settings, rankers: dict[str, Ranker]) -> AsyncIterator[Pipeline]:
    """The parts in order, each opened and closed here."""
    async with AsyncExitStack() as stack:
        threads = settings.threads or cpu_quota()
        workers = await stack.enter_async_context(Workers(threads))
        metrics.THREADS.set(threads)
        metrics.MEMORY_LIMIT.set(memory_limit())
        metrics.HISTORY_CACHE_LIMIT.set(int(settings.history_cache_mb * 2**20))
        registry = Registry(rankers.values())
        limits = RequestLimits(
            max_in_flight=settings.max_in_flight,
            max_outstanding_tokens=settings.max_outstanding_tokens,
            max_body_bytes=settings.max_body_bytes,
            body_timeout_s=settings.body_timeout_s,
            max_candidates=settings.max_candidates,
            max_history=settings.max_history,
            deadline_ms=settings.deadline_ms,
        )
        url = settings.redis_url.get_secret_value()
        store: Store = EmbeddedStore(settings.embedding_max_age_s)
        if url:
            redis = RedisStore(
                url,
                settings.redis_timeout_ms / 1e3,
                registry.serving(),
                cache_seconds=settings.embedding_cache_s,
                cache_users=settings.embedding_cache_users,
                max_age_seconds=settings.embedding_max_age_s,
            )
            store = await stack.enter_async_context(redis)
        yield Pipeline(
            registry,
            store,
            HistoryCache(int(settings.history_cache_mb * 2**20)),
            workers,
            Admission(limits),
            pack_history=settings.history_cache_dtype == "int8",
        )


def build_app(settings: Settings, rankers: dict[str, Ranker]) -> FastAPI:
    """The application on rankers that are loaded and warm."""
    return create_app(settings, partial(open_pipeline, settings, rankers))


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
        log.info("serving %s version %d, variants %s", ranker.name, ranker.manifest.version, ", ".join(ranker.engines))
    log.info("listening on http://%s:%d", settings.host, settings.port)
    app = build_app(settings, rankers)
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
