"""Clients from URLs: which kind of store a URL names, and its parts."""

from __future__ import annotations

import pytest
import redis

from slatewise.store.client import connect, is_wrong_type, split
from tests.store.conftest import url


def test_connect_to_one_server_gives_a_client_that_answers(redis_port: int) -> None:
    with connect(url(redis_port)) as client:
        assert client.ping()


@pytest.mark.parametrize("wrong", ["http://h", "redis+x://h", "redis+sentinel://h:1"])
def test_connect_to_a_wrong_url_raises_value_error(wrong: str) -> None:
    with pytest.raises(ValueError):
        connect(wrong)


@pytest.mark.parametrize(
    ("url", "kind", "hosts", "path", "options"),
    [
        ("redis+cluster://a:1,b", "cluster", [("a", 1), ("b", 6379)], [], {}),
        ("redis+sentinel://a,[::1]:2/main/3", "sentinel", [("a", 26379), ("::1", 2)], ["main", "3"], {}),
        ("redis+cluster://u:p%40ss@a:1", "cluster", [("a", 1)], [], {"username": "u", "password": "p@ss"}),
        ("redis+cluster://:p@a", "cluster", [("a", 6379)], [], {"password": "p"}),
        (
            "rediss+cluster://a?ssl_ca_certs=ca.pem",
            "cluster",
            [("a", 6379)],
            [],
            {"ssl": True, "ssl_ca_certs": "ca.pem"},
        ),
        (
            "redis+sentinel://a/main?sentinel_password=s",
            "sentinel",
            [("a", 26379)],
            ["main"],
            {"sentinel_password": "s"},
        ),
    ],
)
def test_split_of_a_url_gives_hosts_path_and_options(
    url: str, kind: str, hosts: list[tuple[str, int]], path: list[str], options: dict[str, object]
) -> None:
    assert split(url) == (kind, hosts, path, options)


def test_is_wrong_type_tells_that_error_from_others(client: redis.Redis) -> None:
    client.set("text", "a")
    with pytest.raises(redis.ResponseError) as wrong_type:
        client.hget("text", "field")
    with pytest.raises(redis.ResponseError) as other:
        client.incr("text")
    assert is_wrong_type(wrong_type.value)
    assert not is_wrong_type(other.value)
    assert not is_wrong_type([b"WRONGTYPE"])
