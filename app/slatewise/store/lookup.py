"""Looks up the meta-embedding of a user, in the bundle (embedded store) or in Redis, with one interface.

A miss and a fault both return the ranker's default vector, with different statuses. A request waits at most for the
time budget, whatever the state of Redis is.

    request --> cache --> look-up (one per user) --> node (one per server) --> round trip (a batch of HMGETs)

Replies are the results of futures. The store decodes them and resolves the waiting requests.
Called by: `ranking/pipeline.py`; `main.py` opens the store. Calls: `client.py`, `embedding_cache.py`, `nodes.py`,
`poll.py`, `codec.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from slatewise import metrics
from slatewise.bundle.adapted_items import AdaptedItems
from slatewise.bundle.ranker import Ranker
from slatewise.errors import StoreFault
from slatewise.inference.arrays import Float32
from slatewise.schemas import MetaStatus
from slatewise.store.client import REPLY_BYTES, connect_async, is_wrong_type
from slatewise.store.codec import Corrupt, Mismatched, unpack, user_key
from slatewise.store.deletion import Deletions, delete_user
from slatewise.store.embedding_cache import EmbeddingCache, Found, UserKey
from slatewise.store.node import CLOSED, RedisNode, VectorRead, call_after
from slatewise.store.nodes import Nodes
from slatewise.store.poll import Poller


@dataclass(frozen=True)
class MetaEmbedding:
    vector: Float32  # (M,)
    status: MetaStatus
    version: str | None = None
    age_seconds: float | None = None


class Store(Protocol):
    def look_up(self, ranker: Ranker, user: str) -> Awaitable[MetaEmbedding]:
        """Start to look up a user at once. Never raises. The caller may drop the result without awaiting it."""

    def new_items(self, ranker: Ranker) -> AdaptedItems | None:
        """Return the vectors of items that are newer than the ranker, without waiting."""

    async def delete_user(self, user: str) -> None:
        """Delete what is stored of a user, also in other replicas. Raises StoreFault."""


def found_vector(vector: Float32, version: str, created_at: float, max_age_seconds: float, place: str) -> MetaEmbedding:
    """Build the result for a vector that was found, and count it as `place`. The age is never negative."""
    age = max(0.0, time.time() - created_at)
    stale = 0 < max_age_seconds < age
    metrics.EMBEDDINGS_BY_RESULT["stale" if stale else place].inc()
    metrics.EMBEDDING_AGE.observe(age)
    return MetaEmbedding(vector, "stale" if stale else "hit", version, round(age, 1))


def default(ranker: Ranker, status: MetaStatus, result: str) -> MetaEmbedding:
    """Build the result with the ranker's default vector, and count it as `result`."""
    metrics.EMBEDDINGS_BY_RESULT[result].inc()
    return MetaEmbedding(ranker.default_meta, status)


class EmbeddedStore:
    """Looks up the vectors in the bundle, which are memory-mapped."""

    def __init__(self, max_age_seconds: float = 0.0) -> None:
        self.max_age_seconds = max_age_seconds

    def look_up(self, ranker: Ranker, user: str) -> Awaitable[MetaEmbedding]:
        found: asyncio.Future[MetaEmbedding] = asyncio.get_running_loop().create_future()
        found.set_result(self.find(ranker, user))
        return found

    def find(self, ranker: Ranker, user: str) -> MetaEmbedding:
        row = ranker.embedded_users.get(user)
        if row is None:
            return default(ranker, "default", "miss")
        created_at = ranker.manifest.created.timestamp()
        return found_vector(
            ranker.embedded_meta[row], str(ranker.manifest.version), created_at, self.max_age_seconds, "hit_local"
        )

    def new_items(self, ranker: Ranker) -> AdaptedItems | None:
        """Return none: a bundle has no vectors of items that it does not know."""

    async def delete_user(self, user: str) -> None:
        """Do nothing: a bundle is never changed. Export a new one without the user."""


@dataclass(eq=False)
class LookUp:
    """A read that is queued or sent, and the requests that wait for its vector."""

    read: VectorRead
    waiting: list[tuple[Ranker, asyncio.Future[MetaEmbedding]]] = field(default_factory=list)


