"""One server's node: reads share round trips, an open circuit answers at once, nothing is left behind."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
import redis
from redis.exceptions import RedisError

from slatewise.bundle.ranker import Ranker
from slatewise.store.client import connect_async, is_wrong_type
from slatewise.store.codec import user_key
from slatewise.store.lookup import MetaEmbedding, RedisStore
from slatewise.store.node import CLOSED, OPEN, Read, RedisNode
from slatewise.store.spaces import Live, Space
from tests.store.conftest import GENEROUS, gauge, push_vectors, random_vectors, url
from tests.support.fault_proxy import fault_proxy
from tests.support.store_load import RANKER, check, circuit, fill, until, until_closed


async def settled(node: RedisNode, live: Live, *users: str) -> list[Read]:
    """The settled reads of these users; one request waits for each."""
    reads = [node.read(user_key("r", "s", user), Space(("r", "s"), live)) for user in users]
    for read in reads:
        read.waiters = 1
    await asyncio.wait_for(asyncio.gather(*reads), GENEROUS)
    return reads


def test_a_read_returns_the_values_of_the_live_generations(client: redis.Redis, redis_port: int) -> None:
    fill(client)
    fill(client)
    client.set(user_key("r", "s", "text"), "a string")

    async def main() -> None:
        connection = connect_async(url(redis_port), 1.0, 4)
        node = RedisNode("", connection, GENEROUS, CLOSED)
        live = Live(b"2,1", ["2", "1"])
        known, unknown, text = await settled(node, live, "5", "absent", "text")
        assert known.result() == client.hmget(user_key("r", "s", "5"), ["2", "1"])
        assert unknown.result() == [None, None]
        assert is_wrong_type(text.result())
        assert known.live is unknown.live is live
        (empty,) = await settled(node, Live(None, []), "5")
        assert empty.result() == [None]
        await node.close()
        await connection.aclose()

    asyncio.run(main())


def test_a_read_without_waiters_is_cancelled_and_not_sent(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        connection = connect_async(url(redis_port), 1.0, 4)
        node = RedisNode("", connection, GENEROUS, CLOSED)
        trips = round_trips()
        abandoned = node.read(user_key("r", "s", "5"), Space(("r", "s"), Live(b"1", ["1"])))
        await asyncio.wait([abandoned], timeout=GENEROUS)
        assert abandoned.cancelled()
        assert round_trips() == trips
        await node.close()
        await connection.aclose()

    asyncio.run(main())


def test_reads_are_settled_with_an_error_when_the_circuit_opens(redis_port: int) -> None:
    async def main() -> None:
        connection = connect_async(url(redis_port), 1.0, 4)
        node = RedisNode("", connection, GENEROUS, CLOSED)
        queued = node.read(user_key("r", "s", "5"), Space(("r", "s"), Live(b"1", ["1"])))
        node.switch(OPEN)
        assert isinstance(queued.result(), RedisError)
        assert queued.live is None
        await node.close()
        await connection.aclose()

    asyncio.run(main())


# Round trips


def test_concurrent_look_ups_share_a_round_trip(
    client: redis.Redis, redis_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisNode, "BATCH", 64)
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [RANKER]) as store:
            commands = hmget_calls(client)
            trips = round_trips()
            found = await asyncio.gather(*(store.look_up(RANKER, str(k // 3)) for k in range(192)))
            for k, each in enumerate(found):
                assert each.status == "hit"
                check(str(k // 3), each)
            assert hmget_calls(client) - commands == 64
            assert round_trips() - trips == 1

    asyncio.run(main())


def hmget_calls(client: redis.Redis) -> int:
    return int(client.info("commandstats").get("cmdstat_hmget", {"calls": 0})["calls"])


def round_trips() -> float:
    return gauge("redis_command_duration_seconds_count", command="hmget") or 0.0


def test_look_ups_during_a_round_trip_share_the_next_one(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        async with fault_proxy(redis_port) as proxy, RedisStore(url(proxy.port), GENEROUS, lambda: [RANKER]) as store:
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


def test_a_round_trip_takes_at_most_a_batch(
    client: redis.Redis, redis_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisNode, "BATCH", 10)
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [RANKER]) as store:
            trips = round_trips()
            for user, found in enumerate(
                await asyncio.gather(*(store.look_up(RANKER, str(user)) for user in range(95)))
            ):
                check(str(user), found)
                assert found.status == "hit"
            assert round_trips() - trips == 10

    asyncio.run(main())


def test_more_look_ups_than_connections_are_all_served(client: redis.Redis, redis_port: int, ranker: Ranker) -> None:
    users, sent = random_vectors(256, ranker)  # as many as may be in flight
    push_vectors(client, ranker, users, sent)

    async def main() -> list[MetaEmbedding]:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [ranker]) as store:
            return await asyncio.gather(*(store.look_up(ranker, user) for user in users))

    found = asyncio.run(main())
    assert [f.status for f in found].count("hit") == len(users)
    np.testing.assert_array_equal([f.vector for f in found], sent)


def test_replies_after_blocked_event_loop_beat_the_timeout(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), 0.05, lambda: [RANKER]) as store:
            await until_closed(store)
            hits = 0
            for user in map(str, range(20)):
                asked = store.look_up(RANKER, user)
                while not store.nodes[""].under_way:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                await asyncio.sleep(0.002)  # for the command to be sent
                time.sleep(0.1)  # noqa: ASYNC251 - the test blocks the loop
                hits += (await asked).status == "hit"
                await until(lambda: not store.nodes[""].under_way, GENEROUS)
            assert hits >= 18, "on a busy machine, Redis itself may be late once"
            assert circuit(store) == CLOSED

    asyncio.run(main())


def test_cancelling_one_of_two_look_ups_keeps_the_other(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [RANKER]) as store:
            one = asyncio.ensure_future(store.look_up(RANKER, "5"))
            other = store.look_up(RANKER, "5")
            one.cancel()
            assert (await other).status == "hit"

    asyncio.run(main())


def test_connections_closed_by_the_server_lose_no_look_up(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        async with fault_proxy(redis_port) as proxy, RedisStore(url(proxy.port), 20.0, lambda: [RANKER]) as store:
            for round_ in range(10):
                assert (await store.look_up(RANKER, str(round_))).status == "hit"
                proxy.reset_all()
                if round_ % 2:
                    await asyncio.sleep(0.01)

    asyncio.run(main())


# The circuit


def test_an_open_circuit_answers_at_once(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        async with fault_proxy(redis_port) as proxy, RedisStore(url(proxy.port), 20.0, lambda: [RANKER]) as store:
            proxy.may_speak.clear()
            store.nodes[""].switch(OPEN)
            begin = time.perf_counter()
            for user in map(str, range(100)):
                check(user, await store.look_up(RANKER, user))
            assert time.perf_counter() - begin < 5.0
            proxy.heal()

    asyncio.run(main())


def test_a_queued_look_up_is_answered_when_the_circuit_opens(client: redis.Redis, redis_port: int) -> None:
    fill(client)

    async def main() -> None:
        async with fault_proxy(redis_port) as proxy, RedisStore(url(proxy.port), 20.0, lambda: [RANKER]) as store:
            store.nodes[""].dispatcher.cancel()
            waiting = store.look_up(RANKER, "1")
            store.nodes[""].switch(OPEN)
            assert (await waiting).status == "error" and not store.nodes[""].queue and not store.pending
            proxy.heal()

    asyncio.run(main())
