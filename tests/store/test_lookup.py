"""Meta-embeddings: the stored value, the bundle's store, and Redis with every way it can fail. The Redis here is a real server."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any

import numpy as np
import pytest
import redis
from prometheus_client import REGISTRY

from slatewise.bundle.ranker import Ranker
from slatewise.store.codec import FLOAT32, HEADER, MAGIC, pack, pointer_key, user_key
from slatewise.store.generations import KEPT, Generations
from slatewise.store.lookup import EmbeddedStore, MetaEmbedding, RedisStore
from slatewise.store.node import CLOSED, OPEN
from slatewise.store.push import push
from tests.support.fault_proxy import fault_proxy
from tests.support.store_load import circuit

PATIENCE = 30.0  # seconds; never waited for where the code is right
GENEROUS = 20.0  # a time-out that a busy machine does not meet by chance


RESULTS = ("hit_local", "hit_redis", "miss", "miss_local", "stale", "mismatched", "corrupt", "error")


def counted(metric: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(metric, labels) or 0.0


class Counts:
    """How many look-ups ended how since this was made."""

    def __init__(self) -> None:
        self.before = self.now()

    def now(self) -> dict[str, float]:
        return {r: counted("slatewise_embedding_lookups_total", result=r) for r in RESULTS}

    def __call__(self) -> dict[str, float]:
        return {result: n - self.before[result] for result, n in self.now().items() if n != self.before[result]}


# The embedded store


def test_the_embedded_store_serves_the_bundles_vectors(ranker: Ranker) -> None:
    async def main() -> None:
        counts = Counts()
        for user, row in ranker.embedded_users.items():
            found = await EmbeddedStore().look_up(ranker, user)
            np.testing.assert_array_equal(found.vector, ranker.embedded_meta[row])
            assert (found.status, found.version) == ("hit", str(ranker.manifest.version))
            assert found.age_seconds is not None
            assert 0 <= found.age_seconds < 3_600
        assert counts() == {"hit_local": len(ranker.embedded_users)}

    assert ranker.embedded_users
    asyncio.run(main())


@pytest.mark.parametrize("user", ["nobody", "0", "1\n", " 1", "{1}", "\N{SNOWMAN}"])
def test_a_user_that_the_bundle_does_not_know_gets_the_default(ranker: Ranker, user: str) -> None:
    async def main() -> MetaEmbedding:
        return await EmbeddedStore().look_up(ranker, user)

    counts = Counts()
    assert_default(asyncio.run(main()), ranker, "default")
    assert counts() == {"miss": 1}


def test_a_look_up_in_the_bundle_is_done_where_it_begins(ranker: Ranker) -> None:
    """Without a turn of the loop; who goes away without awaiting it leaves nothing behind."""

    async def main() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        found = EmbeddedStore().look_up(ranker, next(iter(ranker.embedded_users)))
        assert isinstance(found, asyncio.Future) and found.done() and found.result().status == "hit"
        EmbeddedStore().look_up(ranker, "nobody")
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not complaints

    asyncio.run(main())


def assert_default(found: MetaEmbedding, ranker: Ranker, status: str) -> None:
    assert (found.status, found.version, found.age_seconds) == (status, None, None)
    np.testing.assert_array_equal(found.vector, ranker.default_meta)


# Redis, well


@pytest.fixture
def client(redis_port: int) -> Iterator[redis.Redis]:
    with redis.Redis(port=redis_port) as client:
        client.flushall()
        yield client


def drawn(users: int, ranker: Ranker, seed: int = 0) -> tuple[list[str], np.ndarray]:
    return [f"u{k}" for k in range(users)], np.random.default_rng(seed).normal(
        size=(users, ranker.manifest.meta_size)
    ).astype(np.float32)


def push_to(client: redis.Redis, ranker: Ranker, users: list[str], vectors: np.ndarray) -> int:
    return int(push(Generations(client, ranker.name, ranker.manifest.space), users, vectors)["generation"])


def url(port: int) -> str:
    return f"redis://127.0.0.1:{port}/0"


def look_up(port: int, ranker: Ranker, *users: str) -> list[MetaEmbedding]:
    async def main() -> list[MetaEmbedding]:
        async with RedisStore(url(port), GENEROUS, [ranker]) as store:
            return [await store.look_up(ranker, user) for user in users]

    return asyncio.run(main())


async def until(condition: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await condition():  # noqa: ASYNC110 - what is waited for happens in another process
            await asyncio.sleep(0.01)


def test_what_was_pushed_is_found_with_version_and_age(client: redis.Redis, redis_port: int, ranker: Ranker) -> None:
    users, sent = drawn(2_500, ranker)  # more than one round trip's worth
    assert push_to(client, ranker, users, sent) == 1
    counts = Counts()
    for user, vector, found in zip(users[::250], sent[::250], look_up(redis_port, ranker, *users[::250]), strict=True):
        np.testing.assert_array_equal(found.vector, vector, err_msg=user)
        assert (found.status, found.version) == ("hit", "1")
        assert found.age_seconds is not None
        assert 0 <= found.age_seconds < PATIENCE
    assert counts() == {"hit_redis": 10}


def test_the_age_is_that_of_the_vector(client: redis.Redis, redis_port: int, ranker: Ranker) -> None:
    space = ranker.manifest.space
    vector = ranker.default_meta
    client.set(pointer_key(ranker.name, space), "1")
    for user, created_at in (("old", time.time() - 1_000), ("future", time.time() + 1_000)):
        client.hset(user_key(ranker.name, space, user), "1", pack(vector, 1, created_at))
    old, future = look_up(redis_port, ranker, "old", "future")
    assert old.age_seconds == pytest.approx(1_000, abs=PATIENCE)
    assert future.age_seconds == 0


@pytest.mark.parametrize("user", ["u", "user 1", "a}b{c", "\N{SNOWMAN}", "x" * 256])
def test_any_user_id_can_be_stored(client: redis.Redis, redis_port: int, ranker: Ranker, user: str) -> None:
    _, sent = drawn(1, ranker)
    push_to(client, ranker, [user], sent)
    (found,) = look_up(redis_port, ranker, user)
    np.testing.assert_array_equal(found.vector, sent[0])


def test_the_newest_generation_wins_and_an_older_one_serves_who_is_not_in_it(
    client: redis.Redis, redis_port: int, ranker: Ranker
) -> None:
    users, first = drawn(2, ranker, seed=1)
    second = drawn(1, ranker, seed=2)[1]
    assert [push_to(client, ranker, users, first), push_to(client, ranker, users[:1], second)] == [1, 2]
    refreshed, kept = look_up(redis_port, ranker, *users)
    assert (refreshed.version, kept.version) == ("2", "1")
    np.testing.assert_array_equal(refreshed.vector, second[0])
    np.testing.assert_array_equal(kept.vector, first[1])


def test_generations_past_the_live_ones_are_not_served(client: redis.Redis, redis_port: int, ranker: Ranker) -> None:
    users, sent = drawn(2, ranker)
    push_to(client, ranker, users[:1], sent[:1])
    for _ in range(KEPT):
        push_to(client, ranker, users[1:], sent[1:])
    assert [found.status for found in look_up(redis_port, ranker, *users)] == ["default", "hit"]


def test_an_unknown_user_gets_the_default(client: redis.Redis, redis_port: int, ranker: Ranker) -> None:
    push_to(client, ranker, *drawn(1, ranker))
    counts = Counts()
    assert_default(look_up(redis_port, ranker, "nobody")[0], ranker, "default")
    assert counts() == {"miss": 1}


def test_an_empty_store_gives_the_default(client: redis.Redis, redis_port: int, ranker: Ranker) -> None:
    counts = Counts()
    assert_default(look_up(redis_port, ranker, "u0")[0], ranker, "default")
    assert counts() == {"miss": 1}


def test_a_new_generation_and_its_roll_back_each_take_one_write(
    client: redis.Redis, redis_port: int, ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisStore, "POLL_SECONDS", 0.02)
    users, first = drawn(1, ranker, seed=1)
    second = drawn(1, ranker, seed=2)[1]
    push_to(client, ranker, users, first)

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, [ranker]) as store:

            async def serves(version: str) -> bool:
                return (await store.look_up(ranker, users[0])).version == version

            assert await serves("1")
            push_to(client, ranker, users, second)
            await until(lambda: serves("2"))
            client.set(pointer_key(ranker.name, ranker.manifest.space), "1")
            await until(lambda: serves("1"))
            np.testing.assert_array_equal((await store.look_up(ranker, users[0])).vector, first[0])

    asyncio.run(main())


def test_other_rankers_and_spaces_do_not_mix(client: redis.Redis, redis_port: int, ranker: Ranker) -> None:
    users, sent = drawn(1, ranker)
    push(Generations(client, ranker.name, ranker.manifest.space + "x"), users, sent)
    push(Generations(client, ranker.name + "x", ranker.manifest.space), users, sent)
    assert_default(look_up(redis_port, ranker, *users)[0], ranker, "default")


def test_more_look_ups_at_once_than_connections_are_all_served(
    client: redis.Redis, redis_port: int, ranker: Ranker
) -> None:
    users, sent = drawn(256, ranker)  # as many as the first door lets in
    push_to(client, ranker, users, sent)

    async def main() -> list[MetaEmbedding]:
        async with RedisStore(url(redis_port), GENEROUS, [ranker]) as store:
            return await asyncio.gather(*(store.look_up(ranker, user) for user in users))

    found = asyncio.run(main())
    assert [f.status for f in found].count("hit") == len(users)
    np.testing.assert_array_equal([f.vector for f in found], sent)


# Redis, with something wrong in it


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
    counts = Counts()
    assert_default(look_up(redis_port, ranker, "u0")[0], ranker, "default")
    assert counts() == {kind(wrong): 1, "miss": 1}


@pytest.mark.parametrize("wrong", WRONG)
def test_behind_an_unreadable_value_an_older_one_is_served(
    client: redis.Redis, redis_port: int, ranker: Ranker, wrong: str
) -> None:
    users, sent = drawn(1, ranker)
    push_to(client, ranker, users, sent)
    push_to(client, ranker, users, sent + 1)
    client.hset(user_key(ranker.name, ranker.manifest.space, users[0]), "2", WRONG[wrong](ranker))
    counts = Counts()
    (found,) = look_up(redis_port, ranker, *users)
    assert (found.status, found.version) == ("hit", "1")
    np.testing.assert_array_equal(found.vector, sent[0])
    assert counts() == {kind(wrong): 1, "hit_redis": 1}


def test_a_user_key_of_another_type_is_counted_and_takes_nothing_from_others(
    client: redis.Redis, redis_port: int, ranker: Ranker
) -> None:
    users, sent = drawn(1, ranker)
    push_to(client, ranker, users, sent)
    client.set(user_key(ranker.name, ranker.manifest.space, "odd"), "a string")
    counts = Counts()
    odd, good, again = look_up(redis_port, ranker, "odd", users[0], "odd")
    for found in (odd, again):
        assert found.status in ("default", "error")
        np.testing.assert_array_equal(found.vector, ranker.default_meta)
    np.testing.assert_array_equal(good.vector, sent[0])
    assert counts().get("corrupt", 0) + counts().get("error", 0) == 2


@pytest.mark.parametrize(
    "pointer", [b"", b"x", b"1;2", b"\xff\xfe", b",,", b"-1", b" 1", b"9999999999999999999999", b"01"]
)
def test_an_unreadable_pointer_gives_the_default(
    client: redis.Redis, redis_port: int, ranker: Ranker, pointer: bytes
) -> None:
    users, sent = drawn(1, ranker)
    push_to(client, ranker, users, sent)
    client.set(pointer_key(ranker.name, ranker.manifest.space), pointer)
    (found,) = look_up(redis_port, ranker, *users)
    assert found.status in ("default", "error")
    np.testing.assert_array_equal(found.vector, ranker.default_meta)


def test_a_pointer_of_another_type_is_survived(
    client: redis.Redis, redis_port: int, ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisStore, "POLL_SECONDS", 0.02)
    users, sent = drawn(1, ranker)
    client.hset(pointer_key(ranker.name, ranker.manifest.space), "a", "b")

    async def main() -> None:
        async with RedisStore(url(redis_port), GENEROUS, [ranker]) as store:
            np.testing.assert_array_equal((await store.look_up(ranker, users[0])).vector, ranker.default_meta)
            client.delete(pointer_key(ranker.name, ranker.manifest.space))
            push_to(client, ranker, users, sent)
            await until(lambda: has_status(store, ranker, users[0], "hit"))

    asyncio.run(main())


async def has_status(store: RedisStore, ranker: Ranker, user: str, status: str) -> bool:
    return (await store.look_up(ranker, user)).status == status


# Redis, ill or away


def test_a_redis_that_dies_is_an_error_in_time_and_comes_back_by_itself(
    start_redis: Callable[[int | None], AbstractContextManager[int]], ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisStore, "POLL_SECONDS", 0.02)
    users, sent = drawn(3, ranker)

    def fill(port: int) -> None:
        with redis.Redis(port=port) as client:
            push_to(client, ranker, users, sent)

    async def main() -> None:
        with contextlib.ExitStack() as first:
            port = first.enter_context(start_redis(None))
            fill(port)
            async with RedisStore(url(port), 1.0, [ranker]) as store:
                assert await has_status(store, ranker, users[0], "hit")
                first.close()
                counts = Counts()
                for _ in range(20):  # those that find out by themselves, and those after the poll has
                    async with asyncio.timeout(PATIENCE):
                        assert_default(await store.look_up(ranker, users[0]), ranker, "error")
                    await asyncio.sleep(0.005)
                assert counts() == {"error": 20}
                await until(lambda: asyncio.sleep(0, circuit(store) == OPEN))
                with start_redis(port):
                    await until(lambda: has_status(store, ranker, users[0], "default"))  # it came back empty
                    fill(port)
                    await until(lambda: has_status(store, ranker, users[0], "hit"))
                    np.testing.assert_array_equal((await store.look_up(ranker, users[1])).vector, sent[1])

    asyncio.run(main())


def test_a_store_opens_without_redis_and_finds_it_later(
    start_redis: Callable[[int | None], AbstractContextManager[int]], ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisStore, "POLL_SECONDS", 0.02)
    with start_redis(None) as port:
        pass

    async def main() -> None:
        async with RedisStore(url(port), 1.0, [ranker]) as store:
            assert_default(await store.look_up(ranker, "u0"), ranker, "error")
            with start_redis(port):
                await until(lambda: has_status(store, ranker, "u0", "default"))

    asyncio.run(main())


@asynccontextmanager
async def found_vector(
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
    """A server that answers whatever it is sent with the same bytes, or not at all."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while await reader.read(65_536):
                writer.write(answer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    return handle


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"garbage", b"$x\r\n", b":5\r\n", b"*1\r\n:1\r\n", b"-LOADING wait\r\n"],
)
def test_what_is_not_redis_or_never_answers_is_an_error_within_the_budget(
    ranker: Ranker, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisStore, "POLL_SECONDS", 0.02)

    async def main() -> None:
        async with (
            found_vector(speaker(answer)) as port,
            asyncio.timeout(PATIENCE),
            RedisStore(url(port), 0.1, [ranker]) as store,
        ):
            for _ in range(5):
                assert_default(await store.look_up(ranker, "u0"), ranker, "error")
                await asyncio.sleep(0.02)
            assert not store.poller.done(), "the poll must go on, or the store never comes back"
            store.nodes[""].circuit = CLOSED
            store.pointers = {ranker.name: b"1"}
            store.generations = {ranker.name: ["2", "1"]}  # as if it had gone wrong just now
            found = await store.look_up(ranker, "u0")
            np.testing.assert_array_equal(found.vector, ranker.default_meta)

    asyncio.run(main())


