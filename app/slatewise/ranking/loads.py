"""Loads versions while others are served, and frees those that nobody gets any more.

Memory: each ranker has at most two versions in memory, and at most one version is being loaded. A version that nobody
gets any more is freed when its last request ends, and the next load of the ranker waits for that.

Called by: `versions.py`. Calls: `background_load.py`, `registry.py`, `history_cache.py`, `bundle/loader.py`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from slatewise import metrics
from slatewise.bundle.files import WRONG_DIGEST
from slatewise.bundle.loader import load_version
from slatewise.bundle.manifest import Manifest, ManifestError, read_manifest
from slatewise.bundle.ranker import Ranker
from slatewise.bundle.signature import PublicKeys
from slatewise.errors import Conflict, NotFound, Refused
from slatewise.ranking.background_load import BackgroundLoad, with_pause
from slatewise.ranking.history_cache import HistoryCache
from slatewise.ranking.registry import Registry
from slatewise.version_schemas import LoadAttempt, LoadOutcome

log = logging.getLogger("slatewise")

FREE_SECONDS = 30.0  # longest wait for the last requests of a replaced version
COLLECT_SECONDS = 5.0  # after which reference cycles are looked for


@dataclass(frozen=True)
class Needs:
    """What a load needs to know of the server.

    `keys`: whose bundles are loaded. `lacking`: why the vectors of a new space do not suffice yet.
    """

    root: Path
    variants: tuple[str, ...]
    keys: PublicKeys
    lacking: Callable[[Manifest, Manifest], Awaitable[str | None]]
    read_pointers: Callable[[], Awaitable[None]]


class Loads:
    def __init__(self, background: BackgroundLoad, needs: Needs, registry: Registry, cache: HistoryCache) -> None:
        self.background = background
        self.needs = needs
        self.registry = registry
        self.cache = cache
        self.attempts: dict[str, LoadAttempt] = {}  # the latest one of each ranker
        self.leaving: dict[tuple[str, int, str], weakref.ref[Ranker] | None] = {}  # `None`: being freed
        self.freed = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()

    async def load(self, name: str, version: int, served: Ranker | None) -> Ranker:
        """Load a version, with all checks. Raises NotFound, Conflict or Refused, and notes the attempt."""
        folder = self.needs.root / name
        if "/" in name or name.startswith(".") or not await self.background.run((folder / str(version)).is_dir):
            raise NotFound(f"no folder of version {version} of such a ranker")
        await self.room(name)
        begin = time.perf_counter()
        outcome: LoadOutcome = "rejected"
        reason: str | None = None
        error: Exception | None = None
        try:
            if served is not None:
                manifest = await self.background.run(partial(read_manifest, folder / str(version)))
                if reason := await self.needs.lacking(served.manifest, manifest):
                    outcome = "waiting"
                    raise ManifestError(reason)
            load = partial(load_version, folder, version, self.needs.variants, self.needs.keys)
            ranker = await self.background.run(partial(load, step=with_pause))
            if served is not None:
                check_successor(served, ranker)
        except ManifestError as refused:
            error, reason = refused, str(refused)
        except Exception as failed:  # a faulty disk, or no memory: the served version goes on
            error, reason, outcome = failed, f"{type(failed).__name__}: {failed}", "failed"
        else:
            outcome = "loaded"
        seconds = time.perf_counter() - begin
        self.attempts[name] = LoadAttempt(
            version=version, outcome=outcome, reason=reason, at=time.time(), seconds=round(seconds, 3)
        )
        metrics.series(metrics.MODEL_RELOADS, outcome).inc()
        if error is not None:
            log.error("%s version %d is not served: %s", name, version, reason)
            again = outcome != "rejected" or WRONG_DIGEST in str(reason)
            raise Refused(f"version {version} is not served: {reason}", again=again) from error
        metrics.MODEL_LOAD.labels(name).set(seconds)
        metrics.MODEL_LAST_SUCCESS.labels(name).set_to_current_time()
        return ranker

    async def room(self, name: str) -> None:
        """Wait until no replaced version of the ranker is in memory. Raises Conflict."""
        begin = time.monotonic()
        while any(key[0] == name for key in self.leaving):
            if time.monotonic() > begin + FREE_SECONDS:
                raise Conflict("requests of a replaced version still run, and memory has room for two versions")
            self.freed.clear()
            try:
                await asyncio.wait_for(self.freed.wait(), COLLECT_SECONDS)
            except TimeoutError:
                await self.background.run(gc.collect)  # an error's traceback may hold a request

    def retire(self, ranker: Ranker) -> None:
        """Free a version in the background when its last request ends: when nobody holds the `Ranker` any more."""
        parts: list[Any] = [*vars(ranker).values(), *ranker.engines.values()]
        parts += [ranker.embedded_users, ranker.vocabulary.items]  # the first ones to be freed, in blocks
        identity = ranker.identity
        loop = asyncio.get_running_loop()

        def last_request_ended(_: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.begin_free, identity, parts)

        self.leaving[identity] = weakref.ref(ranker, last_request_ended)

    def begin_free(self, identity: tuple[str, int, str], parts: list[Any]) -> None:
        self.leaving[identity] = None
        task = asyncio.get_running_loop().create_task(self.free(identity, parts))
        self.tasks.add(task)  # the loop keeps weak references only
        task.add_done_callback(self.tasks.discard)

    async def free(self, identity: tuple[str, int, str], parts: list[Any]) -> None:
        if identity not in {ranker.identity for ranker in self.registry.loaded()}:
            await self.cache.forget_version(identity)
        await self.background.free(parts)
        self.leaving.pop(identity, None)
        self.freed.set()


def check_successor(served: Ranker, new: Ranker) -> None:
    """Raise ManifestError if the new version would serve less than the old one, or share vectors of another size.

    At a start, a broken variant is better than no server. A version that already serves is better than a broken one.
    """
    if lost := [variant for variant in served.engines if variant in new.refused]:
        raise ManifestError(f"variant {lost[0]}: {new.refused[lost[0]]}")
    if new.manifest.space == served.manifest.space and new.manifest.meta_size != served.manifest.meta_size:
        raise ManifestError(
            f"space {new.manifest.space} has vectors of another size in version {served.manifest.version}"
        )
