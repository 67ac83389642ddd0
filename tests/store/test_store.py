"""The store when all is well: round trips are shared, the cache keeps what it may, and a switch of generations mixes nothing."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis
from prometheus_client import REGISTRY

from slatewise.store import lookup as meta_embeddings
from slatewise.store.codec import metadata_key, pack, pointer_key, user_key
from slatewise.store.generations import Generations
from slatewise.store.lookup import EmbeddedStore, RedisStore
from slatewise.store.node import CLOSED, OPEN, RedisNode
from tests.support.fault_proxy import fault_proxy
from tests.support.store_load import DIM, RANKER, USERS, check, circuit, fill, loaded, until, until_closed, vectors_of

GENEROUS = 20.0  # seconds


@pytest.fixture
def client(redis_port: int) -> Iterator[redis.Redis]:
    with redis.Redis(port=redis_port) as client:
        client.flushall()
        yield client


def url(port: int) -> str:
    return f"redis://127.0.0.1:{port}/0"


def counts() -> Counter[str]:
    results = ("hit_local", "hit_redis", "miss", "miss_local", "stale", "mismatched", "corrupt", "error")
    return Counter(
        {
            result: int(REGISTRY.get_sample_value("slatewise_embedding_lookups_total", {"result": result}) or 0)
            for result in results
        }
    )


def gauge(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"slatewise_{name}", labels)


# Round trips


def test_look_ups_of_one_moment_share_a_round_trip_and_a_users_own_share_a_command(
    client: redis.Redis, redis_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisNode, "BATCH", 64)
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, [RANKER]) as store:
            commands = calls(client)
            trips = round_trips()
            found = await asyncio.gather(*(store.look_up(RANKER, str(k // 3)) for k in range(192)))
            for k, each in enumerate(found):
                assert each.status == "hit"
                check(str(k // 3), each)
            assert calls(client) - commands == 64
            assert round_trips() - trips == 1

    asyncio.run(main())


def calls(client: redis.Redis) -> int:
    return int(client.info("commandstats").get("cmdstat_hmget", {"calls": 0})["calls"])


def round_trips() -> float:
    return REGISTRY.get_sample_value("slatewise_redis_command_duration_seconds_count", {"command": "hmget"}) or 0.0


def test_what_arrives_during_a_round_trip_goes_with_the_next_one(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        async with fault_proxy(redis_port) as proxy, RedisStore(url(proxy.port), GENEROUS, [RANKER]) as store:
            trips = round_trips()
            proxy.may_speak.clear()
            first = store.look_up(RANKER, "0")
            await until(lambda: store.nodes[""].under_way, GENEROUS)
            rest = [store.look_up(RANKER, str(user)) for user in range(1, 30)]
            await asyncio.sleep(0.05)
            proxy.may_speak.set()
            for user, found in enumerate(await asyncio.gather(first, *rest)):
                assert found.status == "hit"
                check(str(user), found)
            assert round_trips() - trips == 2

    asyncio.run(main())


def test_a_round_trip_is_bounded(client: redis.Redis, redis_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RedisNode, "BATCH", 10)
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, [RANKER]) as store:
            trips = round_trips()
            for user, found in enumerate(
                await asyncio.gather(*(store.look_up(RANKER, str(user)) for user in range(95)))
            ):
                check(str(user), found)
                assert found.status == "hit"
            assert round_trips() - trips == 10

    asyncio.run(main())


def test_who_stood_still_reads_what_arrived_before_giving_up(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), 0.05, [RANKER]) as store:
            await until_closed(store)
            for user in map(str, range(20)):
                asked = store.look_up(RANKER, user)
                while not store.nodes[""].under_way:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                await asyncio.sleep(0.002)  # long enough for the command to be sent
                time.sleep(0.1)  # noqa: ASYNC251 - that is the point
                assert (await asked).status == "hit"
                await until(lambda: not store.nodes[""].under_way, GENEROUS)
            assert circuit(store) == CLOSED

    asyncio.run(main())


def test_a_request_that_goes_away_takes_nothing_from_another_that_waits_for_the_same_user(
    client: redis.Redis, redis_port: int
) -> None:
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, [RANKER]) as store:
            one = asyncio.ensure_future(store.look_up(RANKER, "5"))
            other = store.look_up(RANKER, "5")
            one.cancel()
            assert (await other).status == "hit"

    asyncio.run(main())


# The cache


def test_a_kept_vector_is_served_without_redis_and_so_is_that_there_is_none(
    client: redis.Redis, redis_port: int
) -> None:
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, [RANKER], cache_seconds=60.0) as store:
            before = counts()
            for user, status in (("5", "hit"), ("nobody", "default")):
                for _ in range(3):
                    found = await store.look_up(RANKER, user)
                    assert found.status == status
                    check(user, found)
            assert counts() - before == Counter(hit_redis=1, hit_local=2, miss=1, miss_local=2)
            assert gauge("embedding_cache_entries") == 2
            store.nodes[""].switch(OPEN)
            assert (await store.look_up(RANKER, "5")).status == "hit", "also while Redis is away"
            assert (await store.look_up(RANKER, "6")).status == "error"

    asyncio.run(main())


def test_a_kept_vector_expires_and_by_a_clock_that_does_not_jump(
    client: redis.Redis, redis_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(client)
    clock = Clock()
    monkeypatch.setattr(meta_embeddings, "time", clock)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, [RANKER], cache_seconds=60.0) as store:
            before = counts()
            assert (await store.look_up(RANKER, "5")).status == "hit"
            for jump in (-3_600, 3_600, 3_600):
                clock.wall += jump
                found = await store.look_up(RANKER, "5")
                assert found.status == "hit" and found.age_seconds is not None and found.age_seconds >= 0
            assert counts() - before == Counter(hit_redis=1, hit_local=3)
            clock.steady += 61
            await store.look_up(RANKER, "5")
            assert counts() - before == Counter(hit_redis=2, hit_local=3)
            clock.wall -= 10_000_000
            store.cache.clear()
            assert (await store.look_up(RANKER, "5")).age_seconds == 0
            await store.poll()
            assert gauge("embedding_generation_age_seconds", ranker="r") == 0

    asyncio.run(main())


class Clock:
    """In place of the module `time`: moves by itself, and when told."""

    def __init__(self) -> None:
        self.wall = self.steady = 0.0

    def time(self) -> float:
        return time.time() + self.wall

    def monotonic(self) -> float:
        return time.monotonic() + self.steady

    def perf_counter(self) -> float:
        return time.perf_counter()


def test_the_cache_is_bounded_and_the_least_recently_used_go_first(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, [RANKER], cache_seconds=60.0, cache_users=10) as store:
            for user in [*range(10), 0, 10, 11]:
                await store.look_up(RANKER, str(user))
            assert {user for _, user in store.cache} == {"0", "10", "11", *map(str, range(3, 10))}

    asyncio.run(main())


def test_nothing_is_kept_where_that_is_off_or_where_something_was_unreadable(
    client: redis.Redis, redis_port: int
) -> None:
    fill(client)
    fill(client)
    client.hset(user_key("r", "s", "6"), "2", b"garbage")

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, [RANKER]) as store:
            await store.look_up(RANKER, "5")
            assert not store.cache
        async with RedisStore(url(redis_port), GENEROUS, [RANKER], cache_seconds=60.0) as store:
            before = counts()
            for _ in range(3):
                assert (await store.look_up(RANKER, "6")).version == "1"
            assert counts() - before == Counter(corrupt=3, hit_redis=3) and not store.cache

    asyncio.run(main())


@pytest.mark.parametrize("change", ["publish", "roll back", "forget"])
def test_any_change_of_the_pointer_empties_the_cache(client: redis.Redis, redis_port: int, change: str) -> None:
    fill(client)
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, [RANKER], cache_seconds=60.0) as store:
            for user in ("5", "6"):
                assert (await store.look_up(RANKER, user)).version == "2"
            admin = Generations(client, "r", "s")
            {
                "publish": lambda: fill(client, 6),
                "roll back": admin.roll_back,
                "forget": lambda: admin.delete_user("5"),
            }[change]()
            await until(lambda: not store.cache, 5.0)
            found = [await store.look_up(RANKER, user) for user in ("5", "6")]
            expected = {
                "publish": [("hit", "3"), ("hit", "2")],
                "roll back": [("hit", "1")] * 2,
                "forget": [("default", None), ("hit", "2")],
            }[change]
            assert [(each.status, each.version) for each in found] == expected

    asyncio.run(main())


def test_a_vector_asked_for_before_the_pointer_changed_is_not_kept_after(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        async with (
            fault_proxy(redis_port) as proxy,
            RedisStore(url(proxy.port), GENEROUS, [RANKER], cache_seconds=60.0) as store,
        ):
            proxy.may_speak.clear()
            asked = store.look_up(RANKER, "5")
            await until(lambda: store.nodes[""].under_way, GENEROUS)
            await asyncio.sleep(0.05)
            store.apply_pointer(RANKER, b"2,1")
            proxy.may_speak.set()
            found = await asked
            check("5", found)
            assert found.version == "1" and not store.cache

    asyncio.run(main())


# Age


def test_a_vector_older_than_allowed_is_served_and_said_to_be_stale(client: redis.Redis, redis_port: int) -> None:
    fill(client)
    client.hset(user_key("r", "s", "5"), "1", pack(vectors_of(1)[5], 1, time.time() - 1_000))

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, [RANKER], cache_seconds=60.0, max_age_seconds=500) as store:
            before = counts()
            for _ in range(2):  # from Redis, and kept
                found = await store.look_up(RANKER, "5")
                check("5", found)
                assert (
                    found.status == "stale"
                    and found.version == "1"
                    and found.age_seconds == pytest.approx(1_000, abs=60)
                )
            assert (await store.look_up(RANKER, "6")).status == "hit"
            assert counts() - before == Counter(stale=2, hit_redis=1)

    asyncio.run(main())


def test_the_bundles_vectors_age_too(ranker: Any) -> None:
    async def main() -> None:
        user = next(iter(ranker.embedded_users))
        assert (await EmbeddedStore(1e-9).look_up(ranker, user)).status == "stale"
        assert (await EmbeddedStore(1e9).look_up(ranker, user)).status == "hit"

    asyncio.run(main())


def test_number_and_age_of_the_generation_are_in_the_metrics(client: redis.Redis, redis_port: int) -> None:
    fill(client)
    fill(client)
    client.hset(metadata_key("r", "s"), "2", f'{{"created_at": {time.time() - 500}, "kind": "full", "users": 1}}')

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, [RANKER]) as store:
            assert gauge("embedding_generation", ranker="r") == 2 and gauge("redis_circuit_state") == 0
            assert gauge("embedding_generation_age_seconds", ranker="r") == pytest.approx(500, abs=60)
            Generations(client, "r", "s").roll_back()
            await until(lambda: store.generations["r"] == ["1"], 5.0)
            await until(lambda: gauge("embedding_generation_age_seconds", ranker="r") < 60, 5.0)
            assert gauge("embedding_generation", ranker="r") == 1
            store.nodes[""].switch(OPEN)
            assert gauge("redis_circuit_state") == 2
            await until_closed(store)
            assert gauge("redis_circuit_state") == 0

    asyncio.run(main())


def test_the_age_begins_anew_in_a_redis_that_was_emptied_and_counts_from_1_again(
    client: redis.Redis, redis_port: int
) -> None:
    fill(client)
    client.hset(metadata_key("r", "s"), "1", f'{{"created_at": {time.time() - 500}, "kind": "full", "users": 1}}')

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, [RANKER]) as store:
            assert gauge("embedding_generation_age_seconds", ranker="r") == pytest.approx(500, abs=60)
            client.flushdb()
            await until(lambda: store.generations["r"] == [], 5.0)
            fill(client)
            await until(lambda: store.generations["r"] == ["1"], 5.0)
            await until(lambda: gauge("embedding_generation_age_seconds", ranker="r") < 60, 5.0)

    asyncio.run(main())


# Dtypes


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_smaller_dtypes_are_served(client: redis.Redis, redis_port: int, dtype: str) -> None:
    sent = np.random.default_rng(0).normal(size=(5, DIM)).astype(np.float32)
    admin = Generations(client, "r", "s")
    with admin.begin("plan", full=True) as writing:
        admin.write_chunk(1, 0, list("abcde"), sent, time.time(), dtype)
        admin.publish(writing, 1)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, [RANKER]) as store:
            for user, vector in zip("abcde", sent, strict=True):
                found = await store.look_up(RANKER, user)
                assert found.status == "hit" and found.vector.dtype == np.float32
                np.testing.assert_allclose(found.vector, vector, atol=0.02)

    asyncio.run(main())


# Switching under load


def test_switches_and_roll_backs_under_load_mix_nothing_and_are_everywhere_within_two_seconds(
    client: redis.Redis, redis_port: int
) -> None:
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, [RANKER], cache_seconds=60.0) as store:
            await until_closed(store)
            async with loaded(store) as load:
                await asyncio.sleep(0.3)
                changes = []
                for change in (fill, fill, lambda client: Generations(client, "r", "s").roll_back(), fill):
                    before = store.generations["r"][0]
                    await asyncio.to_thread(change, client)
                    changes.append((time.perf_counter(), before))
                    await asyncio.sleep(2.3)
            for (at, old), until_ in zip(changes, [*(at for at, _ in changes[1:]), float("inf")], strict=True):
                last = max(
                    (begun - at for begun, _, _, version in load.answers if at <= begun < until_ and version == old),
                    default=0.0,
                )
                assert last < 2.0
            assert set(load.since(0.0)) == {"hit"}
            assert {version for *_, version in load.answers} == {"1", "2", "3", "4"}

    asyncio.run(main())


def test_a_half_finished_generation_is_never_visible(client: redis.Redis, redis_port: int) -> None:
    fill(client)
    admin = Generations(client, "r", "s")

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, [RANKER]) as store:
            await until_closed(store)
            async with loaded(store) as load:
                writing = admin.begin("plan", full=True)
                for chunk, user in enumerate(range(0, USERS, 10)):
                    admin.write_chunk(
                        2, chunk, list(map(str, range(user, user + 10))), vectors_of(2)[user : user + 10], time.time()
                    )
                    await asyncio.sleep(0.05)
                writing.release()  # as if it had died
                await asyncio.sleep(1.5)
            assert {version for *_, version in load.answers} == {"1"}
            assert client.get(pointer_key("r", "s")) == b"1"

    asyncio.run(main())
