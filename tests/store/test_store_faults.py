"""Faults of the network and of Redis: each look-up is answered in time, with the user's vector or the default.

A circuit opens within a second of a fault, and closes within five seconds of its end.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import pytest
import redis

from slatewise.store.codec import user_key
from slatewise.store.lookup import RedisStore
from slatewise.store.node import CLOSED, HALF_OPEN, OPEN, RedisNode
from tests.store.conftest import url
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.store_load import RANKER, USERS, check, circuit, fill, loaded, until, until_closed

BUDGET = 0.05  # seconds
SLACK = 1.0  # seconds that a busy machine may add to a look-up


def slow(proxy: FaultProxy) -> None:
    proxy.delay = 0.1


def black_hole(proxy: FaultProxy) -> None:
    proxy.may_speak.clear()


def reset_mid_reply(proxy: FaultProxy) -> None:
    proxy.cut = True


def garbage(proxy: FaultProxy) -> None:
    proxy.answer = b"\x00\xff garbage\r\n"


def shifted(proxy: FaultProxy) -> None:
    proxy.answer = b"*1\r\n$-1\r\n" * 3


def loading(proxy: FaultProxy) -> None:
    proxy.answer = b"-LOADING Redis is loading the dataset in memory\r\n"


def gone(proxy: FaultProxy) -> None:
    proxy.down = True
    proxy.reset_all()


@pytest.mark.parametrize("fault", [slow, black_hole, reset_mid_reply, garbage, shifted, loading, gone])
def test_a_fault_opens_the_circuit_and_its_end_closes_it(
    client: redis.Redis, redis_port: int, fault: Callable[[FaultProxy], None]
) -> None:
    fill(client)

    async def main() -> None:
        async with fault_proxy(redis_port) as proxy:
            async with RedisStore(url(proxy.port), BUDGET, lambda: [RANKER]) as store:
                await until_closed(store)
                async with loaded(store) as load:
                    await asyncio.sleep(0.3)
                    began = time.perf_counter()
                    fault(proxy)
                    await until(lambda: circuit(store) == OPEN, 1.0)
                    await asyncio.sleep(0.8)  # probes do not close it
                    assert circuit(store) in (OPEN, HALF_OPEN)
                    assert proxy.open <= 4 * RedisNode.ROUND_TRIPS
                    during = load.since(began + 0.1)
                    healed = time.perf_counter()
                    proxy.heal()
                    await until_closed(store)
                    await asyncio.sleep(0.3)
                assert load.since(0.0)["hit"] > 10, "before"
                assert during["error"] > 100 and during["default"] == 0
                assert load.since(healed)["hit"] > 10, "after"
                assert load.longest < BUDGET + SLACK
                assert proxy.open <= 4 * RedisNode.ROUND_TRIPS
            await until(lambda: proxy.open == 0, 5.0)
        await until(lambda: client.info("clients")["connected_clients"] == 1, 5.0)

    asyncio.run(main())


@pytest.mark.parametrize("delay", [0.005, 0.02])
def test_a_delay_within_the_budget_loses_no_vector(client: redis.Redis, redis_port: int, delay: float) -> None:
    fill(client)

    async def main() -> None:
        async with fault_proxy(redis_port, delay) as proxy, RedisStore(url(proxy.port), 1.0, lambda: [RANKER]) as store:
            await until_closed(store)
            async with loaded(store) as load:
                await asyncio.sleep(1.0)
            assert set(load.since(0.0)) == {"hit"}
            assert load.longest < 1.0 + SLACK

    asyncio.run(main())


def test_replies_in_small_pieces_are_assembled(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        async with fault_proxy(redis_port) as proxy, RedisStore(url(proxy.port), 5.0, lambda: [RANKER]) as store:
            await until_closed(store)
            proxy.piece = 7
            async with loaded(store) as load:
                await asyncio.sleep(0.7)
            assert set(load.since(0.0)) == {"hit"}

    asyncio.run(main())


def test_a_changed_password_is_a_fault_until_it_is_restored(
    start_redis: Callable[[int | None], AbstractContextManager[int]],
) -> None:
    async def main() -> None:
        with start_redis(None) as port, redis.Redis(port=port) as client:
            fill(client)
            async with RedisStore(url(port), BUDGET, lambda: [RANKER]) as store:
                await until_closed(store)
                client.config_set("requirepass", "secret")
                client.client_kill_filter(_type="normal", skipme=True)
                async with loaded(store) as load:
                    await until(lambda: circuit(store) == OPEN, 2.5)
                    assert load.since(0.0)["hit"] == 0
                    client.config_set("requirepass", "")
                    await until_closed(store)

    asyncio.run(main())


# Redis itself


def test_a_redis_that_restarts_empty_gives_defaults_then_hits(
    start_redis: Callable[[int | None], AbstractContextManager[int]],
) -> None:
    async def main() -> None:
        with ExitStack() as first:
            port = first.enter_context(start_redis(None))
            with redis.Redis(port=port) as client:
                fill(client)
            async with RedisStore(url(port), BUDGET, lambda: [RANKER], cache_seconds=60.0) as store:
                await until_closed(store)
                async with loaded(store) as load:
                    await asyncio.sleep(0.5)
                    first.close()
                    store.cache.clear()
                    await until(lambda: circuit(store) == OPEN, 2.5)  # by the poll, if the cache answered every look-up
                    with start_redis(port):
                        await until_closed(store)
                        await until(lambda: not store.poller.spaces["r", "s"].live.generations, 5.0)
                        empty = time.perf_counter()
                        await asyncio.sleep(0.3)
                        assert load.since(empty)["default"] > 10 and load.since(empty)["hit"] == 0
                        with redis.Redis(port=port) as client:
                            fill(client)
                        await until(lambda: store.poller.spaces["r", "s"].live.generations == ["1"], 3.0)
                        filled = time.perf_counter()
                        await asyncio.sleep(0.3)
                        assert load.since(filled)["hit"] > 10
                assert load.longest < BUDGET + SLACK

    asyncio.run(main())


def test_a_flushed_store_gives_defaults_within_two_seconds(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), BUDGET, lambda: [RANKER], cache_seconds=60.0) as store:
            await until_closed(store)
            async with loaded(store) as load:
                await asyncio.sleep(0.5)
                client.flushall()
                flushed = time.perf_counter()
                await asyncio.sleep(2.5)
            assert "hit" not in load.since(flushed + 2.0) and load.since(flushed + 2.0)["default"] > 10

    asyncio.run(main())


def test_full_memory_and_a_read_only_server_lose_no_look_up(
    start_redis: Callable[[int | None], AbstractContextManager[int]],
) -> None:
    async def main() -> None:
        with start_redis(None) as port, redis.Redis(port=port) as client:
            fill(client)
            async with RedisStore(url(port), 1.0, lambda: [RANKER]) as store:
                await until_closed(store)
                async with loaded(store) as load:
                    client.config_set("maxmemory", "1")
                    await asyncio.sleep(0.3)
                    client.config_set("maxmemory", "0")
                    client.replicaof(
                        "127.0.0.1", port + 1 if port < 65_535 else port - 1
                    )  # no server listens there: the data stay
                    await asyncio.sleep(0.3)
                assert set(load.since(0.0)) == {"hit"}

    asyncio.run(main())


def test_user_keys_of_another_type_open_no_circuit(client: redis.Redis, redis_port: int) -> None:
    fill(client)
    for user in range(USERS):
        client.set(user_key("r", "s", str(user)), "a string")

    async def main() -> None:
        async with RedisStore(url(redis_port), 1.0, lambda: [RANKER]) as store:
            await until_closed(store)
            async with loaded(store) as load:
                await asyncio.sleep(0.5)
            assert set(load.since(0.0)) == {"default"} and circuit(store) == CLOSED

    asyncio.run(main())


def test_a_very_large_value_affects_only_its_user(client: redis.Redis, redis_port: int) -> None:
    fill(client)
    client.hset(user_key("r", "s", "0"), "1", bytes(20_000_000))

    async def main() -> None:
        async with RedisStore(url(redis_port), BUDGET, lambda: [RANKER]) as store:
            await until_closed(store)
            async with asyncio.timeout(30):
                check("0", await store.look_up(RANKER, "0"))
                while (await store.look_up(RANKER, "1")).status != "hit":  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

    asyncio.run(main())


# Cancellation: a reply left on a connection would be read by the next look-up


@pytest.mark.parametrize(("budget", "delay"), [(20.0, 0.02), (0.02, 0.02)])
def test_many_cancellations_never_yield_another_users_vector(
    client: redis.Redis, redis_port: int, budget: float, delay: float
) -> None:
    fill(client)
    chance = random.Random(1)

    async def ask(store: RedisStore) -> str:
        user = str(chance.randrange(USERS))
        async with asyncio.timeout(chance.choice((0.0, 0.001, 0.005, 0.02, 0.05))):
            found = await store.look_up(RANKER, user)
        check(user, found)
        return found.status

    async def main() -> None:
        async with fault_proxy(redis_port, lambda: chance.choice((0.0, delay / 4, delay))) as proxy:
            async with RedisStore(url(proxy.port), budget, lambda: [RANKER]) as store:
                statuses: list[str] = []
                for _ in range(60):
                    outcomes = await asyncio.gather(*(ask(store) for _ in range(30)), return_exceptions=True)
                    statuses += [outcome for outcome in outcomes if isinstance(outcome, str)]
                    assert all(isinstance(outcome, str | TimeoutError) for outcome in outcomes), outcomes
                    store.nodes[""].switch(CLOSED)
                assert len(statuses) < 60 * 30, "some look-ups were cancelled"
                assert "hit" in statuses
                proxy.delay = 0.0
                await until(lambda: not store.pending and not store.nodes[""].under_way, 10.0)
                await until_closed(store)
                await until(lambda: circuit(store) == CLOSED, 5.0)
                assert proxy.open <= 4 * RedisNode.ROUND_TRIPS
            await until(lambda: proxy.open == 0, 5.0)

    asyncio.run(main())