def test_a_redis_that_falls_silent_is_an_error_within_the_budget_and_is_used_again_when_it_speaks(
    client: redis.Redis, redis_port: int, ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisStore, "POLL_SECONDS", 0.02)
    users, sent = drawn(40, ranker)
    push_to(client, ranker, users, sent)

    async def main() -> None:
        async with fault_proxy(redis_port) as proxy, RedisStore(url(proxy.port), 1.0, [ranker]) as store:
            assert await has_status(store, ranker, users[0], "hit")
            proxy.may_speak.clear()
            async with asyncio.timeout(PATIENCE):  # the budget is a second; all at once take no longer than one
                found = await asyncio.gather(*(store.look_up(ranker, user) for user in users))
            for each in found:
                assert_default(each, ranker, "error")
            await until(lambda: asyncio.sleep(0, circuit(store) == OPEN))
            proxy.may_speak.set()
            await until(lambda: has_status(store, ranker, users[0], "hit"))
            for user, vector in zip(users, sent, strict=True):  # no late reply of before is taken for one of now
                each = await store.look_up(ranker, user)
                assert each.status == "error" or np.array_equal(each.vector, vector)

    asyncio.run(main())


# asyncio loses the socket of a connection that runs out of time while it is made; the collector closes it, with a warning
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("timeout_seconds", [GENEROUS, 0.006])
def test_a_look_up_that_is_cancelled_or_late_never_hands_its_reply_to_another(
    client: redis.Redis, redis_port: int, ranker: Ranker, timeout_seconds: float
) -> None:
    users, sent = drawn(500, ranker)
    push_to(client, ranker, users, sent)
    chance = random.Random(1)

    async def main() -> tuple[int, int]:
        hits = cancelled = 0
        async with (
            fault_proxy(redis_port, lambda: chance.choice((0, 0, 0.001, 0.004, 0.01))) as proxy,
            RedisStore(url(proxy.port), timeout_seconds, [ranker]) as store,
        ):
            store.nodes[""].circuit = CLOSED
            store.pointers = {ranker.name: b"1"}
            store.generations = {ranker.name: ["1"]}  # whatever the first poll found in so short a time
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


