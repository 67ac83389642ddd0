"""Who the user is beyond the history: one vector, from the bundle (embedded store) or from Redis, behind one call.

A miss and a fault take the same path, the un-adapted default vector; a fault says so. What a request waits for is bounded by
the time budget, whatever Redis does: the commands run in the store's own tasks, the request waits for a future with a timer.

    request --> cache --> flight (one a user) --> round trip (what arrives meanwhile goes with the next) --> one HMGET a user

The pointer is polled off the request path. After failed round trips in a row the circuit opens: nobody asks Redis until the
poll has been answered inside the budget. Before: `generations.py` filled Redis. After: `pipeline.py` feeds the vector to late fusion.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import redis.asyncio as aioredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from app import metrics
from app.bundle import Ranker
from app.features import Float32
from app.redis_clients import connect_async
from app.vectors import Corrupt, Mismatched, about_key, pointer_key, read_pointer, unpack, user_key

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


def served(vector: Float32, version: str, created_at: float, max_age_seconds: float, place: str) -> MetaEmbedding:
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
        return served(ranker.embedded_meta[row], str(ranker.manifest.version), created_at, self.max_age_seconds, "hit_local")


class Found(NamedTuple):
    """What Redis had for a user; no vector: it had none."""

    vector: Float32 | None
    version: str = ""
    created_at: float = 0.0


@dataclass(eq=False)
class Flight:
    """A user's look-up on its way, and the requests that wait for it."""

    ranker: Ranker
    user: str
    waiting: list[asyncio.Future[MetaEmbedding]] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str]:
        return self.ranker.name, self.user

    def land(self, found: Found | None, max_age_seconds: float) -> None:
        """Answer those who still wait; None: a fault."""
        for future in self.waiting:
            if future.done():
                continue
            if found is None:
                future.set_result(default(self.ranker, "error", "error"))
            elif found.vector is None:
                future.set_result(default(self.ranker, "default", "miss"))
            else:
                future.set_result(served(found.vector, found.version, found.created_at, max_age_seconds, "hit_redis"))


CLOSED, HALF_OPEN, OPEN = range(3)


