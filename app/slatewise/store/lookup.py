"""Who the user is beyond the history: one vector, from the bundle (embedded store) or from Redis, behind one call.

A miss and a fault take the same path, the un-adapted default vector; a fault says so. What a request waits for is bounded by
the time budget, whatever Redis does.

    request --> cache --> look-up (one a user) --> node (one a server) --> round trip (many users, one HMGET each)

The pointer is polled off the request path, and any change of it empties the cache; the poll also probes circuits that are open.
Before: `generations.py` filled Redis. After: `pipeline.py` feeds the vector to late fusion.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import redis.asyncio as aioredis
from redis.exceptions import RedisError

from slatewise import metrics
from slatewise.bundle.ranker import Ranker
from slatewise.inference.arrays import Float32
from slatewise.store.client import connect_async
from slatewise.store.codec import Corrupt, Mismatched, metadata_key, pointer_key, read_pointer, unpack, user_key
from slatewise.store.node import CLOSED, OPEN, LookUp, RedisNode, call_after, is_wrong_type

log = logging.getLogger("slatewise")

Status = Literal["hit", "default", "stale", "error", "off"]


@dataclass(frozen=True)
class MetaEmbedding:
    vector: Float32  # (M,)
    status: Status
    version: str | None = None
    age_seconds: float | None = None


class Store(Protocol):
    def look_up(self, ranker: Ranker, user: str) -> Awaitable[MetaEmbedding]:
        """Begins at once; whoever goes away without awaiting it leaves nothing behind."""


def found_vector(vector: Float32, version: str, created_at: float, max_age_seconds: float, place: str) -> MetaEmbedding:
    """A vector that was found, counted; its age is never negative, wherever the clocks stand."""
    age = max(0.0, time.time() - created_at)
    stale = 0 < max_age_seconds < age
    metrics.EMBEDDINGS_BY_RESULT["stale" if stale else place].inc()
    metrics.EMBEDDING_AGE.observe(age)
    return MetaEmbedding(vector, "stale" if stale else "hit", version, round(age, 1))


def default(ranker: Ranker, status: Status, result: str) -> MetaEmbedding:
    metrics.EMBEDDINGS_BY_RESULT[result].inc()
    return MetaEmbedding(ranker.default_meta, status)


class EmbeddedStore:
    """The vectors that the bundle brings, memory-mapped."""

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


class Found(NamedTuple):
    """What Redis had for a user; no vector: it had none."""

    vector: Float32 | None
    version: str = ""
    created_at: float = 0.0


class RedisStore:
    """`async with RedisStore(url, timeout, rankers)`: polls the pointers every second, more often while nothing answers, until it is closed."""

    POLL_SECONDS = 1.0

    def __init__(
        self,
        url: str,
        timeout_seconds: float,
        rankers: Iterable[Ranker],
        *,
        cache_seconds: float = 0.0,
        cache_users: int = 100_000,
        max_age_seconds: float = 0.0,
    ) -> None:
        self.timeout = timeout_seconds
        self.max_age_seconds = max_age_seconds
        self.patience = max(timeout_seconds, RedisNode.CONNECTION_SECONDS)
        self.client: Any = connect_async(
            url, self.patience, 4 * RedisNode.ROUND_TRIPS
        )  # redis-py is typed for both of its halves at once
        self.is_cluster = isinstance(self.client, aioredis.RedisCluster)
        self.rankers = {ranker.name: ranker for ranker in rankers}
        self.pointers: dict[str, bytes | None] = {}  # ranker -> the pointer's bytes
        self.generations: dict[str, list[str]] = {}  # ranker -> live generations, newest first
        self.created: dict[str, tuple[str, float]] = {}  # ranker -> its newest generation, and since when there is one
        self.epoch = 0  # counts changes of a pointer
        self.cache: OrderedDict[tuple[str, str], tuple[float, Found]] = (
            OrderedDict()
        )  # least recently used first; until when (monotonic)
        self.cache_seconds = cache_seconds
        self.cache_users = cache_users
        self.pending: dict[tuple[str, str], LookUp] = {}
        self.nodes: dict[str, RedisNode] = {}  # by node; one without a name where there is no Cluster
        self.closing = False

    async def __aenter__(self) -> RedisStore:
        if not self.is_cluster:
            self.node_named("", OPEN)  # until the first poll
        await self.poll()
        self.poller = asyncio.create_task(self.keep_polling())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closing = True  # a cancellation that arrives while redis-py connects may be swallowed there
        self.poller.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.poller
        await asyncio.gather(*(node.close() for node in self.nodes.values()))
        await self.client.aclose()
        if sentinels := getattr(getattr(self.client, "connection_pool", None), "sentinel_manager", None):
            await sentinels.aclose()

    # The request's side: nothing here waits for Redis

    def look_up(self, ranker: Ranker, user: str) -> Awaitable[MetaEmbedding]:
        future: asyncio.Future[MetaEmbedding] = asyncio.get_running_loop().create_future()
        kept = self.cache.get((ranker.name, user))
        if kept is not None and kept[0] > time.monotonic():
            self.cache.move_to_end((ranker.name, user))
            found = kept[1]
            future.set_result(self.answer(ranker, found, "hit_local", "miss_local"))
        elif ranker.name not in self.pointers:  # never read
            future.set_result(default(ranker, "error", "error"))
        elif not self.generations[ranker.name] and all(node.circuit == CLOSED for node in self.nodes.values()):
            future.set_result(default(ranker, "default", "miss"))
        else:
            look_up = self.pending.get((ranker.name, user))
            if look_up is None:
                look_up = LookUp((ranker.name, user), user_key(ranker.name, ranker.manifest.space, user))
                node = self.node_of(look_up.key)
                if node.circuit != CLOSED:
                    future.set_result(default(ranker, "error", "error"))
                    metrics.EMBEDDING_DURATION.observe(0.0)
                    return future
                self.pending[look_up.user] = look_up
                node.send(look_up)
            look_up.waiting.append(future)
            begin = time.perf_counter()
            cancel_timer = call_after(self.timeout, partial(self.give_up, ranker, future))

            def ended(_: object) -> None:
                cancel_timer()
                metrics.EMBEDDING_DURATION.observe(time.perf_counter() - begin)

            future.add_done_callback(ended)
            return future
        metrics.EMBEDDING_DURATION.observe(0.0)
        return future

    def answer(self, ranker: Ranker, found: Found, hit: str, miss: str) -> MetaEmbedding:
        if found.vector is None:
            return default(ranker, "default", miss)
        return found_vector(found.vector, found.version, found.created_at, self.max_age_seconds, hit)

    def give_up(self, ranker: Ranker, future: asyncio.Future[MetaEmbedding]) -> None:
        if not future.done():
            future.set_result(default(ranker, "error", "error"))

    # Nodes, and what travels on them

    def node_of(self, key: str) -> RedisNode:
        """To the server that has the key; in a Cluster one that stands still takes its own users only."""
        if not self.is_cluster:
            return self.nodes[""]
        try:
            return self.node_named(self.client.get_node_from_key(key).name, CLOSED)
        except RedisError:  # nobody has it
            return self.node_named("none", CLOSED)

    def node_named(self, name: str, circuit: int) -> RedisNode:
        if name not in self.nodes:
            self.nodes[name] = RedisNode(name, self.timeout, self.fetch, self.complete, self.drop, circuit)
            metrics.CIRCUIT_STATE.set_function(
                lambda: max((node.circuit for node in self.nodes.values()), default=CLOSED)
            )
        return self.nodes[name]

    async def fetch(self, batch: list[LookUp]) -> list[Any]:
        """A reply or an exception for each, in one round trip."""
        pipe = self.client.pipeline(transaction=False)
        for look_up in batch:
            look_up.epoch = self.epoch
            look_up.fields = self.generations[look_up.user[0]] or ["0"]
            pipe.hmget(look_up.key, look_up.fields)
        replies: list[Any] = await pipe.execute(raise_on_error=False)
        for look_up, reply in zip(batch, replies, strict=True):
            if not isinstance(reply, Exception) and (not isinstance(reply, list) or len(reply) != len(look_up.fields)):
                await self.disconnect()  # whatever speaks there: no byte of it is to be taken for another's
                raise RedisError("not an answer to HMGET")
        return replies

    async def disconnect(self) -> None:
        await (self.client if self.is_cluster else self.client.connection_pool).aclose()

    def drop(self, look_up: LookUp) -> None:
        if self.pending.get(look_up.user) is look_up:
            del self.pending[look_up.user]

    def complete(self, look_up: LookUp, reply: Any) -> None:
        """Answer those who still wait, and keep what was found; a vector that was asked for before the pointer changed is not kept beyond."""
        self.drop(look_up)
        ranker = self.rankers[look_up.user[0]]
        found, whole = self.decode(ranker, look_up.fields, reply)
        if found is not None and whole and look_up.epoch == self.epoch and self.cache_seconds:
            self.cache[look_up.user] = time.monotonic() + self.cache_seconds, found
            self.cache.move_to_end(look_up.user)
            while len(self.cache) > self.cache_users:
                self.cache.popitem(last=False)
            metrics.EMBEDDING_CACHE_ENTRIES.set(len(self.cache))
        for future in look_up.waiting:
            if not future.done():
                future.set_result(
                    default(ranker, "error", "error")
                    if found is None
                    else self.answer(ranker, found, "hit_redis", "miss")
                )

    def decode(self, ranker: Ranker, live: list[str], reply: Any) -> tuple[Found | None, bool]:
        """(the newest readable vector, or that there is none, or None for a fault; whether everything was readable)."""
        if isinstance(reply, Exception):
            if not is_wrong_type(reply):
                return None, False
            metrics.EMBEDDINGS_BY_RESULT["corrupt"].inc()
            return Found(None), False
        whole = True
        for version, value in zip(live, reply, strict=True):
            if value is None:
                continue
            try:
                vector, generation, created_at = unpack(value, ranker.manifest.meta_size)
                if str(generation) != version:
                    raise Mismatched(f"of generation {generation}")
            except (Corrupt, Mismatched) as error:
                metrics.EMBEDDINGS_BY_RESULT["mismatched" if isinstance(error, Mismatched) else "corrupt"].inc()
                whole = False
                continue
            vector.flags.writeable = False  # many requests may read it
            return Found(vector, version, created_at), whole
        return Found(None), whole

    # The poll

    async def keep_polling(self) -> None:
        while not self.closing:
            await asyncio.sleep(
                self.POLL_SECONDS
                if all(node.circuit == CLOSED for node in self.nodes.values())
                else self.POLL_SECONDS / 4
            )
            await self.poll()

    async def poll(self) -> None:
        """Read the pointers, and try the nodes whose circuit is open."""
        fault = None
        for _ in range(2):  # the connection may have been an old one
            try:
                await self.read_pointers()
                fault = None
                break
            except Exception as error:  # also what redis-py makes of bytes that are no Redis
                fault = error
        if fault is not None and not self.is_cluster:
            self.nodes[""].switch(OPEN)
        else:
            await self.probe()
        for name, (_, created_at) in self.created.items():
            metrics.GENERATION_AGE.labels(name).set(max(0.0, time.time() - created_at))

    async def probe(self) -> None:
        """Try the nodes whose circuit is open; in a Cluster, find out which nodes there are before."""
        shut = [node for node in self.nodes.values() if node.circuit != CLOSED]
        if not self.is_cluster:
            await asyncio.gather(*(node.probe(self.read_pointers) for node in shut))
        elif shut:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(self.patience / 2):
                    await self.client.nodes_manager.initialize()
            nodes = {node.name: node for node in self.client.get_primaries()}
            for node in shut:
                if node.name not in nodes:  # it failed over, or left
                    del self.nodes[node.name]
                    await node.close()
            await asyncio.gather(
                *(
                    node.probe(partial(self.client.ping, target_nodes=nodes[node.name]))
                    for node in shut
                    if node.name in nodes
                )
            )

    async def read_pointers(self) -> None:
        begin = time.perf_counter()
        try:
            async with asyncio.timeout(self.patience):
                for ranker in self.rankers.values():
                    value = await self.client.get(pointer_key(ranker.name, ranker.manifest.space))
                    if not isinstance(value, bytes | None):
                        await self.disconnect()
                        raise RedisError("not an answer to GET")
                    self.apply_pointer(ranker, value)
                    await self.read_about(ranker)
        except Exception as error:
            metrics.REDIS_ERRORS.labels(type(error).__name__).inc()
            raise
        finally:
            metrics.REDIS_DURATION.labels("get").observe(time.perf_counter() - begin)

    def apply_pointer(self, ranker: Ranker, value: bytes | None) -> None:
        """Take what a pointer says. Any change of its bytes empties the cache: what it meant before may be gone, or forgotten."""
        if ranker.name in self.pointers and self.pointers[ranker.name] == value:
            return
        self.pointers[ranker.name] = value
        live = read_pointer(value)[0]
        self.generations[ranker.name] = list(map(str, live))
        self.epoch += 1
        self.created.pop(ranker.name, None)  # a Redis that was emptied counts from 1 again
        self.cache.clear()
        metrics.EMBEDDING_CACHE_ENTRIES.set(0)
        metrics.GENERATION.labels(ranker.name).set(live[0] if live else 0)
        log.info("redis: live generations of %s are %s", ranker.name, live)

    async def read_about(self, ranker: Ranker) -> None:
        """Since when there is the newest generation; asked once for each."""
        newest = next(iter(self.generations[ranker.name]), None)
        if newest is None or self.created.get(ranker.name, ("",))[0] == newest:
            return
        text = await self.client.hget(metadata_key(ranker.name, ranker.manifest.space), newest)
        with contextlib.suppress(ValueError, TypeError, KeyError):  # whoever set the pointer by hand has written none
            self.created[ranker.name] = newest, float(json.loads(text)["created_at"])
