"""The poll: changes of the pointer, the spaces that are served, the gauges, and generations that change under load."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import redis

from slatewise.bundle.ranker import Ranker
from slatewise.store.codec import metadata_key, pointer_key
from slatewise.store.generations import Generations
from slatewise.store.lookup import RedisStore
from slatewise.store.node import OPEN
from slatewise.store.poll import Poller
from slatewise.store.push import push
from tests.store.conftest import (
    GENEROUS,
    gauge,
    has_status,
    push_vectors,
    random_vectors,
    until_async,
    url,
)
from tests.support.fault_proxy import fault_proxy
from tests.support.store_load import DIM, RANKER, USERS, check, fill, loaded, until, until_closed, vectors_of

# The spaces that are served


def reader_of(space: str, version: int) -> Any:
    """A version of the ranker "r" that reads this space; its default vector is filled with minus the version."""
    return SimpleNamespace(
        name="r",
        manifest=SimpleNamespace(space=space, meta_size=DIM, version=version, width=DIM),
        default_meta=np.full(DIM, -version, np.float32),
    )


def publish(client: redis.Redis, space: str, value: float) -> None:
    """A full generation of the users "a" and "b" in a space of the ranker "r"."""
    push(Generations(client, "r", space), ["a", "b"], np.full((2, DIM), value, np.float32))


def test_two_versions_with_different_spaces_are_both_served(client: redis.Redis, redis_port: int) -> None:
    old = reader_of("s1", 1)
    new = reader_of("s2", 2)
    publish(client, "s1", 10.0)
    publish(client, "s2", 20.0)
    publish(client, "s2", 30.0)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [old, new], cache_seconds=60.0) as store:
            for _ in range(2):  # from Redis, then from the cache
                answers = await asyncio.gather(*(store.look_up(ranker, "a") for ranker in (old, new)))
                assert [(each.status, each.version, each.vector[0]) for each in answers] == [
                    ("hit", "1", 10.0),
                    ("hit", "2", 30.0),
                ]
            assert gauge("embedding_generation", ranker="r") == 1, "the space that is served first"
            Generations(client, "r", "s2").delete_user("a")
            await store.poller.poll()
            answers = await asyncio.gather(*(store.look_up(ranker, "a") for ranker in (old, new)))
            assert [(each.status, each.vector[0]) for each in answers] == [("hit", 10.0), ("default", -2.0)]

    asyncio.run(main())


def test_two_versions_with_one_space_share_reads_not_defaults(client: redis.Redis, redis_port: int) -> None:
    old = reader_of("s", 1)
    new = reader_of("s", 2)
    publish(client, "s", 10.0)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [old, new]) as store:
            waiting = [store.look_up(ranker, user) for user in ("a", "absent") for ranker in (old, new)]
            assert len(store.pending) == 2
            answers = await asyncio.gather(*waiting)
            assert [(each.status, each.vector[0]) for each in answers] == [
                ("hit", 10.0),
                ("hit", 10.0),
                ("default", -1.0),
                ("default", -2.0),
            ]

    asyncio.run(main())


def test_a_ranker_served_later_is_found_by_the_next_poll(client: redis.Redis, redis_port: int) -> None:
    old = reader_of("s1", 1)
    new = reader_of("s2", 2)
    publish(client, "s1", 10.0)
    publish(client, "s2", 20.0)
    served = [old]

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: served, cache_seconds=60.0) as store:
            assert (await store.look_up(old, "a")).status == "hit"
            served.insert(0, new)
            assert (await store.look_up(new, "a")).status == "error", "its pointer is not read yet"
            await store.poller.poll()
            assert (await store.look_up(new, "a")).vector[0] == 20.0
            served.remove(old)
            await store.poller.poll()
            assert store.poller.spaces.keys() == {("r", "s2")} and not store.cache.entries
            publish(client, "s1", 11.0)
            served.append(old)
            await store.poller.poll()
            assert (await store.look_up(old, "a")).vector[0] == 11.0, "the old cache entry and pointer are gone"

    asyncio.run(main())


# Changes of the pointer


@pytest.mark.parametrize("change", ["publish", "roll back", "delete user"])
def test_any_change_of_the_pointer_empties_the_cache(client: redis.Redis, redis_port: int, change: str) -> None:
    fill(client)
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [RANKER], cache_seconds=60.0) as store:
            for user in ("5", "6"):
                assert (await store.look_up(RANKER, user)).version == "2"
            admin = Generations(client, "r", "s")
            {
                "publish": lambda: fill(client, 6),
                "roll back": admin.roll_back,
                "delete user": lambda: admin.delete_user("5"),
            }[change]()
            await until(lambda: not store.cache.entries, 5.0)
            found = [await store.look_up(RANKER, user) for user in ("5", "6")]
            expected = {
                "publish": [("hit", "3"), ("hit", "2")],
                "roll back": [("hit", "1")] * 2,
                "delete user": [("default", None), ("hit", "2")],
            }[change]
            assert [(each.status, each.version) for each in found] == expected

    asyncio.run(main())


def test_a_vector_read_before_a_pointer_change_is_not_cached(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        async with (
            fault_proxy(redis_port) as proxy,
            RedisStore(url(proxy.port), GENEROUS, lambda: [RANKER], cache_seconds=60.0) as store,
        ):
            proxy.may_speak.clear()
            asked = store.look_up(RANKER, "5")
            await until(lambda: store.nodes[""].under_way, GENEROUS)
            await asyncio.sleep(0.05)
            store.poller.apply_pointer(("r", "s"), b"2,1")
            proxy.may_speak.set()
            found = await asked
            check("5", found)
            assert found.version == "1" and not store.cache.entries

    asyncio.run(main())


def test_a_new_generation_and_its_roll_back_each_take_one_write(
    client: redis.Redis, redis_port: int, ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Poller, "SECONDS", 0.02)
    users, first = random_vectors(1, ranker, seed=1)
    second = random_vectors(1, ranker, seed=2)[1]
    push_vectors(client, ranker, users, first)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [ranker]) as store:

            async def serves(version: str) -> bool:
                return (await store.look_up(ranker, users[0])).version == version

            assert await serves("1")
            push_vectors(client, ranker, users, second)
            await until_async(lambda: serves("2"))
            client.set(pointer_key(ranker.name, ranker.manifest.space), "1")
            await until_async(lambda: serves("1"))
            np.testing.assert_array_equal((await store.look_up(ranker, users[0])).vector, first[0])

    asyncio.run(main())


def test_a_pointer_of_another_type_is_an_error_until_replaced(
    client: redis.Redis, redis_port: int, ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Poller, "SECONDS", 0.02)
    users, sent = random_vectors(1, ranker)
    client.hset(pointer_key(ranker.name, ranker.manifest.space), "a", "b")

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [ranker]) as store:
            np.testing.assert_array_equal((await store.look_up(ranker, users[0])).vector, ranker.default_meta)
            client.delete(pointer_key(ranker.name, ranker.manifest.space))
            push_vectors(client, ranker, users, sent)
            await until_async(lambda: has_status(store, ranker, users[0], "hit"))

    asyncio.run(main())


def test_a_store_whose_first_poll_fails_is_polled_again(client: redis.Redis, redis_port: int) -> None:
    fill(client)
    client.delete(pointer_key("r", "s"))
    client.hset(pointer_key("r", "s"), "of another", "type")

    async def main() -> None:
        async with RedisStore(url(redis_port), 0.05, lambda: [RANKER]) as store:
            assert (await store.look_up(RANKER, "1")).status == "error"
            client.delete(pointer_key("r", "s"))
            fill(client)
            await until_closed(store)
            assert (await store.look_up(RANKER, "1")).status == "hit"

    asyncio.run(main())


# Gauges


def test_gauges_show_number_and_age_of_the_newest_generation(client: redis.Redis, redis_port: int) -> None:
    fill(client)
    fill(client)
    client.hset(metadata_key("r", "s"), "2", f'{{"created_at": {time.time() - 500}, "kind": "full", "users": 1}}')

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [RANKER]) as store:
            assert gauge("embedding_generation", ranker="r") == 2 and gauge("redis_circuit_state") == 0
            assert gauge("embedding_generation_age_seconds", ranker="r") == pytest.approx(500, abs=60)
            Generations(client, "r", "s").roll_back()
            await until(lambda: store.poller.spaces["r", "s"].live.generations == ["1"], 5.0)
            await until(lambda: gauge("embedding_generation_age_seconds", ranker="r") < 60, 5.0)
            assert gauge("embedding_generation", ranker="r") == 1
            store.nodes[""].switch(OPEN)
            assert gauge("redis_circuit_state") == 2
            await until_closed(store)
            assert gauge("redis_circuit_state") == 0

    asyncio.run(main())


def test_the_age_gauge_restarts_after_redis_was_emptied(client: redis.Redis, redis_port: int) -> None:
    fill(client)
    client.hset(metadata_key("r", "s"), "1", f'{{"created_at": {time.time() - 500}, "kind": "full", "users": 1}}')

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [RANKER]) as store:
            assert gauge("embedding_generation_age_seconds", ranker="r") == pytest.approx(500, abs=60)
            client.flushdb()
            await until(lambda: store.poller.spaces["r", "s"].live.generations == [], 5.0)
            fill(client)
            await until(lambda: store.poller.spaces["r", "s"].live.generations == ["1"], 5.0)
            await until(lambda: gauge("embedding_generation_age_seconds", ranker="r") < 60, 5.0)

    asyncio.run(main())


# Under load


def test_generation_changes_under_load_mix_nothing(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [RANKER], cache_seconds=60.0) as store:
            await until_closed(store)
            async with loaded(store) as load:
                await asyncio.sleep(0.3)
                changes = []
                for change in (fill, fill, lambda client: Generations(client, "r", "s").roll_back(), fill):
                    before = store.poller.spaces["r", "s"].live.generations[0]
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


def test_an_unpublished_generation_is_never_visible(client: redis.Redis, redis_port: int) -> None:
    fill(client)
    admin = Generations(client, "r", "s")

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [RANKER]) as store:
            await until_closed(store)
            async with loaded(store) as load:
                writing = admin.begin("plan", full=True)
                for chunk, user in enumerate(range(0, USERS, 10)):
                    admin.write_chunk(
                        2, chunk, list(map(str, range(user, user + 10))), vectors_of(2)[user : user + 10], time.time()
                    )
                    await asyncio.sleep(0.05)
                writing.release()  # as if the writer had died
                await asyncio.sleep(1.5)
            assert {version for *_, version in load.answers} == {"1"}
            assert client.get(pointer_key("r", "s")) == b"1"

    asyncio.run(main())
