"""Builds Redis clients from a URL: for one server, a server behind Sentinel, or a Cluster.

    redis://[user:password@]host:port/db            rediss:// for TLS, unix:///path/of/socket?db=0
    redis+sentinel://[user:password@]host:port,host:port/service/db?sentinel_password=...
    redis+cluster://[user:password@]host:port,host:port

`rediss` instead of `redis` means TLS in every form. The query takes redis-py's options (`?ssl_ca_certs=ca.pem`).
Called by: `push.py`, `admin.py` and the refresh job (`connect`), `lookup.py` (`connect_async`), and other files of this
folder. Calls: redis-py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
import redis.asyncio as aioredis
from redis.asyncio.cluster import ClusterNode as AsyncClusterNode
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.cluster import ClusterNode
from redis.connection import parse_url
from redis.exceptions import ResponseError
from redis.retry import Retry

from slatewise.settings import REDIS_SCHEMES
from slatewise.store.replies import BoundedParser

Client = redis.Redis | redis.RedisCluster
AsyncClient = aioredis.Redis | aioredis.RedisCluster

COMMON = {"protocol": 2}  # RESP2 needs fewer round trips to connect, and no feature of RESP3 is used
REPLY_BYTES = 8 * 2**20  # more than any value that the server reads, if histories are not made longer
WRITER_SECONDS = 10.0  # for a batch of a thousand users on a busy server


def split(url: str) -> tuple[str, list[tuple[str, int]], list[str], dict[str, Any]]:
    """Split a URL with several hosts into (kind, hosts, parts of the path, options). Raises ValueError."""
    if not url.startswith(REDIS_SCHEMES):
        raise ValueError(f"must start with {', '.join(REDIS_SCHEMES)}")
    scheme, _, rest = url.partition("://")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]  # urlsplit of newer Pythons refuses an IPv6 host behind another
    parts = urlsplit(f"{scheme}://h{rest[len(authority) :]}")
    secure, _, kind = scheme.partition("+")
    credentials, _, listed = authority.rpartition("@")
    hosts = []
    for each in listed.split(","):
        host, _, port = each.rpartition(":") if ":" in each.rpartition("]")[2] else (each, "", "")
        hosts.append((host.strip("[]"), int(port or (26379 if kind == "sentinel" else 6379))))
    # redis-py converts each option of the query to its type
    options: dict[str, Any] = dict(parse_url(f"{secure}://h/?{parts.query}"))  # type: ignore[no-untyped-call]
    for name in ("host", "connection_class"):
        options.pop(name, None)
    user, _, password = credentials.partition(":")
    options |= {name: unquote(value) for name, value in (("username", user), ("password", password)) if value}
    if secure == "rediss":
        options["ssl"] = True
    return kind, hosts, [unquote(part) for part in parts.path.split("/") if part], options


def make_client(
    url: str, library: Any, node: Callable[..., Any], from_url: Callable[[str], Any], options: dict[str, Any]
) -> Any:
    """Build a client with `library`: redis-py's blocking or its asyncio module. Raises ValueError."""
    if not url.partition("://")[0].endswith(("+sentinel", "+cluster")):
        return from_url(url)
    kind, hosts, path, given = split(url)
    options = options | given
    if kind == "cluster":
        return library.RedisCluster(
            startup_nodes=[node(host, port) for host, port in hosts], require_full_coverage=False, **options
        )
    if not path:
        raise ValueError("the service's name is missing: redis+sentinel://host:port/service")
    secret = {
        name: options.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in options
    }
    shared = {
        name: value for name, value in options.items() if name.startswith(("protocol", "socket_", "ssl", "retry"))
    }
    sentinel = library.sentinel.Sentinel(hosts, sentinel_kwargs=shared | secret, **options)
    return sentinel.master_for(path[0], db=int(path[1]) if len(path) > 1 else 0)


def connect(url: str) -> Client:
    """Build a blocking client for writers, with long timeouts and retries. Every write may be repeated.

    Connects at the first command. Raises ValueError if the URL is wrong.
    """
    retry = Retry(ExponentialBackoff(cap=1.0, base=0.05), 5)
    options: dict[str, Any] = COMMON | {"socket_timeout": WRITER_SECONDS, "socket_connect_timeout": 5.0, "retry": retry}
    client: Client = make_client(url, redis, ClusterNode, lambda url: redis.Redis.from_url(url, **options), options)
    return client


def connect_async(url: str, timeout_seconds: float, connections: int, reply_bytes: int = REPLY_BYTES) -> AsyncClient:
    """Build an asyncio client for the server, without retries. Raises ValueError if the URL is wrong.

    `timeout_seconds` limits the time to connect only. The caller limits the wait for replies, because redis-py would
    set a timer for each reply. A reply of more than `reply_bytes` is an error.
    """
    options: dict[str, Any] = {
        **COMMON,
        "socket_timeout": None,
        "socket_connect_timeout": timeout_seconds,
        "retry": Retry(NoBackoff(), 0),
        "max_connections": connections,
    }
    if "+cluster://" in url:
        options |= {"reinitialize_steps": 0}  # a slot that moved closes no connections
    client: AsyncClient = make_client(
        url, aioredis, AsyncClusterNode, lambda url: aioredis.Redis.from_url(url, **options), options
    )
    parser = partial(BoundedParser, most_bytes=reply_bytes)
    if isinstance(client, aioredis.RedisCluster):  # its constructor takes no parser
        for node in client.startup_nodes:
            node.connection_kwargs["parser_class"] = parser
        client.connection_kwargs["parser_class"] = parser
    else:
        client.connection_pool.connection_kwargs["parser_class"] = parser
    return client


async def disconnect(client: Any) -> None:
    """Close every connection of an asyncio client, so that bytes already received are not read as a later reply."""
    await (client if isinstance(client, aioredis.RedisCluster) else client.connection_pool).aclose()


def run_script(client: Any, script: str, keys: list[str], *arguments: object) -> int:
    """Run a Lua script with a blocking client. Return its integer result."""
    return int(client.eval(script, len(keys), *keys, *arguments))


def is_wrong_type(reply: object) -> bool:
    """Return whether a reply is the error WRONGTYPE: the server works, but the key does not hold a hash."""
    return isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE")
