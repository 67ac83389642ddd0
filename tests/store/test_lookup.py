"""Look-ups in the bundle's store and in a real Redis: results, unreadable values, faults, cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any

import numpy as np
import pytest
import redis

from slatewise.bundle.ranker import Ranker
from slatewise.store.codec import FLOAT32, HEADER, MAGIC, pack, pointer_key, user_key
from slatewise.store.generations import Generations
from slatewise.store.lookup import EmbeddedStore, MetaEmbedding, RedisStore
from slatewise.store.node import CLOSED, OPEN
from slatewise.store.pointer import KEPT
from slatewise.store.poll import Poller
from slatewise.store.push import push
from slatewise.store.spaces import Live, Space
from tests.store.conftest import (
    GENEROUS,
    PATIENCE,
    has_status,
    lookup_counts,
    push_vectors,
    random_vectors,
    until_async,
    url,
)
from tests.support.fault_proxy import fault_proxy
from tests.support.store_load import DIM, RANKER, check, circuit, fill, vectors_of

# The embedded store


def test_the_embedded_store_serves_the_bundles_vectors(ranker: Ranker) -> None:
    async def main() -> None:
        before = lookup_counts()
        for user, row in ranker.embedded_users.items():
            found = await EmbeddedStore().look_up(ranker, user)
            np.testing.assert_array_equal(found.vector, ranker.embedded_meta[row])
            assert (found.status, found.version) == ("hit", str(ranker.manifest.version))
            assert found.age_seconds is not None
            assert 0 <= found.age_seconds < 3_600
        assert lookup_counts() - before == {"hit_local": len(ranker.embedded_users)}

    assert ranker.embedded_users
    asyncio.run(main())


@pytest.mark.parametrize("user", ["nobody", "0", "1\n", " 1", "{1}", "\N{SNOWMAN}"])
def test_a_user_absent_from_the_bundle_gets_the_default(ranker: Ranker, user: str) -> None:
    async def main() -> MetaEmbedding:
        return await EmbeddedStore().look_up(ranker, user)

    before = lookup_counts()
    assert_default(asyncio.run(main()), ranker, "default")
    assert lookup_counts() - before == {"miss": 1}


def test_an_embedded_look_up_is_done_at_once(ranker: Ranker) -> None:
    """Without an iteration of the loop; a look-up that is not awaited leaves no task behind."""

    async def main() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        found = EmbeddedStore().look_up(ranker, next(iter(ranker.embedded_users)))
        assert isinstance(found, asyncio.Future) and found.done() and found.result().status == "hit"
        EmbeddedStore().look_up(ranker, "nobody")
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not complaints

    asyncio.run(main())


def test_an_embedded_vector_beyond_the_maximum_age_is_stale(ranker: Any) -> None:
    async def main() -> None:
        user = next(iter(ranker.embedded_users))
        assert (await EmbeddedStore(1e-9).look_up(ranker, user)).status == "stale"
        assert (await EmbeddedStore(1e9).look_up(ranker, user)).status == "hit"

    asyncio.run(main())


def assert_default(found: MetaEmbedding, ranker: Ranker, status: str) -> None:
    assert (found.status, found.version, found.age_seconds) == (status, None, None)
    np.testing.assert_array_equal(found.vector, ranker.default_meta)


# Redis, healthy


def look_up(port: int, ranker: Ranker, *users: str) -> list[MetaEmbedding]:
    async def main() -> list[MetaEmbedding]:
        async with RedisStore(url(port), GENEROUS, lambda: [ranker]) as store:
            return [await store.look_up(ranker, user) for user in users]

    return asyncio.run(main())


def test_pushed_vectors_are_found_with_version_and_age(client: redis.Redis, redis_port: int, ranker: Ranker) -> None:
    users, sent = random_vectors(2_500, ranker)  # more than one round trip takes
    assert push_vectors(client, ranker, users, sent) == 1
    before = lookup_counts()
    for user, vector, found in zip(users[::250], sent[::250], look_up(redis_port, ranker, *users[::250]), strict=True):
        np.testing.assert_array_equal(found.vector, vector, err_msg=user)
        assert (found.status, found.version) == ("hit", "1")
        assert found.age_seconds is not None
        assert 0 <= found.age_seconds < PATIENCE
    assert lookup_counts() - before == {"hit_redis": 10}


def test_the_age_is_that_of_the_vector_and_not_negative(client: redis.Redis, redis_port: int, ranker: Ranker) -> None:
    space = ranker.manifest.space
    vector = ranker.default_meta
    client.set(pointer_key(ranker.name, space), "1")
    for user, created_at in (("old", time.time() - 1_000), ("future", time.time() + 1_000)):
        client.hset(user_key(ranker.name, space, user), "1", pack(vector, 1, created_at))
    old, future = look_up(redis_port, ranker, "old", "future")
    assert old.age_seconds == pytest.approx(1_000, abs=PATIENCE)
    assert future.age_seconds == 0


def test_a_vector_beyond_the_maximum_age_is_served_as_stale(client: redis.Redis, redis_port: int) -> None:
    fill(client)
    client.hset(user_key("r", "s", "5"), "1", pack(vectors_of(1)[5], 1, time.time() - 1_000))

    async def main() -> None:
        async with RedisStore(
            url(redis_port), GENEROUS, lambda: [RANKER], cache_seconds=60.0, max_age_seconds=500
        ) as store:
            before = lookup_counts()
            for _ in range(2):  # from Redis, then from the cache
                found = await store.look_up(RANKER, "5")
                check("5", found)
                assert (
                    found.status == "stale"
                    and found.version == "1"
                    and found.age_seconds == pytest.approx(1_000, abs=60)
                )
            assert (await store.look_up(RANKER, "6")).status == "hit"
            assert lookup_counts() - before == Counter(stale=2, hit_redis=1)

    asyncio.run(main())


@pytest.mark.parametrize("user", ["u", "user 1", "a}b{c", "\N{SNOWMAN}", "x" * 256])
def test_any_user_id_can_be_stored_and_found(client: redis.Redis, redis_port: int, ranker: Ranker, user: str) -> None:
    _, sent = random_vectors(1, ranker)
    push_vectors(client, ranker, [user], sent)
    (found,) = look_up(redis_port, ranker, user)
    np.testing.assert_array_equal(found.vector, sent[0])


def test_each_user_gets_the_newest_generation_that_has_them(
    client: redis.Redis, redis_port: int, ranker: Ranker
) -> None:
    users, first = random_vectors(2, ranker, seed=1)
    second = random_vectors(1, ranker, seed=2)[1]
    assert [push_vectors(client, ranker, users, first), push_vectors(client, ranker, users[:1], second)] == [1, 2]
    refreshed, kept = look_up(redis_port, ranker, *users)
    assert (refreshed.version, kept.version) == ("2", "1")
    np.testing.assert_array_equal(refreshed.vector, second[0])
    np.testing.assert_array_equal(kept.vector, first[1])


def test_generations_that_left_the_live_list_are_not_served(
    client: redis.Redis, redis_port: int, ranker: Ranker
) -> None:
    users, sent = random_vectors(2, ranker)
    push_vectors(client, ranker, users[:1], sent[:1])
    for _ in range(KEPT):
        push_vectors(client, ranker, users[1:], sent[1:])
    assert [found.status for found in look_up(redis_port, ranker, *users)] == ["default", "hit"]


def test_a_rolled_back_generation_never_returns(client: redis.Redis, redis_port: int, ranker: Ranker) -> None:
    """After a roll-back, the next push of fewer users must not make the rolled-back vectors visible."""
    users, good = random_vectors(2, ranker, seed=1)
    bad = random_vectors(2, ranker, seed=2)[1]
    new = random_vectors(2, ranker, seed=3)[1]
    assert push_vectors(client, ranker, users, good) == 1
    assert push_vectors(client, ranker, users, bad) == 2
    client.set(pointer_key(ranker.name, ranker.manifest.space), "1")
    assert push_vectors(client, ranker, users[:1], new[:1]) == 3
    first, second = look_up(redis_port, ranker, *users)
    np.testing.assert_array_equal(first.vector, new[0])
    np.testing.assert_array_equal(second.vector, good[1])
    assert client.hkeys(user_key(ranker.name, ranker.manifest.space, users[0])) == [b"1", b"3"], (
        "a write removes dead fields"
    )


def test_an_unknown_user_gets_the_default(client: redis.Redis, redis_port: int, ranker: Ranker) -> None:
    push_vectors(client, ranker, *random_vectors(1, ranker))
    before = lookup_counts()
    assert_default(look_up(redis_port, ranker, "nobody")[0], ranker, "default")
    assert lookup_counts() - before == {"miss": 1}


def test_an_empty_store_gives_the_default(client: redis.Redis, redis_port: int, ranker: Ranker) -> None:
    before = lookup_counts()
    assert_default(look_up(redis_port, ranker, "u0")[0], ranker, "default")
    assert lookup_counts() - before == {"miss": 1}


def test_vectors_of_other_rankers_and_spaces_are_not_found(
    client: redis.Redis, redis_port: int, ranker: Ranker
) -> None:
    users, sent = random_vectors(1, ranker)
    push(Generations(client, ranker.name, ranker.manifest.space + "x"), users, sent)
    push(Generations(client, ranker.name + "x", ranker.manifest.space), users, sent)
    assert_default(look_up(redis_port, ranker, *users)[0], ranker, "default")


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_smaller_dtypes_are_served_as_float32(client: redis.Redis, redis_port: int, dtype: str) -> None:
    sent = np.random.default_rng(0).normal(size=(5, DIM)).astype(np.float32)
    admin = Generations(client, "r", "s")
    with admin.begin("plan", full=True) as writing:
        admin.write_chunk(1, 0, list("abcde"), sent, time.time(), dtype)
        admin.publish(writing, 1)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, lambda: [RANKER]) as store:
            for user, vector in zip("abcde", sent, strict=True):
                found = await store.look_up(RANKER, user)
                assert found.status == "hit" and found.vector.dtype == np.float32
                np.testing.assert_allclose(found.vector, vector, atol=0.02)

    asyncio.run(main())


# Redis with unreadable content


def with_nan(ranker: Ranker) -> bytes:
    body = np.where(np.arange(ranker.manifest.meta_size) == 3, np.nan, 1.0).astype(np.float32).tobytes()
    header = (MAGIC, FLOAT32, ranker.manifest.meta_size, 0.0, 2)
    return HEADER.pack(*header, zlib.crc32(HEADER.pack(*header, 0) + body)) + body


WRONG: dict[str, Callable[[Ranker], bytes]] = {
    "garbage": lambda ranker: b"garbage",
    "empty": lambda ranker: b"",
    "another size": lambda ranker: pack(np.zeros(ranker.manifest.meta_size + 1, np.float32), 2, 0.0),
    "not a number": with_nan,
    "another generation": lambda ranker: pack(ranker.default_meta, 1, 0.0),
    "a byte off": lambda ranker: pack(ranker.default_meta, 2, 0.0)[:-1] + b"\x7f",
}


def kind(wrong: str) -> str:
    return "mismatched" if wrong.startswith("another") else "corrupt"


@pytest.mark.parametrize("wrong", WRONG)
def test_an_unreadable_value_is_counted_and_gives_the_default(
    client: redis.Redis, redis_port: int, ranker: Ranker, wrong: str
) -> None:
    client.set(pointer_key(ranker.name, ranker.manifest.space), "2")
    client.hset(user_key(ranker.name, ranker.manifest.space, "u0"), "2", WRONG[wrong](ranker))
    before = lookup_counts()
    assert_default(look_up(redis_port, ranker, "u0")[0], ranker, "default")
    assert lookup_counts() - before == {kind(wrong): 1, "miss": 1}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_older_vector_is_served_if_the_newest_is_unreadable(
    client: redis.Redis, redis_port: int, ranker: Ranker, wrong: str
) -> None:
    users, sent = random_vectors(1, ranker)
    push_vectors(client, ranker, users, sent)
    push_vectors(client, ranker, users, sent + 1)
    client.hset(user_key(ranker.name, ranker.manifest.space, users[0]), "2", WRONG[wrong](ranker))
    before = lookup_counts()
    (found,) = look_up(redis_port, ranker, *users)
    assert (found.status, found.version) == ("hit", "1")
    np.testing.assert_array_equal(found.vector, sent[0])
    assert lookup_counts() - before == {kind(wrong): 1, "hit_redis": 1}


def test_a_user_key_of_another_type_affects_only_that_user(
    client: redis.Redis, redis_port: int, ranker: Ranker
) -> None:
    users, sent = random_vectors(1, ranker)
    push_vectors(client, ranker, users, sent)
    client.set(user_key(ranker.name, ranker.manifest.space, "odd"), "a string")
    before = lookup_counts()
    odd, good, again = look_up(redis_port, ranker, "odd", users[0], "odd")
    for found in (odd, again):
        assert found.status in ("default", "error")
        np.testing.assert_array_equal(found.vector, ranker.default_meta)
    np.testing.assert_array_equal(good.vector, sent[0])
    assert (lookup_counts() - before).get("corrupt", 0) + (lookup_counts() - before).get("error", 0) == 2


@pytest.mark.parametrize(
    "pointer", [b"", b"x", b"1;2", b"\xff\xfe", b",,", b"-1", b" 1", b"9999999999999999999999", b"01"]
)
def test_an_unreadable_pointer_gives_the_default(
    client: redis.Redis, redis_port: int, ranker: Ranker, pointer: bytes
) -> None:
    users, sent = random_vectors(1, ranker)
    push_vectors(client, ranker, users, sent)
    client.set(pointer_key(ranker.name, ranker.manifest.space), pointer)
    (found,) = look_up(redis_port, ranker, *users)
    assert found.status in ("default", "error")
    np.testing.assert_array_equal(found.vector, ranker.default_meta)


# Redis with faults


def test_a_redis_that_dies_and_restarts_is_used_again(
    start_redis: Callable[[int | None], AbstractContextManager[int]], ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Poller, "SECONDS", 0.02)
    users, sent = random_vectors(3, ranker)

    def fill(port: int) -> None:
        with redis.Redis(port=port) as client:
            push_vectors(client, ranker, users, sent)

    async def main() -> None:
        with contextlib.ExitStack() as first:
            port = first.enter_context(start_redis(None))
            fill(port)
            async with RedisStore(url(port), 1.0, lambda: [ranker]) as store:
                assert await has_status(store, ranker, users[0], "hit")
                first.close()
                before = lookup_counts()
                for _ in range(20):  # some fail themselves, later ones follow a failed poll
                    async with asyncio.timeout(PATIENCE):
                        assert_default(await store.look_up(ranker, users[0]), ranker, "error")
                    await asyncio.sleep(0.005)
                assert lookup_counts() - before == {"error": 20}
                await until_async(lambda: asyncio.sleep(0, circuit(store) == OPEN))
                with start_redis(port):
                    await until_async(lambda: has_status(store, ranker, users[0], "default"))  # it restarts empty
                    fill(port)
                    await until_async(lambda: has_status(store, ranker, users[0], "hit"))
                    np.testing.assert_array_equal((await store.look_up(ranker, users[1])).vector, sent[1])

    asyncio.run(main())


def test_a_store_opened_without_redis_finds_it_later(
    start_redis: Callable[[int | None], AbstractContextManager[int]], ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Poller, "SECONDS", 0.02)
    with start_redis(None) as port:
        pass

    async def main() -> None:
        async with RedisStore(url(port), 1.0, lambda: [ranker]) as store:
            assert_default(await store.look_up(ranker, "u0"), ranker, "error")
            with start_redis(port):
                await until_async(lambda: has_status(store, ranker, "u0", "default"))

    asyncio.run(main())


@asynccontextmanager
async def tcp_server(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """A TCP server on loopback; its port."""
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


def speaker(answer: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """A server that answers everything with the same bytes, or not at all."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while await reader.read(65_536):
                writer.write(answer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    return handle


def pretend_live(store: RedisStore, ranker: Ranker, generations: list[str]) -> None:
    """Set the live generations of the ranker's space without a poll."""
    key = (ranker.name, ranker.manifest.space)
    store.poller.spaces[key] = Space(key, Live(b"1", generations))


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"garbage", b"$x\r\n", b":5\r\n", b"*1\r\n:1\r\n", b"-LOADING wait\r\n"],
)
def test_a_server_that_is_not_redis_is_an_error_in_time(
    ranker: Ranker, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Poller, "SECONDS", 0.02)

    async def main() -> None:
        async with (
            tcp_server(speaker(answer)) as port,
            asyncio.timeout(PATIENCE),
            RedisStore(url(port), 0.1, lambda: [ranker]) as store,
        ):
            for _ in range(5):
                assert_default(await store.look_up(ranker, "u0"), ranker, "error")
                await asyncio.sleep(0.02)
            assert not store.polling.done(), "without further polls the store would never recover"
            store.nodes[""].circuit = CLOSED
            pretend_live(store, ranker, ["2", "1"])  # as if the fault had only just begun
            found = await store.look_up(ranker, "u0")
            np.testing.assert_array_equal(found.vector, ranker.default_meta)

    asyncio.run(main())