class RedisStore:
    """`async with RedisStore(url, timeout, rankers)`: polls the pointers every second, more often while nothing answers, until it is closed."""

    POLL_SECONDS = 1.0
    TRIP_SECONDS = 1.0  # after which a connection is given up; nobody waits so long, but a connection may take longer to make than a look-up may
    TRIPS = 4  # at a time
    BATCH = 32  # users of one round trip: redis-py takes about a tenth of a millisecond for each, and all of them must be inside the budget
    FAILURES = 3  # round trips in a row, each begun after the one before had failed, that open the circuit

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
        self.timeout, self.max_age_seconds = timeout_seconds, max_age_seconds
        self.client: Any = connect_async(url, max(timeout_seconds, self.TRIP_SECONDS), 4 * self.TRIPS)  # redis-py is typed for both of its halves at once
        self.rankers = list(rankers)
        self.pointers: dict[str, bytes | None] = {}  # ranker -> the pointer's bytes
        self.generations: dict[str, list[str]] = {}  # ranker -> live generations, newest first
        self.created: dict[str, tuple[str, float]] = {}  # ranker -> its newest generation, and since when there is one
        self.cache: OrderedDict[tuple[str, str], tuple[float, Found]] = OrderedDict()  # least recently used first; until when (monotonic)
        self.cache_seconds, self.cache_users = cache_seconds, cache_users
        self.epoch = 0  # counts changes of a pointer
        self.circuit = OPEN  # until the first poll
        self.failures, self.failed_at = 0, 0.0
        self.flights: dict[tuple[str, str], Flight] = {}
        self.queue: list[Flight] = []
        self.arrived = asyncio.Event()
        self.trips: set[asyncio.Task[None]] = set()
        self.late: set[asyncio.Task[None]] = set()  # past the budget: nobody waits for them, and they hold nobody up
        self.closing = False

    async def __aenter__(self) -> RedisStore:
        metrics.CIRCUIT_STATE.set(self.circuit)
        await self.poll()
        self.poller, self.conductor = asyncio.create_task(self.keep_polling()), asyncio.create_task(self.conduct())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closing = True  # a cancellation that arrives while redis-py connects may be swallowed there
        for task in (self.poller, self.conductor):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await asyncio.gather(*self.trips, *self.late, return_exceptions=True)
        for flight in self.queue:
            flight.land(None, 0.0)
        await self.client.aclose()
        if sentinels := getattr(getattr(self.client, "connection_pool", None), "sentinel_manager", None):
            await sentinels.aclose()

    # The request's side: nothing here waits for Redis

    def look_up(self, ranker: Ranker, user: str) -> Awaitable[MetaEmbedding]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[MetaEmbedding] = loop.create_future()
        kept = self.cache.get((ranker.name, user))
        if kept is not None and kept[0] > time.monotonic():
            self.cache.move_to_end((ranker.name, user))
            vector, version, created_at = kept[1]
            if vector is None:
                future.set_result(default(ranker, "default", "miss_local"))
            else:
                future.set_result(served(vector, version, created_at, self.max_age_seconds, "hit_local"))
            metrics.EMBEDDING_DURATION.observe(0.0)
        elif self.circuit != CLOSED:
            future.set_result(default(ranker, "error", "error"))
            metrics.EMBEDDING_DURATION.observe(0.0)
        elif not self.generations.get(ranker.name):
            future.set_result(default(ranker, "default", "miss"))
            metrics.EMBEDDING_DURATION.observe(0.0)
        else:
            flight = self.flights.get((ranker.name, user))
            if flight is None:
                flight = self.flights[ranker.name, user] = Flight(ranker, user)
                self.queue.append(flight)
                self.arrived.set()
            flight.waiting.append(future)
            begin, timer = time.perf_counter(), loop.call_later(self.timeout, self.give_up, ranker, future)

            def ended(_: object) -> None:
                timer.cancel()
                metrics.EMBEDDING_DURATION.observe(time.perf_counter() - begin)

            future.add_done_callback(ended)
        return future

    def give_up(self, ranker: Ranker, future: asyncio.Future[MetaEmbedding]) -> None:
        if not future.done():
            future.set_result(default(ranker, "error", "error"))

    # Round trips, in tasks of their own: a request that goes away never leaves half a reply in a connection

    async def conduct(self) -> None:
        """One round trip after the other; a second one only where the one before takes its time."""
        while not self.closing:
            await self.arrived.wait()
            self.arrived.clear()
            while self.queue:
                while len(self.trips) >= self.TRIPS or len(self.late) >= 2 * self.TRIPS:
                    await asyncio.wait(self.trips | self.late, timeout=self.timeout / 4, return_when=asyncio.FIRST_COMPLETED)
                batch, self.queue = self.queue[: self.BATCH], self.queue[self.BATCH :]
                for flight in batch:
                    if all(future.done() for future in flight.waiting):
                        self.forget(flight)
                batch = [flight for flight in batch if self.flights.get(flight.key) is flight]
                if batch:
                    trip = asyncio.create_task(self.travel(batch))
                    self.trips.add(trip)
                    trip.add_done_callback(self.arrive)
                    await asyncio.wait([trip], timeout=self.timeout / 4)

    def arrive(self, trip: asyncio.Task[None]) -> None:
        self.trips.discard(trip)
        self.late.discard(trip)

    def forget(self, flight: Flight) -> None:
        """Who asks for this user from now on does so anew."""
        if self.flights.get(flight.key) is flight:
            del self.flights[flight.key]

    async def travel(self, batch: list[Flight]) -> None:
        loop, trip, epoch = asyncio.get_running_loop(), asyncio.current_task(), self.epoch
        assert trip is not None
        begin = loop.time()
        live = [self.generations.get(flight.ranker.name, []) for flight in batch]

        def overdue() -> None:
            self.trips.discard(trip)
            self.late.add(trip)
            self.failed(begin)
            for flight in batch:
                self.forget(flight)

        timer = loop.call_later(self.timeout, overdue)
        try:
            async with asyncio.timeout(max(self.timeout, self.TRIP_SECONDS)):
                replies = await self.fetch(batch, live)
        except Exception as error:  # also what redis-py makes of bytes that are no Redis
            metrics.REDIS_ERRORS.labels(type(error).__name__).inc()
            replies = [error] * len(batch)
        finally:
            timer.cancel()
            metrics.REDIS_DURATION.labels("hmget").observe(loop.time() - begin)
        if trip not in self.late:
            if all(isinstance(reply, Exception) and not is_wrong_type(reply) for reply in replies):
                self.failed(begin)
            else:
                self.failures = 0
        for flight, fields, reply in zip(batch, live, replies, strict=True):
            self.forget(flight)
            found, whole = self.understand(flight.ranker, fields, reply)
            if found is not None and whole and self.epoch == epoch and self.cache_seconds:  # a vector of before is not kept beyond a change
                self.keep(flight.key, found)
            flight.land(found, self.max_age_seconds)

    async def fetch(self, batch: list[Flight], live: list[list[str]]) -> list[Any]:
        """A reply or an exception for each, in one round trip; in a Cluster in one to each node, so that one that is down takes its own users only."""
        keys = [user_key(flight.ranker.name, flight.ranker.manifest.space, flight.user) for flight in batch]
        groups: dict[Any, list[int]] = {None: list(range(len(batch)))}
        if isinstance(self.client, aioredis.RedisCluster):
            await self.client.initialize()
            groups = {}
            for k, key in enumerate(keys):
                groups.setdefault(self.client.get_node_from_key(key), []).append(k)
        replies: list[Any] = [None] * len(batch)

        async def ask(group: list[int]) -> None:
            begin = asyncio.get_running_loop().time()
            for last in (False, True):
                pipe = self.client.pipeline(transaction=False)
                for k in group:
                    pipe.hmget(keys[k], live[k] or ["0"])
                try:
                    for k, reply in zip(group, await pipe.execute(raise_on_error=False), strict=True):
                        replies[k] = reply
                    return
                except RedisConnectionError:  # a connection that the server had closed
                    if last or asyncio.get_running_loop().time() - begin > self.timeout:
                        raise

        for group, outcome in zip(groups.values(), await asyncio.gather(*map(ask, groups.values()), return_exceptions=True), strict=True):
            if isinstance(outcome, BaseException):
                metrics.REDIS_ERRORS.labels(type(outcome).__name__).inc()
                for k in group:
                    replies[k] = outcome if isinstance(outcome, Exception) else RedisError("cancelled")
        if any(
            not isinstance(reply, Exception | list) or (isinstance(reply, list) and len(reply) != len(fields or ["0"])) for reply, fields in zip(replies, live)
        ):
            await self.disconnect()  # whatever speaks there: no byte of it is to be taken for another's
            raise RedisError("not an answer to HMGET")
        return replies

    async def disconnect(self) -> None:
        await (self.client if isinstance(self.client, aioredis.RedisCluster) else self.client.connection_pool).aclose()

    def understand(self, ranker: Ranker, live: list[str], reply: Any) -> tuple[Found | None, bool]:
        """(the newest readable vector, or that there is none, or None for a fault; whether everything was readable)."""
        if isinstance(reply, Exception):
            if not is_wrong_type(reply):
                return None, False
            metrics.EMBEDDINGS_BY_RESULT["corrupt"].inc()
            return Found(None), False
        whole = True
        for version, value in zip(live, reply, strict=False):
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

    def keep(self, key: tuple[str, str], found: Found) -> None:
        self.cache[key] = time.monotonic() + self.cache_seconds, found
        self.cache.move_to_end(key)
        while len(self.cache) > self.cache_users:
            self.cache.popitem(last=False)
        metrics.EMBEDDING_CACHE_ENTRIES.set(len(self.cache))

    # The circuit, and the poll that closes it

    def failed(self, begin: float) -> None:
        """Count a failed round trip that began then. Those that were under way together count once: it may have been us who stood still."""
        if begin < self.failed_at:
            return
        self.failures, self.failed_at = self.failures + 1, asyncio.get_running_loop().time()
        if self.failures >= self.FAILURES:
            self.switch(OPEN)

    def switch(self, circuit: int) -> None:
        if circuit != self.circuit:
            if OPEN not in (circuit, self.circuit) or HALF_OPEN not in (circuit, self.circuit):
                log.warning("redis: %s", "answers" if circuit == CLOSED else "no answer in time, meta-embeddings fall back to the default vector")
            self.circuit = circuit
            metrics.CIRCUIT_STATE.set(circuit)
        if circuit == OPEN:
            for flight in self.queue:
                self.forget(flight)
                flight.land(None, 0.0)
            self.queue = []

    async def keep_polling(self) -> None:
        while not self.closing:
            await asyncio.sleep(self.POLL_SECONDS if self.circuit == CLOSED else self.POLL_SECONDS / 4)
            await self.poll()

    async def poll(self) -> None:
        """Read the pointers. While the circuit is open this is the probe that closes it, if an answer comes inside the budget.

        The first try is off the clock, for it may have to connect; where it fails on a closed circuit, the connection may have been an old one.
        """
        loop, closed = asyncio.get_running_loop(), self.circuit == CLOSED
        try:
            if closed:
                try:
                    await self.read_pointers()
                except Exception:
                    await self.read_pointers()
            else:
                self.switch(HALF_OPEN)
                await self.read_pointers()
                begins = []
                for _ in range(3):
                    begins.append(loop.time())
                    await self.read_pointers()
                if min(end - begin for begin, end in zip(begins, [*begins[1:], loop.time()])) > self.timeout:
                    raise TimeoutError
                self.failures = 0
                self.switch(CLOSED)
        except Exception:  # also what redis-py makes of bytes that are no Redis
            self.switch(OPEN)
            if isinstance(self.client, aioredis.RedisCluster):
                await self.find_nodes()
        for ranker in self.rankers:
            if created := self.created.get(ranker.name):
                metrics.GENERATION_AGE.labels(ranker.name).set(max(0.0, time.time() - created[1]))

    async def find_nodes(self) -> None:
        """A Cluster may have changed while nobody could say so."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(self.TRIP_SECONDS):
                await self.client.nodes_manager.initialize()

    async def read_pointers(self) -> None:
        begin = time.perf_counter()
        try:
            async with asyncio.timeout(max(self.timeout, self.TRIP_SECONDS)):
                for ranker in self.rankers:
                    value = await self.client.get(pointer_key(ranker.name, ranker.manifest.space))
                    if not isinstance(value, bytes | None):
                        await self.disconnect()
                        raise RedisError("not an answer to GET")
                    self.pointed(ranker, value)
                    await self.read_about(ranker)
        except Exception as error:
            metrics.REDIS_ERRORS.labels(type(error).__name__).inc()
            raise
        finally:
            metrics.REDIS_DURATION.labels("get").observe(time.perf_counter() - begin)

    def pointed(self, ranker: Ranker, value: bytes | None) -> None:
        """Take what a pointer says. Any change of its bytes empties the cache: what it meant before may be gone, or forgotten."""
        if ranker.name in self.pointers and self.pointers[ranker.name] == value:
            return
        self.pointers[ranker.name], live = value, read_pointer(value)[0]
        self.generations[ranker.name] = list(map(str, live))
        self.epoch += 1
        self.cache.clear()
        metrics.EMBEDDING_CACHE_ENTRIES.set(0)
        metrics.GENERATION.labels(ranker.name).set(live[0] if live else 0)
        log.info("redis: live generations of %s are %s", ranker.name, live)

    async def read_about(self, ranker: Ranker) -> None:
        """Since when there is the newest generation; asked once for each."""
        newest = next(iter(self.generations[ranker.name]), None)
        if newest is None or self.created.get(ranker.name, ("",))[0] == newest:
            return
        text = await self.client.hget(about_key(ranker.name, ranker.manifest.space), newest)
        with contextlib.suppress(ValueError, TypeError, KeyError):  # whoever set the pointer by hand has written none
            self.created[ranker.name] = newest, float(json.loads(text)["created_at"])


def is_wrong_type(reply: object) -> bool:
    """The key holds no hash: one user's fault, and no sign that Redis is ill."""
    return isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE")