class RedisStore:
    """Looks up the vectors in Redis: `async with RedisStore(url, timeout_seconds, serving)`.

    `serving` returns the served rankers. The store polls Redis for the live
    generations of their spaces. Raises ValueError for a wrong URL.
    """

    def __init__(
        self,
        url: str,
        timeout_seconds: float,
        serving: Callable[[], Iterable[Ranker]],
        *,
        cache_seconds: float = 0.0,
        cache_users: int = 100_000,
        max_age_seconds: float = 0.0,
        reply_bytes: int = REPLY_BYTES,
    ) -> None:
        self.timeout = timeout_seconds
        self.max_age_seconds = max_age_seconds
        patience = max(timeout_seconds, RedisNode.CONNECTION_SECONDS)
        self.client: Any = connect_async(  # redis-py types both APIs as one
            url, patience, 4 * RedisNode.ROUND_TRIPS, reply_bytes
        )
        self.cache = EmbeddingCache(cache_users, cache_seconds)
        self.nodes = Nodes(self.client, timeout_seconds, patience)
        self.serving = serving
        self.deletions = Deletions(self.client, lambda _: None)  # `main.py` sets what forgets the users
        self.poller = Poller(self.client, serving, self.nodes, self.cache, patience, self.deletions)
        self.pending: dict[UserKey, LookUp] = {}
        self.deleting = asyncio.Lock()  # one connection at most

    async def __aenter__(self) -> RedisStore:
        metrics.CIRCUIT_STATE.set_function(lambda: self.nodes.worst)
        self.nodes.add_single()
        await self.poller.poll()
        self.polling = asyncio.create_task(self.poller.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.poller.stop(self.polling)
        await self.nodes.close()
        await self.client.aclose()
        if sentinels := getattr(getattr(self.client, "connection_pool", None), "sentinel_manager", None):
            await sentinels.aclose()

    def look_up(self, ranker: Ranker, user: str) -> Awaitable[MetaEmbedding]:
        """Look up a user within the time budget. Concurrent look-ups of one user share a read."""
        future: asyncio.Future[MetaEmbedding] = asyncio.get_running_loop().create_future()
        key = (ranker.name, ranker.manifest.space, user)
        now = self.without_redis(ranker, key)
        if now is not None:
            future.set_result(now)
            metrics.EMBEDDING_DURATION.observe(0.0)
            return future
        look_up = self.pending.get(key)
        if look_up is None or look_up.read.is_late or look_up.read.cancelled():
            redis_key = user_key(*key)
            node = self.nodes.of_key(redis_key)
            if node.circuit != CLOSED:
                future.set_result(default(ranker, "error", "error"))
                metrics.EMBEDDING_DURATION.observe(0.0)
                return future
            look_up = self.pending[key] = LookUp(node.read(redis_key, self.poller.spaces[key[:2]]))
            look_up.read.add_done_callback(partial(self.complete, key, look_up))
        self.wait(ranker, look_up, future)
        return future

    async def delete_user(self, user: str) -> None:
        """As `Store.delete_user`, for the spaces of the served rankers. Other replicas learn of it by their poll."""
        spaces = dict.fromkeys((ranker.name, ranker.manifest.space) for ranker in self.serving())
        try:
            async with self.deleting:
                await delete_user(self.client, spaces, user)
        except Exception as error:  # includes errors of redis-py's parser on bytes that are not Redis' protocol
            metrics.REDIS_ERRORS.labels(type(error).__name__).inc()
            raise StoreFault("Redis did not delete the vectors; repeat the request") from error
        await self.poller.poll()  # reads the pointers that have changed: their vectors are not cached again

    def new_items(self, ranker: Ranker) -> AdaptedItems | None:
        """As `Store.new_items`: what the last poll has read, also while Redis fails."""
        reader = self.poller.new_items.get((ranker.name, ranker.manifest.version))
        return None if reader is None else reader.items

    def without_redis(self, ranker: Ranker, key: UserKey) -> MetaEmbedding | None:
        """Return the result if it is known without a read, from the cache or the state of the space; else `None`."""
        cached = self.cache.get(key)
        if cached is not None:
            return self.answer(ranker, cached, "hit_local", "miss_local")
        space = self.poller.spaces.get(key[:2])
        if space is None:  # its pointer was never read
            return default(ranker, "error", "error")
        if not space.live.generations and self.nodes.all_closed:
            return default(ranker, "default", "miss")
        return None

    def wait(self, ranker: Ranker, look_up: LookUp, future: asyncio.Future[MetaEmbedding]) -> None:
        """Add a request to the waiting ones, with a timer of its own."""
        look_up.waiting.append((ranker, future))
        look_up.read.waiters += 1
        begin = time.perf_counter()
        cancel_timer = call_after(self.timeout, partial(give_up, ranker, future))

        def ended(_: object) -> None:
            cancel_timer()
            look_up.read.waiters -= 1
            metrics.EMBEDDING_DURATION.observe(time.perf_counter() - begin)

        future.add_done_callback(ended)

    def complete(self, key: UserKey, look_up: LookUp, read: VectorRead) -> None:
        """Resolve the waiting requests with the reply.

        Cache it if every value was readable and the pointer has not changed.
        """
        if self.pending.get(key) is look_up:
            del self.pending[key]
        if read.cancelled():  # the read was not sent, because no request waits
            return
        found, readable = decode(read, look_up.waiting[0][0].manifest.meta_size)
        is_current = self.poller.spaces.get(key[:2]) is read.space and read.space.live is read.live
        if found is not None and readable and is_current:
            self.cache.put(key, found)
        for ranker, future in look_up.waiting:
            if not future.done():
                future.set_result(
                    default(ranker, "error", "error")
                    if found is None
                    else self.answer(ranker, found, "hit_redis", "miss")
                )

    def answer(self, ranker: Ranker, found: Found, hit: str, miss: str) -> MetaEmbedding:
        if found.vector is None:
            return default(ranker, "default", miss)
        return found_vector(found.vector, found.version, found.created_at, self.max_age_seconds, hit)


def give_up(ranker: Ranker, future: asyncio.Future[MetaEmbedding]) -> None:
    if not future.done():
        future.set_result(default(ranker, "error", "error"))


def decode(read: VectorRead, size: int) -> tuple[Found | None, bool]:
    """Decode a reply to (the newest readable vector, whether every value was readable); `None` for a fault.

    An unreadable value is counted, and the value of an older generation is used instead.
    """
    reply = read.result()
    if isinstance(reply, Exception):
        if not is_wrong_type(reply):
            return None, False
        metrics.EMBEDDINGS_BY_RESULT["corrupt"].inc()
        return Found(None), False
    assert read.live is not None  # set when the read was sent
    readable = True
    for version, value in zip(read.live.fields, reply, strict=True):
        if value is None:
            continue
        try:
            vector, generation, created_at = unpack(value, size)
            if str(generation) != version:
                raise Mismatched(f"of generation {generation}")
        except (Corrupt, Mismatched) as error:
            metrics.EMBEDDINGS_BY_RESULT["mismatched" if isinstance(error, Mismatched) else "corrupt"].inc()
            readable = False
            continue
        vector.flags.writeable = False  # shared by many requests
        return Found(vector, version, created_at), readable
    return Found(None), readable