def test_a_look_up_that_nobody_awaits_ends_by_itself_and_leaves_nothing_behind(
    client: redis.Redis, redis_port: int, ranker: Ranker
) -> None:
    users, sent = drawn(8, ranker)
    push_to(client, ranker, users, sent)

    async def main() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with RedisStore(url(redis_port), GENEROUS, [ranker]) as store:
            counts = Counts()
            for user in users:
                store.look_up(ranker, user)
            assert len(store.pending) == len(users), "each has begun"
            await until(lambda: asyncio.sleep(0, not store.pending))
            assert counts() == {"hit_redis": len(users)}
            np.testing.assert_array_equal((await store.look_up(ranker, users[3])).vector, sent[3])
        assert not complaints

    asyncio.run(main())


def test_closing_waits_for_look_ups_that_nobody_waits_for(client: redis.Redis, redis_port: int, ranker: Ranker) -> None:
    users, sent = drawn(8, ranker)
    push_to(client, ranker, users, sent)

    async def main() -> None:
        async with fault_proxy(redis_port, 0.01) as proxy:
            async with RedisStore(url(proxy.port), GENEROUS, [ranker]) as store:
                tasks = [asyncio.ensure_future(store.look_up(ranker, user)) for user in users]
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                assert store.nodes[""].under_way
            assert not store.nodes[""].under_way
            assert store.poller.done()

    asyncio.run(main())


def test_a_generation_that_was_rolled_back_never_comes_back_under_its_number(
    client: redis.Redis, redis_port: int, ranker: Ranker
) -> None:
    """Pushed, found bad, rolled back; the next push of fewer users must not bring the bad vectors back."""
    users, good = drawn(2, ranker, seed=1)
    bad = drawn(2, ranker, seed=2)[1]
    new = drawn(2, ranker, seed=3)[1]
    assert push_to(client, ranker, users, good) == 1
    assert push_to(client, ranker, users, bad) == 2
    client.set(pointer_key(ranker.name, ranker.manifest.space), "1")
    assert push_to(client, ranker, users[:1], new[:1]) == 3
    first, second = look_up(redis_port, ranker, *users)
    np.testing.assert_array_equal(first.vector, new[0])
    np.testing.assert_array_equal(second.vector, good[1])
    assert client.hkeys(user_key(ranker.name, ranker.manifest.space, users[0])) == [b"1", b"3"], (
        "what is dead goes at the next write"
    )