def test_a_redis_that_hangs_is_an_error_in_time_then_used_again(
    client: redis.Redis, redis_port: int, ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Poller, "SECONDS", 0.02)
    users, sent = random_vectors(40, ranker)
    push_vectors(client, ranker, users, sent)

    async def main() -> None:
        async with fault_proxy(redis_port) as proxy, RedisStore(url(proxy.port), 1.0, lambda: [ranker]) as store:
            assert await has_status(store, ranker, users[0], "hit")
            proxy.may_speak.clear()
            async with asyncio.timeout(PATIENCE):  # the budget is one second, for all together
                found = await asyncio.gather(*(store.look_up(ranker, user) for user in users))
            for each in found:
                assert_default(each, ranker, "error")
            await until_async(lambda: asyncio.sleep(0, circuit(store) == OPEN))
            proxy.may_speak.set()
            await until_async(lambda: has_status(store, ranker, users[0], "hit"))
            for user, vector in zip(users, sent, strict=True):  # no late reply is read as the reply to another
                each = await store.look_up(ranker, user)
                assert each.status == "error" or np.array_equal(each.vector, vector)

    asyncio.run(main())


# Cancellation


# asyncio loses the socket of a connection attempt that times out; the garbage collector closes it with a warning
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("timeout_seconds", [GENEROUS, 0.006])
def test_a_cancelled_or_late_reply_never_reaches_another_user(
    client: redis.Redis, redis_port: int, ranker: Ranker, timeout_seconds: float
) -> None:
    users, sent = random_vectors(500, ranker)
    push_vectors(client, ranker, users, sent)
    chance = random.Random(1)

    async def main() -> tuple[int, int]:
        hits = cancelled = 0
        async with (
            fault_proxy(redis_port, lambda: chance.choice((0, 0, 0.001, 0.004, 0.01))) as proxy,
            RedisStore(url(proxy.port), timeout_seconds, lambda: [ranker]) as store,
        ):
            store.nodes[""].circuit = CLOSED
            pretend_live(store, ranker, ["1"])  # the first poll may have failed within so short a budget
            for _ in range(40):
                rows = [chance.randrange(len(users)) for _ in range(20)]
                tasks = [asyncio.ensure_future(store.look_up(ranker, users[row])) for row in rows]
                for task in tasks:
                    if chance.random() < 0.5:
                        asyncio.get_running_loop().call_later(chance.choice((0, 0.001, 0.003, 0.006)), task.cancel)
                for row, found in zip(rows, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
                    if isinstance(found, asyncio.CancelledError):
                        cancelled += 1
                    elif isinstance(found, MetaEmbedding) and found.status == "hit":
                        np.testing.assert_array_equal(found.vector, sent[row])
                        hits += 1
                    else:
                        assert timeout_seconds < 1, found
                        assert_default(found, ranker, "error")
                store.nodes[""].circuit = CLOSED
        return hits, cancelled

    hits, cancelled = asyncio.run(main())
    assert cancelled > 50
    assert hits > 100 or timeout_seconds < 1


def test_a_look_up_that_is_not_awaited_leaves_nothing_behind(
    client: redis.Redis, redis_port: int, ranker: Ranker
) -> None:
    users, sent = random_vectors(8, ranker)
    push_vectors(client, ranker, users, sent)

    async def main() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with RedisStore(url(redis_port), GENEROUS, lambda: [ranker]) as store:
            before = lookup_counts()
            for user in users:
                store.look_up(ranker, user)
            assert len(store.pending) == len(users), "each has started"
            await until_async(lambda: asyncio.sleep(0, not store.pending))
            assert lookup_counts() - before == {"hit_redis": len(users)}
            np.testing.assert_array_equal((await store.look_up(ranker, users[3])).vector, sent[3])
        assert not complaints

    asyncio.run(main())


def test_closing_waits_for_cancelled_look_ups(client: redis.Redis, redis_port: int, ranker: Ranker) -> None:
    users, sent = random_vectors(8, ranker)
    push_vectors(client, ranker, users, sent)

    async def main() -> None:
        async with fault_proxy(redis_port, 0.01) as proxy:
            async with RedisStore(url(proxy.port), GENEROUS, lambda: [ranker]) as store:
                tasks = [asyncio.ensure_future(store.look_up(ranker, user)) for user in users]
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                assert store.nodes[""].under_way
            assert not store.nodes[""].under_way
            assert store.polling.done()

    asyncio.run(main())
