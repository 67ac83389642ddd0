"""Faults of the network and of Redis: a read is answered in time without a history, and a write says that it failed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import redis

from slatewise.errors import StoreFault
from slatewise.events import redis_histories
from slatewise.events.histories import Stored
from slatewise.events.redis_histories import RedisHistories, history_key
from slatewise.store.lookup import RedisStore
from slatewise.store.node import CLOSED, OPEN
from tests.events.support import NOW, event, items, pairs
from tests.store.test_store_faults import black_hole, garbage, gone, loading, reset_mid_reply, shifted, slow
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.store_load import RANKER, circuit, fill, until, until_closed

BUDGET = 0.05  # seconds
SLACK = 1.0
FAULT = Stored(None, fault=True)


def endless_bulk(proxy: FaultProxy) -> None:
    proxy.answer = b"$99999999999\r\nxxxxxxxx"


@pytest.mark.parametrize(
    "fault",
    [slow, black_hole, reset_mid_reply, garbage, shifted, loading, gone, endless_bulk],
    ids=lambda f: f.__name__,
)
def test_a_fault_costs_the_history_alone_and_ends(
    client: redis.Redis, redis_port: int, fault: Callable[[FaultProxy], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_histories, "WRITE_SECONDS", 0.1)
    fill(client)

    async def main() -> None:
        async with fault_proxy(redis_port) as proxy:
            async with RedisStore(f"redis://127.0.0.1:{proxy.port}/0", BUDGET, lambda: [RANKER]) as store:
                await until_closed(store)
                histories = RedisHistories(store, 100, 0.0)
                assert await histories.write(pairs([event("a", NOW)])) == "N"
                fault(proxy)
                letters = ""
                begin = time.perf_counter()
                for k in range(10):
                    before = time.perf_counter()
                    assert await histories.read("u", 10) == FAULT
                    assert time.perf_counter() - before < BUDGET + SLACK
                    letters += await histories.write(pairs([event(f"b{k}", NOW + 1)]))
                assert letters == "F" * 10
                assert time.perf_counter() - begin < 10 * (0.1 + BUDGET + SLACK)
                await until(lambda: circuit(store) == OPEN, 3.0)
                before = time.perf_counter()
                assert await histories.read("u", 10) == FAULT
                assert await histories.write(pairs([event("c", NOW + 2)])) == "F"
                with pytest.raises(StoreFault):
                    await histories.delete("u")
                proxy.heal()
                await until_closed(store)
                async with asyncio.timeout(10):
                    while (await histories.read("u", 10)).fault:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                assert "a" in await items(histories)
                assert await histories.write(pairs([event("d", NOW + 3)])) == "N"
            await until(lambda: proxy.open == 0, 5.0)

    asyncio.run(main())


def on_redis(port: int, check: Callable[[RedisStore, RedisHistories], object]) -> None:
    async def main() -> None:
        async with RedisStore(f"redis://127.0.0.1:{port}/0", 5.0, lambda: [RANKER]) as store:
            await until_closed(store)
            await check(store, RedisHistories(store, 100, 0.0))  # type: ignore[misc]
            assert circuit(store) == CLOSED, "the server answers: its vectors are still read"

    asyncio.run(main())


@pytest.mark.parametrize("value", [b"", b"text", b"h1\xff3\xff9\xff1.0\xff"])
def test_unreadable_bytes_are_no_history_until_the_next_event(
    client: redis.Redis, redis_port: int, value: bytes
) -> None:
    client.set(history_key("u"), value)

    async def check(_: RedisStore, histories: RedisHistories) -> None:
        assert await histories.read("u", 10) == FAULT
        if not value.startswith(b"h1"):
            assert await histories.write(pairs([event("a")])) == "N"
            assert await items(histories) == ["a"]

    on_redis(redis_port, check)


def test_a_key_of_another_type_is_no_history_until_the_next_event(client: redis.Redis, redis_port: int) -> None:
    client.hset(history_key("u"), "1", "x")

    async def check(_: RedisStore, histories: RedisHistories) -> None:
        for _ in range(10):
            assert await histories.read("u", 10) == FAULT
        assert await histories.write(pairs([event("a"), event("b", user="v")])) == "NN"
        assert await items(histories) == ["a"]

    on_redis(redis_port, check)


def test_full_memory_refuses_events_and_reads_go_on(
    start_redis: Callable[[int | None], AbstractContextManager[int]],
) -> None:
    with start_redis(None) as port, redis.Redis(port=port) as client:

        async def check(_: RedisStore, histories: RedisHistories) -> None:
            assert await histories.write(pairs([event("a", NOW)])) == "N"
            client.config_set("maxmemory", "1")
            assert await histories.write(pairs([event("b", NOW + 1), event("c", user="v")])) == "FF"
            assert await histories.write(pairs([event("a", NOW)])) in ("K", "F"), "nothing to write"
            assert await items(histories) == ["a"]
            client.config_set("maxmemory", "0")
            assert await histories.write(pairs([event("b", NOW + 1)])) == "N"

        on_redis(port, check)


def test_a_read_only_server_refuses_events_and_deletions(
    start_redis: Callable[[int | None], AbstractContextManager[int]],
) -> None:
    with start_redis(None) as port, redis.Redis(port=port) as client:

        async def check(store: RedisStore, histories: RedisHistories) -> None:
            assert await histories.write(pairs([event("a", NOW)])) == "N"
            client.replicaof("127.0.0.1", port + 1 if port < 65_535 else port - 1)  # no server listens there
            assert await histories.write(pairs([event("b", NOW + 1)])) == "F"
            with pytest.raises(StoreFault):
                await histories.delete("u")
            with pytest.raises(StoreFault):
                await store.delete_user("u")
            assert await items(histories) == ["a"]
            client.execute_command("REPLICAOF", "NO", "ONE")
            assert await histories.write(pairs([event("b", NOW + 1)])) == "N"

        on_redis(port, check)


def test_a_cancelled_read_never_reaches_another_user(client: redis.Redis, redis_port: int) -> None:
    async def main() -> None:
        async with (
            fault_proxy(redis_port, 0.004) as proxy,
            RedisStore(f"redis://127.0.0.1:{proxy.port}/0", 5.0, lambda: [RANKER]) as store,
        ):
            await until_closed(store)
            histories = RedisHistories(store, 100, 0.0)
            await histories.write(pairs([event(f"item-{k}", user=str(k)) for k in range(50)]))

            async def ask(k: int, patience: float) -> bool:
                async with asyncio.timeout(patience):
                    assert await items(histories, str(k)) == [f"item-{k}"]
                return True

            outcomes = await asyncio.gather(
                *(ask(k % 50, 0.002 if k % 3 else 5.0) for k in range(300)), return_exceptions=True
            )
            assert {type(each) for each in outcomes} == {bool, TimeoutError}

    asyncio.run(main())


def test_a_write_that_succeeds_ends_a_row_of_failures(client: redis.Redis, redis_port: int) -> None:
    async def main() -> None:
        async with RedisStore(f"redis://127.0.0.1:{redis_port}/0", BUDGET, lambda: [RANKER]) as store:
            await until_closed(store)
            histories = RedisHistories(store, 100, 0.0)
            node = store.nodes.of_key(history_key("u"))
            node.failures = node.FAILURES - 1
            assert await histories.write(pairs([event("a", NOW)])) == "N"
            assert node.failures == 0

    asyncio.run(main())
