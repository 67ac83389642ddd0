"""The cache of look-ups: bounded in entries and in time, and correct about absent and unreadable vectors."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import numpy as np
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from slatewise.store import embedding_cache, lookup, poll
from slatewise.store.codec import user_key
from slatewise.store.embedding_cache import EmbeddingCache, Found
from slatewise.store.lookup import RedisStore
from slatewise.store.node import OPEN
from tests.store.conftest import GENEROUS, gauge, lookup_counts, url
from tests.support.store_load import RANKER, check, fill


@given(st.integers(1, 4), st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=30))
def test_entries_match_a_slow_list_of_the_latest_users(users: int, steps: list[tuple[bool, int]]) -> None:
    cache = EmbeddingCache(users, 60.0)
    latest: list[int] = []  # least recently used first
    for is_put, user in steps:
        key = ("r", "s", str(user))
        if is_put:
            cache.put(key, Found(np.zeros(1, np.float32), str(user)))
        else:
            found = cache.get(key)
            assert (found is not None) == (user in latest)
            assert found is None or found.version == str(user)
        if is_put or user in latest:
            latest = [*(other for other in latest if other != user), user][-users:]
    assert [user for *_, user in cache.entries] == list(map(str, latest))
    cache.clear()
    assert not cache.entries


def test_cached_vectors_and_absences_are_served_without_redis(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [RANKER], cache_seconds=60.0) as store:
            before = lookup_counts()
            for user, status in (("5", "hit"), ("nobody", "default")):
                for _ in range(3):
                    found = await store.look_up(RANKER, user)
                    assert found.status == status
                    check(user, found)
            assert lookup_counts() - before == Counter(hit_redis=1, hit_local=2, miss=1, miss_local=2)
            assert gauge("embedding_cache_entries") == 2
            store.nodes[""].switch(OPEN)
            assert (await store.look_up(RANKER, "5")).status == "hit", "the circuit is open, the entry is cached"
            assert (await store.look_up(RANKER, "6")).status == "error"

    asyncio.run(main())


def test_an_entry_expires_by_the_monotonic_clock(
    client: redis.Redis, redis_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(client)
    clock = Clock()
    for module in (embedding_cache, lookup, poll):
        monkeypatch.setattr(module, "time", clock)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [RANKER], cache_seconds=60.0) as store:
            before = lookup_counts()
            assert (await store.look_up(RANKER, "5")).status == "hit"
            for jump in (-3_600, 3_600, 3_600):
                clock.wall += jump
                found = await store.look_up(RANKER, "5")
                assert found.status == "hit" and found.age_seconds is not None and found.age_seconds >= 0
            assert lookup_counts() - before == Counter(hit_redis=1, hit_local=3)
            clock.steady += 61
            await store.look_up(RANKER, "5")
            assert lookup_counts() - before == Counter(hit_redis=2, hit_local=3)
            clock.wall -= 10_000_000
            store.cache.clear()
            assert (await store.look_up(RANKER, "5")).age_seconds == 0
            await store.poller.poll()
            assert gauge("embedding_generation_age_seconds", ranker="r") == 0

    asyncio.run(main())


class Clock:
    """Replaces the module `time`: the real clocks plus offsets."""

    def __init__(self) -> None:
        self.wall = self.steady = 0.0

    def time(self) -> float:
        return time.time() + self.wall

    def monotonic(self) -> float:
        return time.monotonic() + self.steady

    def perf_counter(self) -> float:
        return time.perf_counter()


def test_a_full_cache_drops_the_least_recently_used(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [RANKER], cache_seconds=60.0, cache_users=10) as store:
            for user in [*range(10), 0, 10, 11]:
                await store.look_up(RANKER, str(user))
            assert {user for *_, user in store.cache.entries} == {"0", "10", "11", *map(str, range(3, 10))}

    asyncio.run(main())


def test_nothing_is_cached_if_disabled_or_unreadable(client: redis.Redis, redis_port: int) -> None:
    fill(client)
    fill(client)
    client.hset(user_key("r", "s", "6"), "2", b"garbage")

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [RANKER]) as store:
            await store.look_up(RANKER, "5")
            assert not store.cache.entries
        async with RedisStore(url(redis_port), GENEROUS, lambda: [RANKER], cache_seconds=60.0) as store:
            before = lookup_counts()
            for _ in range(3):
                assert (await store.look_up(RANKER, "6")).version == "1"
            assert lookup_counts() - before == Counter(corrupt=3, hit_redis=3) and not store.cache.entries

    asyncio.run(main())
