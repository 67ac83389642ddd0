"""`slatewise serve`: reads the settings, builds the application, and runs the server.

Bundles are loaded before the port listens, so every server that accepts a connection can rank.
Called by: cli.py. Calls: settings.py, logs.py, process.py, bundle/loader.py, http/app.py, http/server.py, and the
constructors of the parts of a pipeline (ranking/, inference/workers.py, store/lookup.py, events/).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path

from fastapi import FastAPI

from slatewise import logs, metrics
from slatewise.bundle.loader import Lacking, load_rankers
from slatewise.bundle.manifest import Manifest, ManifestError
from slatewise.bundle.ranker import Ranker
from slatewise.bundle.trust import trusted_keys
from slatewise.environment import is_link_address
from slatewise.events.histories import EmbeddedHistories, Histories
from slatewise.events.redis_histories import RedisHistories
from slatewise.events.tap import Tap
from slatewise.events.writer import EventWriter
from slatewise.flags import add_flags, read_settings
from slatewise.http.app import create_app
from slatewise.http.door import DoorLimits
from slatewise.http.keys import open_keys
from slatewise.http.reread import Watched
from slatewise.http.server import bind, run
from slatewise.http.server_log import open_server_log
from slatewise.http.tls import ReloadedContext, TlsFiles
from slatewise.inference.workers import Workers
from slatewise.process import bound_malloc, cpu_quota, memory_limit, open_closed_streams
from slatewise.ranking.admission import Admission, RequestLimits
from slatewise.ranking.ahead import AheadOfRequests
from slatewise.ranking.background_load import BackgroundLoad
from slatewise.ranking.history_cache import HistoryCache
from slatewise.ranking.loads import Needs
from slatewise.ranking.pipeline import Pipeline
from slatewise.ranking.registry import Registry
from slatewise.ranking.versions import Versions
from slatewise.ranking.watch import Watch
from slatewise.settings import Settings, SettingsError, variable
from slatewise.store.client import REPLY_BYTES, connect_async
from slatewise.store.coverage import lacking
from slatewise.store.lookup import EmbeddedStore, RedisStore, Store
from slatewise.store.node import RedisNode

log = logging.getLogger("slatewise")
EVENT_BYTES = 300  # that a stored event takes in Redis, with a long id


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
        if settings.versions_may_change():
            rankers.clear()  # else a version that is replaced would stay in memory
        limits = RequestLimits(
            max_in_flight=settings.max_in_flight,
            max_queue_s=settings.max_queue_ms / 1e3,
            max_body_bytes=settings.max_body_bytes,
            body_timeout_s=settings.body_timeout_s,
            max_values=settings.max_values,
            max_candidates=settings.max_candidates,
            max_history=settings.max_history,
            deadline_ms=settings.deadline_ms,
        )
        admission = Admission(limits, threads)
        stack.push_async_callback(cancelled, asyncio.create_task(admission.loop_lag.watch()))
        url = settings.redis_url.get_secret_value()
        store: Store = EmbeddedStore(settings.embedding_max_age_s)
        if url:
            redis = RedisStore(
                url,
                settings.redis_timeout_ms / 1e3,
                registry.loaded,
                cache_seconds=settings.embedding_cache_s,
                cache_users=settings.embedding_cache_users,
                max_age_seconds=settings.embedding_max_age_s,
                reply_bytes=max(REPLY_BYTES, settings.stored_history_events * EVENT_BYTES),
            )
            store = await stack.enter_async_context(redis)
        histories = make_histories(settings, store)
        pipeline = Pipeline(
            registry,
            store,
            cache,
            workers,
            admission,
            histories=histories,
            pack_history=settings.history_cache_dtype == "int8",
        )
        if isinstance(store, RedisStore):
            store.deletions.forget = pipeline.forget
        yield pipeline


def make_histories(settings: Settings, store: Store) -> Histories:
    """Return the histories of the users: in Redis if it is set, else in this process."""
    seconds = settings.stored_history_days * 86_400
    if isinstance(store, RedisStore):
        return RedisHistories(store, settings.stored_history_events, seconds)
    log.info("histories from POST /events are kept in this process and end with it; SLATEWISE_REDIS_URL keeps them")
    return EmbeddedHistories(settings.stored_history_events, seconds, int(settings.stored_histories_mb * 2**20))


@asynccontextmanager
async def open_events(settings: Settings, pipeline: Pipeline) -> AsyncIterator[EventWriter]:
    """Open the writer of events, with the tap and the encoding ahead that the settings ask for."""
    async with AsyncExitStack() as stack:
        tap = None
        if settings.events_dir:
            most_bytes = int(settings.events_dir_mb * 2**20)
            tap = await stack.enter_async_context(Tap(Path(settings.events_dir), settings.events_file_s, most_bytes))
        ahead = await stack.enter_async_context(AheadOfRequests(pipeline)) if settings.encode_on_events else None
        assert pipeline.histories is not None  # `open_pipeline` sets them
        writer = EventWriter(pipeline.histories, tap, settings.max_events_waiting, None if ahead is None else ahead.add)
        yield await stack.enter_async_context(writer)


@asynccontextmanager
async def open_versions(settings: Settings, pipeline: Pipeline) -> AsyncIterator[Versions | None]:
    """Open what changes versions while the server runs: by polling, by calls, or not at all."""
    if not settings.versions_may_change():
        yield None
        return
    store = pipeline.store

    async def lacking_vectors(served: Manifest, new: Manifest) -> str | None:
        if not isinstance(store, RedisStore):
            return None  # the vectors are in the bundle
        return await lacking(store.client, served, new, settings.space_coverage, RedisNode.CONNECTION_SECONDS)

    async def read_pointers() -> None:
        if isinstance(store, RedisStore):
            await store.poller.poll()

    async with AsyncExitStack() as stack:
        background = await stack.enter_async_context(BackgroundLoad())
        variants, keys = settings.chosen_variants(), trusted_keys(settings.bundle_keys)
        needs = Needs(settings.bundles, variants, keys, lacking_vectors, read_pointers)
        versions = Versions(pipeline, background, needs)
        stack.push_async_callback(versions.close)
        pipeline.after_answer = versions.answered
        if settings.reload == "poll":
            polling = asyncio.create_task(
                Watch(versions, settings.reload_s, settings.reload_canary, settings.reload_canary_s).run()
            )
            stack.push_async_callback(cancelled, polling)
        yield versions


async def cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def build_app(settings: Settings, rankers: dict[str, Ranker]) -> FastAPI:
    """Build the application for rankers that are loaded and warmed up."""
    pipeline, events, versions = (
        partial(open_pipeline, settings, rankers),
        partial(open_events, settings),
        partial(open_versions, settings),
    )
    return create_app(settings, pipeline, events, versions)


def load(settings: Settings) -> dict[str, Ranker]:
    """Load the rankers that can be served, by name. Raises ManifestError if no ranker can be served."""
    begin = time.perf_counter()
    keys = trusted_keys(settings.bundle_keys)
    try:
        rankers = load_rankers(settings.bundles, settings.chosen_variants(), keys, lacking_at_start(settings))
    except ManifestError as error:
        reason = " ".join(str(error).split())
        remedy = "SLATEWISE_BUNDLES (--bundles) names the folder that holds <ranker>/<version>/"
        raise ManifestError(f"{reason.removesuffix('.')}; {remedy}") from error
    for ranker in rankers.values():
        metrics.MODEL_LOAD.labels(ranker.name).set(time.perf_counter() - begin)
        log.info("serving %s version %d, variants %s", ranker.name, ranker.manifest.version, ", ".join(ranker.engines))
    return rankers


def lacking_at_start(settings: Settings) -> Lacking:
    """Return what asks Redis whether a version's vectors suffice, as a server that serves does: a restart is no switch.

    Redis is asked only about a version whose space differs from that of the version before it.
    """
    url = settings.redis_url.get_secret_value()

    async def ask(older: Manifest, newer: Manifest) -> str | None:
        client = connect_async(url, RedisNode.CONNECTION_SECONDS, 1)
        try:
            return await lacking(client, older, newer, settings.space_coverage, RedisNode.CONNECTION_SECONDS)
        finally:
            await client.aclose()

    return lambda older, newer: asyncio.run(ask(older, newer)) if url and older.space != newer.space else None


def serve(settings: Settings) -> int:
    """Serve until a signal stops the server. Return the exit code."""
    if settings.events_dir:
        check_writable(Path(settings.events_dir))
    open_keys(settings)  # wrong keys are found before the bundles load
    tls = open_tls(settings)
    listener = bind(settings.host, settings.port)  # a port in use is found before the bundles load
    bound_malloc()
    # A thread of the model waits so long for the interpreter when a call ends, while the event loop is busy. With the
    # default of 5 ms, a server under overload answers a tenth fewer requests.
    sys.setswitchinterval(0.001)
    # A collection of all modules would hold the event loop for 20 ms, again and again. The rankers can be replaced, so
    # they are not among what is never collected.
    gc.collect()
    gc.freeze()
    app = build_app(settings, load(settings))
    if tls is not None:
        app.state.followed.append(Watched("tls", tls.files.paths, tls.read, tls.seen))
    return run(app, listener, door_limits(settings), settings.drain_seconds, settings.grace_seconds, tls)


def door_limits(settings: Settings) -> DoorLimits:
    return DoorLimits(**{field.name: getattr(settings, field.name) for field in fields(DoorLimits)})


def open_tls(settings: Settings) -> ReloadedContext | None:
    """Read the files of TLS; `None` without TLS. Raises TlsError."""
    if not settings.tls_certificate:
        return None
    version = settings.tls_least_version
    return ReloadedContext.open(TlsFiles(settings.tls_certificate, settings.tls_key, settings.tls_client_ca, version))


def check_writable(folder: Path) -> None:
    """Make the folder of events, and a file in it for a moment. Raises SettingsError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fault = f"SLATEWISE_EVENTS_DIR (--events-dir): cannot write to {folder}: {error.strerror}"
        raise SettingsError([fault]) from None


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
    open_closed_streams()
    with open_server_log() as handler:
        style = flags.get("log_format") or os.environ.get(variable("log_format"))
        logs.configure("json" if style == "json" else "text", "info", handler)  # before other settings are found wrong
        settings = read_settings(flags)
        logs.configure(settings.log_format, settings.log_level, handler)
        if is_link_address(os.environ.get("SLATEWISE_PORT")):
            log.info("SLATEWISE_PORT is the address of a Kubernetes Service, not a setting: it is ignored")
        return serve(settings)
