"""Histories in this process, and those in Redis: order, trimming, idempotency, deletion, time to live."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
import redis

from slatewise.events import histories as module
from slatewise.events.histories import ENTRY_OVERHEAD, EmbeddedHistories, Histories, entry_bytes
from slatewise.events.redis_histories import RedisHistories, history_key
from slatewise.store.lookup import RedisStore
from tests.events.support import NOW, event, items, pairs, stored
from tests.support.store_load import RANKER, until_closed

GENEROUS = 20.0  # seconds; a time budget that a busy machine does not exceed by chance
Check = Callable[[Histories], Awaitable[None]]


def on_redis(port: int, check: Check, most: int = 1_000, ttl_seconds: float = 0.0) -> None:
    async def main() -> None:
        async with RedisStore(f"redis://127.0.0.1:{port}/0", GENEROUS, lambda: [RANKER]) as store:
            await until_closed(store)
            await check(RedisHistories(store, most, ttl_seconds))

    asyncio.run(main())


@pytest.fixture(params=["embedded", "redis"])
def run(request: pytest.FixtureRequest, client: redis.Redis, redis_port: int) -> Callable[..., None]:
    """Run a check on empty histories of one kind."""

    def embedded(check: Check, most: int = 1_000, ttl_seconds: float = 0.0) -> None:
        async def main() -> None:
            await check(EmbeddedHistories(most, ttl_seconds, 10**7))

        asyncio.run(main())

    def in_redis(check: Check, most: int = 1_000, ttl_seconds: float = 0.0) -> None:
        on_redis(redis_port, check, most, ttl_seconds)

    return embedded if request.param == "embedded" else in_redis


def test_events_are_merged_by_time_and_trimmed(run: Callable[..., None]) -> None:
    async def check(histories: Histories) -> None:
        assert await items(histories) == []
        assert await histories.write(pairs([event("b", NOW + 2), event("a", NOW + 1)])) == "NN"
        assert await histories.write(pairs([event("d", NOW + 4), event("c", NOW + 3), event("e", NOW + 5)])) == "NNN"
        assert await items(histories) == list("bcde")
        assert await items(histories, most=2) == list("de")
        history = await stored(histories, most=2)
        assert (history.offset, history.timestamps) == (3, [NOW + 4, NOW + 5])

    run(check, most=4)


def test_repeated_events_count_once(run: Callable[..., None]) -> None:
    async def check(histories: Histories) -> None:
        batch = pairs([event("a", 1.0), event("b", 2.0), event("a", 1.0), event("a", 1.0, user="v")])
        assert await histories.write(batch) == "NNKN"
        assert await histories.write(batch) == "KKKK"
        assert await items(histories) == ["a", "b"]
        assert await items(histories, "v") == ["a"]

    run(check)


def test_many_users_of_one_batch_are_kept_apart(run: Callable[..., None]) -> None:
    async def check(histories: Histories) -> None:
        users = ["u", "}", "{x}", "a b", "\u00e9", "/", "u" * 256]
        batch = [event(f"{k}-{n}", NOW + k, user) for k in range(3) for n, user in enumerate(users)]
        assert await histories.write(pairs(batch)) == "N" * len(batch)
        for n, user in enumerate(users):
            assert await items(histories, user) == [f"{k}-{n}" for k in range(3)]

    run(check)


def test_more_users_than_a_round_trip_has_are_all_stored(run: Callable[..., None], client: redis.Redis) -> None:
    async def check(histories: Histories) -> None:
        for turn in range(2):  # the first time, Redis does not know the script
            client.script_flush()
            batch = pairs([event(f"i{turn}", NOW + turn, f"u{k}") for k in range(350)])
            assert await histories.write(batch) == "N" * 350
        for k in (0, 99, 100, 349):
            assert await items(histories, f"u{k}") == ["i0", "i1"]

    run(check)


def test_no_events_are_no_write(run: Callable[..., None]) -> None:
    async def check(histories: Histories) -> None:
        assert await histories.write([]) == ""

    run(check)


def test_a_deleted_user_is_not_resurrected_by_events_in_flight(run: Callable[..., None]) -> None:
    async def check(histories: Histories) -> None:
        in_flight = pairs([event("late", 2.0)])
        await histories.write(pairs([event("a", 1.0), event("b", 1.0, user="other")]))
        await histories.delete("u")
        await histories.delete("nobody")
        assert await items(histories) == []
        assert await histories.write(in_flight) == "G"
        assert await items(histories) == []
        await asyncio.sleep(0.01)
        assert await histories.write(pairs([event("new", 3.0), event("a", 1.0)])) == "NN"
        assert await histories.write(in_flight) == "G", "after a newer event too"
        assert await items(histories) == ["a", "new"]
        assert await items(histories, "other") == ["b"]

    run(check)


def test_histories_expire(run: Callable[..., None]) -> None:
    async def check(histories: Histories) -> None:
        await histories.write(pairs([event("a")]))
        assert await items(histories) == ["a"]
        async with asyncio.timeout(10):
            while await items(histories):  # noqa: ASYNC110 - the time passes in Redis
                await asyncio.sleep(0.1)

    run(check, ttl_seconds=1.0)


def test_the_shortest_time_to_live_is_a_second_in_redis(client: redis.Redis, redis_port: int) -> None:
    async def check(histories: Histories) -> None:
        await histories.write(pairs([event("a")]))
        assert 0 < client.pttl("slatewise:history:{u}") <= 1_000

    on_redis(redis_port, check, ttl_seconds=0.1)


def test_trace_of_a_deletion_ends(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (module, __import__("slatewise.events.redis_histories", fromlist=["x"])):
        monkeypatch.setattr(each, "DELETED_SECONDS", 1)

    async def check(histories: Histories) -> None:
        old = pairs([event("a")], received=time.time() - 100)
        await histories.delete("u")
        assert await histories.write(old) == "G"
        async with asyncio.timeout(10):
            while await histories.write(old) == "G":  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    run(check)


def test_embedded_histories_are_bounded_and_the_idle_go_first() -> None:
    async def main() -> None:
        limit = 20 * (ENTRY_OVERHEAD + 60)
        histories = EmbeddedHistories(100, 0.0, limit)
        for k in range(1_000):
            await histories.write(pairs([event("a", user=f"u{k}")]))
            assert histories.nbytes <= limit
            assert await items(histories, "u0") == ["a"], "read, so it is not idle"
        assert 10 <= len(histories.values) <= 20
        assert await items(histories, "u1") == [] and await items(histories, "u999") == ["a"]
        assert histories.nbytes == sum(entry_bytes(user, value) for user, (_, value) in histories.values.items())

    asyncio.run(main())


def test_history_above_the_limit_of_all_is_dropped_and_said() -> None:
    async def main() -> None:
        histories = EmbeddedHistories(100, 0.0, ENTRY_OVERHEAD + 120)
        assert await histories.write(pairs([event("a")])) == "N"
        assert await histories.write(pairs([event("b" * 200), event("c" * 200)])) == "OO"
        assert await items(histories, "u") == ["a"]

    asyncio.run(main())


def test_two_instances_on_one_redis_see_an_event_at_once(client: redis.Redis, redis_port: int) -> None:
    async def main() -> None:
        address = f"redis://127.0.0.1:{redis_port}/0"
        async with (
            RedisStore(address, GENEROUS, lambda: [RANKER]) as first,
            RedisStore(address, GENEROUS, lambda: [RANKER]) as second,
        ):
            await until_closed(first)
            await until_closed(second)
            one, other = RedisHistories(first, 100, 0.0), RedisHistories(second, 100, 0.0)
            seconds = []
            for k in range(50):
                await one.write(pairs([event(str(k), NOW + k)]))
                begin = time.perf_counter()
                assert (await items(other))[-1] == str(k)
                seconds.append(time.perf_counter() - begin)
            assert sorted(seconds)[25] < 0.1
            batch = pairs([event(f"x{k}", NOW + 100 + k) for k in range(20)])
            letters = await asyncio.gather(*(each.write(batch) for each in (one, other) for _ in range(3)))
            assert sum(answer.count("N") for answer in letters) == 20, "each event is new once"
            assert len(await items(one)) == 70

    asyncio.run(main())


def test_a_read_shares_the_round_trip_of_the_vector(client: redis.Redis, redis_port: int) -> None:
    from tests.support.store_load import fill

    fill(client)

    async def main() -> None:
        async with RedisStore(f"redis://127.0.0.1:{redis_port}/0", GENEROUS, lambda: [RANKER]) as store:
            await until_closed(store)
            histories = RedisHistories(store, 100, 0.0)
            await histories.write(pairs([event("a", user="5")]))
            node = store.nodes[""]
            trips = 0
            fetch = node.fetch

            async def counted(batch: list) -> list:
                nonlocal trips
                trips += 1
                return await fetch(batch)

            node.fetch = counted  # type: ignore[method-assign]
            vector = store.look_up(RANKER, "5")
            reading = histories.read("5", 10)
            assert (await reading).history is not None and (await vector).status == "hit"
            assert trips == 1

    asyncio.run(main())


def test_the_key_of_a_history_is_in_the_slot_of_the_vectors() -> None:
    from redis.cluster import key_slot

    from slatewise.store.codec import user_key

    for user in ("1", "a b", "\u00e9", "{x}", "a}b"):
        assert key_slot(history_key(user).encode()) == key_slot(user_key("r", "s", user).encode())
