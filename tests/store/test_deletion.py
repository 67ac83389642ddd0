"""Deletion of a user by a server: vectors, generations being written, caches of other replicas, faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import redis

from slatewise.errors import StoreFault
from slatewise.store import deletion
from slatewise.store.codec import pointer_key, read_pointer, user_key
from slatewise.store.deletion import Deletions
from slatewise.store.generations import Generations
from slatewise.store.lookup import RedisStore
from slatewise.store.poll import Poller
from tests.store.conftest import GENEROUS, url
from tests.store.test_store_faults import black_hole, garbage, gone
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.store_load import RANKER, fill, until, until_closed, vectors_of


def test_a_deletion_reaches_the_other_replica(
    client: redis.Redis, redis_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Poller, "SECONDS", 0.05)
    fill(client)
    fill(client)
    forgotten: list[str | None] = []

    async def main() -> None:
        async with (
            RedisStore(url(redis_port), GENEROUS, lambda: [RANKER], cache_seconds=60.0) as here,
            RedisStore(url(redis_port), GENEROUS, lambda: [RANKER], cache_seconds=60.0) as there,
        ):
            there.deletions.forget = forgotten.append
            for store in (here, there):
                await until_closed(store)
                assert (await store.look_up(RANKER, "5")).status == "hit"
            await here.delete_user("5")
            assert (await here.look_up(RANKER, "5")).status == "default", "at once"
            await until(lambda: forgotten, 5.0)
            await until(lambda: not there.cache.entries, 5.0)
            assert (await there.look_up(RANKER, "5")).status == "default"
            assert (await there.look_up(RANKER, "6")).status == "hit"
            await here.delete_user("never seen")
            await until(lambda: len(forgotten) == 2, 5.0)

    asyncio.run(main())
    assert forgotten == ["5", "never seen"]
    assert not client.exists(user_key("r", "s", "5"))
    assert read_pointer(client.get(pointer_key("r", "s"))) == ([2, 1], 2)
    assert 0 < client.ttl("slatewise:deletions") <= 3_600


def test_a_deletion_during_a_push_is_not_undone_by_it(client: redis.Redis, redis_port: int) -> None:
    fill(client)
    generations = Generations(client, "r", "s")

    async def delete() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [RANKER]) as store:
            await until_closed(store)
            await store.delete_user("5")

    with generations.begin("plan", full=True) as writing:
        generations.write_chunk(writing.generation, 0, ["5", "6"], vectors_of(2)[5:7], 5.0)
        asyncio.run(delete())
        generations.write_chunk(writing.generation, 1, ["7"], vectors_of(2)[7:8], 5.0)
        generations.publish(writing, 2)
    assert not client.exists(user_key("r", "s", "5"))
    assert client.hkeys(user_key("r", "s", "6")) == [b"1", b"2"]
    assert generations.status()["deleted_users"] == 1


def test_nothing_stored_needs_no_pointer(client: redis.Redis, redis_port: int) -> None:
    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [RANKER]) as store:
            await until_closed(store)
            await store.delete_user("5")

    asyncio.run(main())
    assert client.keys() == [b"slatewise:deletions"]


@pytest.mark.parametrize("fault", [black_hole, garbage, gone], ids=lambda fault: fault.__name__)
def test_a_fault_is_told_in_time(
    client: redis.Redis, redis_port: int, fault: Callable[[FaultProxy], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletion, "DELETE_SECONDS", 0.2)
    fill(client)

    async def main() -> None:
        async with fault_proxy(redis_port) as proxy, RedisStore(url(proxy.port), 0.05, lambda: [RANKER]) as store:
            await until_closed(store)
            fault(proxy)
            async with asyncio.timeout(GENEROUS):
                with pytest.raises(StoreFault):
                    await store.delete_user("5")
            proxy.heal()
            await until_closed(store)
            await store.delete_user("5")

    asyncio.run(main())
    assert not client.exists(user_key("r", "s", "5"))


# What a replica that reads the stream sees


def follow(client: redis.Redis, redis_port: int, work: Callable[[Deletions], None]) -> list[str | None]:
    """Deletions that are read first, then after `work`."""
    forgotten: list[str | None] = []

    async def main() -> None:
        connection = redis.asyncio.Redis(port=redis_port, protocol=2)
        deletions = Deletions(connection, forgotten.append)
        await deletions.read()
        work(deletions)
        await deletions.read()
        await deletions.read()
        await connection.aclose()

    asyncio.run(main())
    return forgotten


def add(client: redis.Redis, *users: str) -> None:
    pipe = client.pipeline()
    for user in users:
        pipe.xadd("slatewise:deletions", {"user": user})
    pipe.execute()


def test_entries_before_the_start_are_old(client: redis.Redis, redis_port: int) -> None:
    add(client, "old")
    assert follow(client, redis_port, lambda _: add(client, "a", "b")) == ["a", "b"]


def test_too_many_entries_forget_everybody(client: redis.Redis, redis_port: int) -> None:
    assert follow(client, redis_port, lambda _: add(client, *map(str, range(1_500)))) == [None]


def test_a_long_silence_forgets_everybody(client: redis.Redis, redis_port: int) -> None:
    def silence(deletions: Deletions) -> None:
        deletions.read_at -= 1_000

    assert follow(client, redis_port, silence) == [None]


def test_a_stream_of_another_type_is_no_fault_of_the_vectors(client: redis.Redis, redis_port: int) -> None:
    client.set("slatewise:deletions", "text")
    assert follow(client, redis_port, lambda _: None) == []
