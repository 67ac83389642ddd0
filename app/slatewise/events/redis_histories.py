"""Stored histories in Redis: one value per user, read in the round trip of the user's vector.

    slatewise:history:{<user>}      the value of `packed.py`; the braces put it into the slot of the user's vectors

Reads use the nodes of the store of meta-embeddings: its time budget, circuit breaker and batches. There is no cache,
so that an event is in the next read. Writes go to the primary, in one script for each user.
Called by: `writer.py`, `ranking/given.py`; `main.py` makes them. Calls: `store/lookup.py`, `store/node.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from slatewise import metrics
from slatewise.errors import StoreFault
from slatewise.events.event import Event
from slatewise.events.histories import DELETED_SECONDS, FAILED, Stored, by_user, unpacked
from slatewise.events.packed import EXTEND, arguments, tombstone
from slatewise.store.client import disconnect, is_wrong_type
from slatewise.store.lookup import RedisStore
from slatewise.store.node import CLOSED, RedisNode, ValueRead, call_after

EXTEND_DIGEST = hashlib.sha1(EXTEND.encode()).hexdigest()
TRIP_USERS = 100  # users in a round trip: making the commands of more would delay rankings
WRITE_SECONDS = 1.0  # longest round trip of a write: no ranking waits for it


def history_key(user: str) -> str:
    return f"slatewise:history:{{{user}}}"


class RedisHistories:
    """The histories in the Redis of a `RedisStore`, which must be open."""

    def __init__(self, store: RedisStore, most_events: int, ttl_seconds: float) -> None:
        self.store = store
        self.most_events = most_events
        self.ttl = math.ceil(ttl_seconds)
        self.deleting = asyncio.Lock()  # one connection at most

    def read(self, user: str, most: int) -> Awaitable[Stored]:
        """As `Histories.read`. Reads of one user do not share a command: each sees the events written before it."""
        future: asyncio.Future[Stored] = asyncio.get_running_loop().create_future()
        key = history_key(user)
        node = self.store.nodes.of_key(key)
        if node.circuit != CLOSED:
            give_up(future)
            return future
        read = ValueRead(key)
        read.waiters = 1
        read.add_done_callback(partial(complete, future, most))
        cancel_timer = call_after(self.store.timeout, partial(give_up, future))

        def ended(_: object) -> None:
            cancel_timer()
            read.waiters = 0

        future.add_done_callback(ended)
        node.enqueue(read)
        return future

    async def write(self, events: Sequence[tuple[Event, float]]) -> str:
        """As `Histories.write`. The users of one node of a Cluster share round trips."""
        letters = [FAILED] * len(events)
        users = by_user(events)
        nodes: dict[RedisNode, list[str]] = {}
        for user in users:
            nodes.setdefault(self.store.nodes.of_key(history_key(user)), []).append(user)

        async def write_node(node: RedisNode, mine: list[str]) -> None:
            for first in range(0, len(mine), TRIP_USERS):
                trip = mine[first : first + TRIP_USERS]
                commands: list[tuple[Any, ...]] = []
                for user in trip:
                    script = ("EVALSHA", EXTEND_DIGEST) if commands else ("EVAL", EXTEND)  # EVAL loads the script
                    given = [part for k in users[user] for part in arguments(*events[k])]
                    commands.append((*script, 1, history_key(user), self.most_events, self.ttl, *given))
                replies = await self.execute(node, commands)
                for user, reply in zip(trip, replies, strict=True):
                    if isinstance(reply, bytes) and len(reply) == len(users[user]):
                        for position, letter in zip(users[user], reply.decode(), strict=True):
                            letters[position] = letter
                if not any(isinstance(reply, bytes | ResponseError) for reply in replies):
                    break  # no answer at all: the next round trip would wait as long

        await asyncio.gather(*(write_node(*each) for each in nodes.items()))
        return "".join(letters)

    async def delete(self, user: str) -> None:
        """As `Histories.delete`. Raises StoreFault."""
        key = history_key(user)
        command = ("SET", key, tombstone(time.time()), "EX", DELETED_SECONDS)
        async with self.deleting:
            (reply,) = await self.execute(self.store.nodes.of_key(key), [command])
        if isinstance(reply, Exception):
            raise StoreFault("Redis did not delete the history; repeat the request")

    async def execute(self, node: RedisNode, commands: list[tuple[Any, ...]]) -> list[Any]:
        """Send commands that may be repeated in one round trip. Return a reply or an exception for each."""
        if node.circuit != CLOSED:
            return [StoreFault("the circuit is open")] * len(commands)
        begin = time.perf_counter()
        started = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(max(self.store.timeout, WRITE_SECONDS)):
                try:
                    replies = await self.pipeline(commands)
                except RedisConnectionError:  # a connection that the server had closed
                    replies = await self.pipeline(commands)
        except Exception as error:  # includes errors of redis-py's parser on bytes that are not Redis' protocol
            metrics.REDIS_ERRORS.labels(type(error).__name__).inc()
            node.failed(started)
            return [error] * len(commands)
        finally:
            metrics.REDIS_DURATION.labels("eval").observe(time.perf_counter() - begin)
        node.failures = 0
        for reply in replies:
            if isinstance(reply, Exception):
                metrics.REDIS_ERRORS.labels(type(reply).__name__).inc()
        return replies

    async def pipeline(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        pipe = self.store.client.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
        replies: list[Any] = await pipe.execute(raise_on_error=False)
        if not all(isinstance(reply, bytes | bool | Exception) for reply in replies):
            await disconnect(self.store.client)  # the stream may be out of step
            raise RedisError("not an answer to the command")
        return replies


def give_up(future: asyncio.Future[Stored]) -> None:
    if not future.done():
        metrics.HISTORY_READS_BY_RESULT["error"].inc()
        future.set_result(Stored(None, fault=True))


def complete(future: asyncio.Future[Stored], most: int, read: ValueRead) -> None:
    """Resolve the waiting request with the reply."""
    if future.done() or read.cancelled():
        return
    reply = read.result()
    if is_wrong_type(reply):
        metrics.HISTORY_READS_BY_RESULT["corrupt"].inc()
        future.set_result(Stored(None, fault=True))
    elif isinstance(reply, Exception):
        give_up(future)
    else:
        future.set_result(unpacked(reply, most))
