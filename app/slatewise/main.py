"""`slatewise serve`: reads the settings, builds the application, and runs the server.

Bundles are loaded before the port listens, so every server that accepts a connection can rank.
Called by: cli.py. Calls: settings.py, process.py, bundle/loader.py, http/app.py, http/server.py, and the constructors
of the parts of a pipeline (ranking/, inference/workers.py, store/lookup.py).
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from fastapi import FastAPI

from slatewise import metrics
from slatewise.bundle.loader import load_rankers
from slatewise.bundle.manifest import ManifestError
from slatewise.bundle.ranker import Ranker
from slatewise.http.app import create_app
from slatewise.http.server import bind, run
from slatewise.inference.workers import Workers
from slatewise.process import bound_malloc, cpu_quota, memory_limit
from slatewise.ranking.admission import Admission, RequestLimits
from slatewise.ranking.history_cache import HistoryCache
from slatewise.ranking.pipeline import Pipeline
from slatewise.ranking.registry import Registry
from slatewise.settings import Settings, add_flags, is_link_address, read_settings
from slatewise.store.lookup import EmbeddedStore, RedisStore, Store

log = logging.getLogger("slatewise")


@asynccontextmanager
async def open_pipeline(settings: Settings, rankers: dict[str, Ranker]) -> AsyncIterator[Pipeline]:
    """Open the pipeline and its parts. Leaving the context closes them in reverse order."""
    async with AsyncExitStack() as stack:
        threads = settings.threads or cpu_quota()
        workers = await stack.enter_async_context(Workers(threads))
        metrics.THREADS.set(threads)
        metrics.MEMORY_LIMIT.set(memory_limit())
        cache = HistoryCache(int(settings.history_cache_mb * 2**20))
        metrics.HISTORY_CACHE_LIMIT.set(cache.limit_bytes)
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
                registry.serving,
                cache_seconds=settings.embedding_cache_s,
                cache_users=settings.embedding_cache_users,
                max_age_seconds=settings.embedding_max_age_s,
            )
            store = await stack.enter_async_context(redis)
        yield Pipeline(
            registry,
            store,
            cache,
            workers,
            Admission(limits),
            pack_history=settings.history_cache_dtype == "int8",
        )


def build_app(settings: Settings, rankers: dict[str, Ranker]) -> FastAPI:
    """Build the application for rankers that are loaded and warmed up."""
    return create_app(settings, partial(open_pipeline, settings, rankers))


def load(settings: Settings) -> dict[str, Ranker]:
    """Load the rankers that can be served, by name. Raises ManifestError if no ranker can be served."""
    begin = time.perf_counter()
    try:
        rankers = load_rankers(settings.bundles, settings.threads or cpu_quota(), settings.chosen_variants())
    except ManifestError as error:
        reason = " ".join(str(error).split())
        remedy = "SLATEWISE_BUNDLES (--bundles) names the folder that holds <ranker>/<version>/"
        raise ManifestError(f"{reason.removesuffix('.')}; {remedy}") from error
    for ranker in rankers.values():
        metrics.MODEL_LOAD.labels(ranker.name).set(time.perf_counter() - begin)
        log.info("serving %s version %d, variants %s", ranker.name, ranker.manifest.version, ", ".join(ranker.engines))
    return rankers


def serve(settings: Settings) -> int:
    """Serve until a signal stops the server. Return the exit code."""
    listener = bind(settings.host, settings.port)  # first: a port in use is found before the bundles load
    bound_malloc()
    return run(build_app(settings, load(settings)), listener, settings.drain_seconds)


def leave(code: int, *_: object) -> None:
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """The exit code. Raises SettingsError, AddressError or ManifestError."""
    parser = argparse.ArgumentParser(
        "slatewise serve",
        usage="%(prog)s [--setting VALUE ...]",
        description="Serve rankers over HTTP. A flag takes precedence over its variable.",
        allow_abbrev=False,
    )
    add_flags(parser)
    flags = vars(parser.parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # While the bundles load. SIGINT too: a KeyboardInterrupt inside code that a library compiles from text ends Python
    # with the signal, also if it is caught.
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, partial(leave, code))
    settings = read_settings(flags)
    if is_link_address(os.environ.get("SLATEWISE_PORT")):
        log.info("SLATEWISE_PORT is the address of a Kubernetes Service, not a setting: it is ignored")
    return serve(settings)
