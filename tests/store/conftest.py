"""The real Redis of the store's tests, emptied before each; vectors for it; the metrics that the tests compare."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import numpy as np
import pytest
import redis
from prometheus_client import REGISTRY

from slatewise.bundle.ranker import Ranker
from slatewise.store.generations import Generations
from slatewise.store.lookup import RedisStore
from slatewise.store.push import push

GENEROUS = 20.0  # seconds; a time budget that a busy machine does not exceed by chance
PATIENCE = 30.0  # seconds; not reached if the code is right
RESULTS = ("hit_local", "hit_redis", "miss", "miss_local", "stale", "mismatched", "corrupt", "error")


@pytest.fixture
def client(redis_port: int) -> Iterator[redis.Redis]:
    with redis.Redis(port=redis_port) as client:
        client.flushall()
        yield client


def url(port: int) -> str:
    return f"redis://127.0.0.1:{port}/0"


def gauge(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"slatewise_{name}", labels)


def lookup_counts() -> Counter[str]:
    """Look-ups so far by result. Subtract an earlier one to get the difference."""
    return Counter({result: int(gauge("embedding_lookups_total", result=result) or 0) for result in RESULTS})


def random_vectors(users: int, ranker: Ranker, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Users "u0", "u1", ... and their (users, M) vectors."""
    size = (users, ranker.manifest.meta_size)
    return [f"u{k}" for k in range(users)], np.random.default_rng(seed).normal(size=size).astype(np.float32)


def push_vectors(client: redis.Redis, ranker: Ranker, users: list[str], vectors: np.ndarray) -> int:
    """Publish the vectors in the ranker's space; the generation."""
    return int(push(Generations(client, ranker.name, ranker.manifest.space), users, vectors)["generation"])


async def until_async(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait until the condition is true."""
    async with asyncio.timeout(PATIENCE):
        while not await condition():  # noqa: ASYNC110 - the condition depends on another process
            await asyncio.sleep(0.01)


async def has_status(store: RedisStore, ranker: Ranker, user: str, status: str) -> bool:
    return (await store.look_up(ranker, user)).status == status
