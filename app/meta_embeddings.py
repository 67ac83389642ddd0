"""Who the user is beyond the history: one vector, from the bundle (embedded store) or from Redis, behind one call.

    slatewise:<ranker>:<space>:generations       "7,6,5": live generations, newest first; one SET makes a generation visible
    slatewise:<ranker>:<space>:emb:{<user>}      hash; field = generation, value = header + vector

A miss and a fault take the same path, the un-adapted default vector; a fault says so. The pointer is polled off the
request path, and its poll is the health check: after two failed tries in a row, requests do not ask Redis until one succeeds.
Before: `models/` made the vectors, `push.py` filled Redis. After: `pipeline.py` feeds the vector to late fusion.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import redis.asyncio as aioredis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from app import metrics
from app.bundle import Ranker
from app.features import Float32
from app.vectors import pointer_key, unpack, user_key

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


class EmbeddedStore:
    """The vectors that the bundle brings, memory-mapped."""

    def look_up(self, ranker: Ranker, user: str) -> Awaitable[MetaEmbedding]:
        found: asyncio.Future[MetaEmbedding] = asyncio.get_running_loop().create_future()
        found.set_result(self.find(ranker, user))
        return found

    def find(self, ranker: Ranker, user: str) -> MetaEmbedding:
        row = ranker.embedded_users.get(user)
        if row is None:
            metrics.EMBEDDINGS.labels("miss").inc()
            return MetaEmbedding(ranker.default_meta, "default")
        metrics.EMBEDDINGS.labels("hit_local").inc()
        age = max(0.0, time.time() - ranker.manifest.created.timestamp())
        return MetaEmbedding(ranker.embedded_meta[row], "hit", str(ranker.manifest.version), round(age, 1))


class RedisStore:
    """`async with RedisStore(url, timeout, rankers)`: polls the pointers every second until it is closed."""

    POLL_SECONDS = 1.0

    def __init__(self, url: str, timeout_seconds: float, rankers: Iterable[Ranker]) -> None:
        self.timeout = timeout_seconds
        pool = aioredis.BlockingConnectionPool.from_url(
            url,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=Retry(NoBackoff(), 0),
            max_connections=64,
            timeout=timeout_seconds,
        )
        self.client: aioredis.Redis = aioredis.Redis.from_pool(pool)
        self.rankers = list(rankers)
        self.generations: dict[str, list[str]] = {}  # ranker -> live generations, newest first
        self.healthy: bool | None = None  # not known before the first poll
        self.closing = False
        self.running: set[asyncio.Task[MetaEmbedding]] = set()

    async def __aenter__(self) -> RedisStore:
        await self.poll()
        self.poller = asyncio.create_task(self.keep_polling())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closing = True  # a cancellation that arrives while redis-py connects may be swallowed there
        self.poller.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.poller
        await asyncio.gather(*self.running, return_exceptions=True)
        await self.client.aclose()

    async def keep_polling(self) -> None:
        while not self.closing:
            await asyncio.sleep(self.POLL_SECONDS)
            await self.poll()

    async def poll(self) -> None:
        """Read the pointers; the store counts as gone once two tries in a row have failed."""
        for last in (False, True):
            try:
                found = [await self.command("get", self.client.get(pointer_key(r.name, r.manifest.space))) for r in self.rankers]
                self.generations = {
                    r.name: [g for g in (value or b"").decode("ascii").split(",") if g.isdigit()] for r, value in zip(self.rankers, found, strict=True)
                }
                if self.healthy is not True:
                    log.info("redis: answers, live generations %s", self.generations)
                self.healthy = True
                return
            except Exception as error:  # also what redis-py makes of bytes that are no Redis
                if last and self.healthy is not False:
                    log.warning("redis: no answer (%s), meta-embeddings fall back to the default vector", type(error).__name__)
        self.healthy = False

    async def command(self, name: str, call: Any) -> Any:
        begin = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout):
                return await call
        except (RedisError, OSError, TimeoutError) as error:
            metrics.REDIS_ERRORS.labels(type(error).__name__).inc()
            raise
        finally:
            metrics.REDIS_DURATION.labels(name).observe(time.perf_counter() - begin)

    def look_up(self, ranker: Ranker, user: str) -> Awaitable[MetaEmbedding]:
        """In a task of its own, so that a request that is cancelled never leaves half a reply in a connection."""
        task = asyncio.create_task(self.ask(ranker, user))
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return asyncio.shield(task)

    async def ask(self, ranker: Ranker, user: str) -> MetaEmbedding:
        if not self.healthy:
            metrics.EMBEDDINGS.labels("error").inc()
            return MetaEmbedding(ranker.default_meta, "error")
        live = self.generations.get(ranker.name, [])
        if not live:
            metrics.EMBEDDINGS.labels("miss").inc()
            return MetaEmbedding(ranker.default_meta, "default")
        try:
            values = await self.command("hmget", self.client.hmget(user_key(ranker.name, ranker.manifest.space, user), live))
            if not isinstance(values, list) or len(values) != len(live):
                raise RedisError("not an answer to HMGET")
        except Exception:  # also what redis-py makes of bytes that are no Redis
            metrics.EMBEDDINGS.labels("error").inc()
            return MetaEmbedding(ranker.default_meta, "error")
        for field, value in zip(live, values, strict=True):
            if value is None:
                continue
            try:
                vector, generation, created_at = unpack(value, ranker.manifest.meta_size)
                if str(generation) != field:
                    raise ValueError("the generation is not the field's")
            except (ValueError, TypeError):
                metrics.EMBEDDINGS.labels("corrupt").inc()
                continue
            age = max(0.0, time.time() - created_at)
            metrics.EMBEDDINGS.labels("hit_redis").inc()
            metrics.EMBEDDING_AGE.observe(age)
            return MetaEmbedding(vector, "hit", field, round(age, 1))
        metrics.EMBEDDINGS.labels("miss").inc()
        return MetaEmbedding(ranker.default_meta, "default")
