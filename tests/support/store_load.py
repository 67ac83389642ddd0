"""Continuous, checked look-ups for tests of the store: each vector names its user and its generation."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from slatewise.store.client import Client
from slatewise.store.generations import Generations
from slatewise.store.lookup import MetaEmbedding, RedisStore
from slatewise.store.node import CLOSED

DIM = 8
USERS = 300
RANKER: Any = SimpleNamespace(
    name="r",
    manifest=SimpleNamespace(space="s", meta_size=DIM, version=1, width=DIM),
    default_meta=np.full(DIM, -1, np.float32),
)  # the attributes of a ranker that a store reads


def vectors_of(generation: int, users: int = USERS) -> np.ndarray:
    """(users, DIM): the user's number, the generation, zeros."""
    vectors = np.zeros((users, DIM), np.float32)
    vectors[:, 0] = np.arange(users)
    vectors[:, 1] = generation
    return vectors


def fill(client: Client, users: int = USERS, full: bool = True) -> int:
    """Publish a generation of users "0" to "299", and return its number."""
    store = Generations(client, RANKER.name, RANKER.manifest.space)
    with store.begin(f"{time.time()}", full) as writing:
        store.write_chunk(
            writing.generation, 0, list(map(str, range(users))), vectors_of(writing.generation, users), time.time()
        )
        store.publish(writing, 1)
    return writing.generation


def check(user: str, found: MetaEmbedding) -> None:
    """Assert that a found vector is the user's, of the answer's generation, and otherwise the default vector."""
    if found.status in ("hit", "stale"):
        assert (str(int(found.vector[0])), str(int(found.vector[1]))) == (user, found.version), (
            "another user's vector, or of another generation"
        )
    else:
        assert found.status in ("default", "error") and found.version is None
        assert found.vector is RANKER.default_meta


@dataclass
class Load:
    store: RedisStore
    answers: list[tuple[float, float, str, str | None]] = field(default_factory=list)  # begun, seconds, status, version
    running: set[asyncio.Task[None]] = field(default_factory=set)

    async def ask(self, user: str) -> None:
        begin = time.perf_counter()
        found = await self.store.look_up(RANKER, user)
        self.answers.append((begin, time.perf_counter() - begin, found.status, found.version))
        check(user, found)

    async def run(self) -> None:
        chance = random.Random(0)
        while True:
            task = asyncio.create_task(self.ask(str(chance.randrange(USERS))))
            self.running.add(task)
            task.add_done_callback(self.running.discard)
            await asyncio.sleep(0.003)

    def since(self, begin: float) -> Counter[str]:
        return Counter(status for at, _, status, _ in self.answers if at >= begin)

    @property
    def longest(self) -> float:
        return max(seconds for _, seconds, _, _ in self.answers)


@asynccontextmanager
async def loaded(store: RedisStore) -> AsyncIterator[Load]:
    """About 300 look-ups a second. On exit all are answered and checked."""
    load = Load(store)
    runner = asyncio.create_task(load.run())
    try:
        yield load
    finally:
        runner.cancel()
        results = await asyncio.gather(runner, *load.running, return_exceptions=True)
    for result in results[1:]:
        if isinstance(result, BaseException):
            raise result


async def until(condition: Callable[[], Any], patience: float) -> float:
    """Wait until the condition holds, and return the seconds it took. Fails after `patience` seconds."""
    begin = time.perf_counter()
    while not condition():
        assert time.perf_counter() - begin < patience, f"still false after {patience} s"
        await asyncio.sleep(0.005)
    return time.perf_counter() - begin


def circuit(store: RedisStore) -> int:
    """The worst circuit state of all nodes."""
    return max((node.circuit for node in store.nodes.values()), default=CLOSED)


async def until_closed(store: RedisStore, patience: float = 5.0) -> float:
    return await until(lambda: store.poller.spaces and circuit(store) == CLOSED, patience)
