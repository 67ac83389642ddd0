"""Replies of Redis are bounded, and the log of its state is rare."""

from __future__ import annotations

import asyncio
import logging

import pytest
import redis
from redis.exceptions import InvalidResponse

from slatewise.store import node as node_module
from slatewise.store.client import connect_async
from slatewise.store.lookup import RedisStore
from slatewise.store.node import CLOSED, OPEN, RedisNode
from tests.store.conftest import url
from tests.support.fault_proxy import fault_proxy
from tests.support.store_load import RANKER, circuit, fill, until, until_closed


def test_reply_above_the_limit_is_refused_and_the_connection_dropped(client: redis.Redis, redis_port: int) -> None:
    client.set("large", b"x" * 2_000)
    client.set("small", b"x" * 900)

    async def main() -> None:
        connection = connect_async(url(redis_port), 1.0, 1, reply_bytes=1_000)
        for _ in range(2):
            with pytest.raises(InvalidResponse, match="1000 bytes"):
                await connection.get("large")
            assert await connection.get("small") == b"x" * 900
        with pytest.raises(InvalidResponse, match="1000 bytes"):  # by all values together
            await connection.mget(["small", "small"])
        await connection.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    "reply", [b"$1000000000\r\n" + b"x" * 65_536, b"*1000000000\r\n" + b"$-1\r\n" * 10_000, b"+" + b"x" * 200_000]
)
def test_reply_that_never_ends_opens_the_circuit(client: redis.Redis, redis_port: int, reply: bytes) -> None:
    """No more of it is read than what arrives with its first line."""
    fill(client)

    async def main() -> None:
        async with fault_proxy(redis_port) as proxy, RedisStore(url(proxy.port), 0.5, lambda: [RANKER]) as store:
            await until_closed(store)
            proxy.answer = reply
            await until(lambda: circuit(store) == OPEN, 5.0)
            assert store.client.connection_pool._available_connections == [] or all(
                not connection.is_connected for connection in store.client.connection_pool._available_connections
            )
            proxy.heal()
            await until_closed(store)

    asyncio.run(main())


def test_state_that_changes_often_is_logged_once_and_at_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "LOG_SECONDS", 0.3)
    caplog.set_level(logging.INFO)

    async def main() -> None:
        node = RedisNode("", connect_async("redis://127.0.0.1:1", 1.0, 1), 1.0, CLOSED)
        for _ in range(50):
            node.switch(OPEN)
            node.switch(CLOSED)
        node.switch(OPEN)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        node.switch(CLOSED)
        await asyncio.sleep(0.5)
        assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]
        await node.close()

    asyncio.run(main())
