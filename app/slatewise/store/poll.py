"""Background task: reads the pointers and the vectors of new items, and probes failed servers.

Called by: `lookup.py`, which runs `Poller.run` as a task. Calls: the redis-py client, `codec.py`, `nodes.py` (probes),
`embedding_cache.py` (clear), `adapted_items.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from redis.exceptions import RedisError

from slatewise import metrics
from slatewise.bundle.ranker import Ranker
from slatewise.store.adapted_items import ItemReader
from slatewise.store.client import disconnect
from slatewise.store.codec import metadata_key, pointer_key, read_pointer
from slatewise.store.deletion import Deletions
from slatewise.store.embedding_cache import EmbeddingCache
from slatewise.store.node import OPEN
from slatewise.store.nodes import SINGLE, Nodes
from slatewise.store.spaces import Live, Space, SpaceKey

log = logging.getLogger("slatewise")


class Poller:
    """Reads the pointers of the spaces of the rankers that `serving` returns. A changed pointer empties the cache."""

    SECONDS = 1.0  # between two polls; a quarter of it while a circuit is not closed
    ITEM_SECONDS = 10.0  # for the vectors of new items, which may be many megabytes

    def __init__(
        self,
        client: Any,
        serving: Callable[[], Iterable[Ranker]],
        nodes: Nodes,
        cache: EmbeddingCache,
        patience_seconds: float,
        deletions: Deletions,
    ) -> None:
        self.client = client
        self.serving = serving
        self.nodes = nodes
        self.cache = cache
        self.patience = patience_seconds
        self.deletions = deletions
        self.spaces: dict[SpaceKey, Space] = {}  # spaces whose pointer has been read, in the order of `serving`
        self.new_items: dict[tuple[str, int], ItemReader] = {}  # by ranker and version, of the served ones
        self.closing = False

    async def run(self) -> None:
        """Poll until the task is cancelled."""
        while not self.closing:
            await asyncio.sleep(self.SECONDS if self.nodes.all_closed else self.SECONDS / 4)
            await self.poll()

    async def stop(self, task: asyncio.Task[None]) -> None:
        """End the task of `run`. The flag is needed because redis-py may swallow a cancellation while it connects."""
        self.closing = True
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def poll(self) -> None:
        """Read the pointers, and probe the nodes whose circuit is not closed."""
        failed = False
        for _ in range(2):  # the first try may use a connection that the server has closed
            try:
                await self.read_pointers()
                failed = False
                break
            except Exception:  # includes errors of redis-py's parser on bytes that are not Redis' protocol
                failed = True
        if failed and not self.nodes.is_cluster:
            self.nodes[SINGLE].switch(OPEN)
        else:
            await self.nodes.probe(self.read_pointers)
            await self.read_new_items()
        self.report()

    async def read_pointers(self) -> None:
        """Read the pointer of each served space, and the age of each new generation. Raises redis-py's exceptions."""
        keys = list(dict.fromkeys((ranker.name, ranker.manifest.space) for ranker in self.serving()))
        if self.spaces.keys() - keys:  # no longer served: its pointer may change unseen
            self.cache.clear()
        self.spaces = {key: self.spaces[key] for key in keys if key in self.spaces}
        begin = time.perf_counter()
        try:
            async with asyncio.timeout(self.patience):
                for key in keys:
                    value = await self.client.get(pointer_key(*key))
                    if not isinstance(value, bytes | None):
                        await disconnect(self.client)
                        raise RedisError("not an answer to GET")
                    self.apply_pointer(key, value)
                    await self.read_created_at(key)
                await self.deletions.read()
        except Exception as error:
            metrics.REDIS_ERRORS.labels(type(error).__name__).inc()
            raise
        finally:
            metrics.REDIS_DURATION.labels("get").observe(time.perf_counter() - begin)

    def apply_pointer(self, key: SpaceKey, value: bytes | None) -> None:
        """Store a pointer that was read. If it changed, empty the cache: users or generations may have been deleted."""
        space = self.spaces.get(key)
        if space is not None and space.live.pointer == value:
            return
        generations = read_pointer(value)[0]
        live = Live(value, list(map(str, generations)))
        if space is None or space.live.generations != live.generations:  # a deleted user changes only the pointer
            log.info("redis: live generations of %s in space %s are %s", *key, generations)
        if space is None:
            self.spaces[key] = Space(key, live)
        else:
            space.live = live
        self.cache.clear()

    async def read_created_at(self, key: SpaceKey) -> None:
        """Read the time at which the newest generation was made, once for each generation."""
        live = self.spaces[key].live
        if not live.generations or live.created_at is not None:
            return
        text = await self.client.hget(metadata_key(*key), live.generations[0])
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a pointer that was set by hand has no metadata
            live.created_at = float(json.loads(text)["created_at"])

    async def read_new_items(self) -> None:
        """Read the vectors of new items of each served version. A fault leaves those that were read before."""
        readers = {}
        for ranker in self.serving():
            key = ranker.name, ranker.manifest.version
            readers[key] = self.new_items.get(key) or ItemReader(*key, ranker.manifest.width)
        self.new_items = readers
        try:
            async with asyncio.timeout(self.ITEM_SECONDS):
                for reader in readers.values():
                    await reader.poll(self.client)
        except Exception as error:
            metrics.REDIS_ERRORS.labels(type(error).__name__).inc()

    def report(self) -> None:
        """Set the gauges, one series per ranker. If a ranker has several spaces, report the first one."""
        first: dict[str, Live] = {}
        for (ranker, _), space in self.spaces.items():
            first.setdefault(ranker, space.live)
        for ranker, live in first.items():
            metrics.GENERATION.labels(ranker).set(int(live.generations[0]) if live.generations else 0)
            if live.created_at is not None:
                metrics.GENERATION_AGE.labels(ranker).set(max(0.0, time.time() - live.created_at))
