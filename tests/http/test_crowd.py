"""Many at once: each answer equals the answer of the same request alone, whoever else asks, leaves, or waits for Redis.

Vectors and histories name their users here, so that an answer with another user's would differ.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import httpx
import numpy as np
import pytest

from loadtest.store.faults import proxy_thread
from slatewise.bundle.ranker import Ranker
from slatewise.settings import Settings
from slatewise.store.client import connect
from slatewise.store.generations import Generations
from slatewise.store.push import push
from tests.conftest import Tiny
from tests.http.support import BOUND, ask, sums, wait_for
from tests.support.application import serve

USERS = 64
GAUGES = ("slatewise_requests_in_flight ", "slatewise_queue_seconds ", "slatewise_queue_length")
NOW = 1_700_000_000


def body_of(user: int, ids: list[str], stored: bool) -> dict[str, Any]:
    """A request whose answer depends on its user: on the vector, the history and the candidates."""
    rng = random.Random(user)
    body: dict[str, Any] = {
        "user": f"crowd-{user}",
        "candidates": {"item_ids": rng.sample(ids, 3 + user % 17)},
        "request_time": NOW + 10**6,
    }
    if not stored:
        body["history"] = history_of(user, ids)
    return body


def history_of(user: int, ids: list[str]) -> dict[str, Any]:
    rng = random.Random(-user)
    n = user % 40
    return {"item_ids": rng.choices(ids, k=n), "timestamps": [NOW + k for k in range(n)]}


def seen(answer: dict[str, Any]) -> tuple[Any, ...]:
    """What must not differ, but for the scores."""
    return answer["results"]["item_ids"], answer["history"]["source"], answer["meta_embedding"]["version"]


def assert_same(answer: dict[str, Any], alone: dict[str, Any]) -> None:
    assert seen(answer) == seen(alone)
    assert answer["results"]["scores"] == pytest.approx(alone["results"]["scores"], abs=BOUND)


def push_vectors(port: int, ranker: Ranker) -> None:
    """A vector for each user, far from those of the others."""
    size = (USERS, ranker.manifest.meta_size)
    vectors = np.random.default_rng(0).normal(0, 3, size).astype(np.float32)
    with connect(f"redis://127.0.0.1:{port}/0") as client:
        push(Generations(client, ranker.name, ranker.manifest.space), [f"crowd-{k}" for k in range(USERS)], vectors)


@pytest.fixture
def shared(
    tiny: Tiny, ranker: Ranker, start_redis: Callable[[int | None], AbstractContextManager[int]]
) -> Iterator[tuple[httpx.Client, Any, int]]:
    """(client, proxy, port of Redis): a server behind the proxy, with vectors and stored histories of all users."""
    with start_redis(None) as port, proxy_thread(port) as running:
        push_vectors(port, ranker)
        settings = Settings(
            bundles=tiny.root,
            redis_url=f"redis://127.0.0.1:{running.proxy.port}/0",  # type: ignore[arg-type]
            redis_timeout_ms=5_000,
            embedding_cache_s=0,
            threads=2,
            max_queue_ms=1e6,
        )
        with serve(settings) as client:
            ids = ranker.vocabulary.items
            for user in range(USERS):
                history = history_of(user, list(ids))
                events = [
                    {"user": f"crowd-{user}", "item_id": item, "timestamp": at, "event_id": f"{k}"}
                    for k, (item, at) in enumerate(zip(history["item_ids"], history["timestamps"], strict=True))
                ]
                if events:
                    assert client.post("/events", json={"events": events}).status_code == 202
            yield client, running, port


def test_64_users_at_once_get_their_isolated_answers(shared: Any, ranker: Ranker) -> None:
    client, _, _ = shared
    ids = list(ranker.vocabulary.items)
    bodies = [body_of(user, ids, stored) for user in range(USERS) for stored in (False, True)]
    alone = [ask(client, body) for body in bodies]
    assert len({tuple(answer["results"]["scores"]) for answer in alone[1::2]}) == USERS, "answers name their users"
    assert all(answer["meta_embedding"]["status"] == "hit" for answer in alone)
    with ThreadPoolExecutor(USERS) as pool:
        for _ in range(2):
            order = random.sample(range(len(bodies)), len(bodies))
            for k, answer in zip(order, pool.map(lambda k: ask(client, bodies[k]), order), strict=True):
                assert_same(answer, alone[k])


def test_a_cancel_storm_mixes_nothing_and_ends_at_rest(shared: Any, ranker: Ranker) -> None:
    """Clients leave at random times, while every reply of Redis takes up to 0.1 s."""
    client, running, port = shared
    ids = list(ranker.vocabulary.items)
    bodies = [body_of(user, ids, stored=True) for user in range(USERS)]
    alone = [ask(client, body) for body in bodies]
    requests = [as_bytes(body) for body in bodies]
    at_rest = running.proxy.open
    chance = random.Random(7)
    running.proxy.delay = lambda: chance.choice((0.0, 0.03, 0.1))
    place = (client.base_url.host, client.base_url.port)
    over = time.monotonic() + 3
    left = []

    def storm() -> None:
        rng = random.Random(threading.get_ident())
        while time.monotonic() < over:
            with socket.create_connection(place) as connection:
                connection.sendall(rng.choice(requests))
                time.sleep(rng.choice((0, 0.001, 0.01, 0.05, 0.12)))
            left.append(1)

    def compare(first: int) -> int:
        count = 0
        while time.monotonic() < over:
            user = (first + count * 7) % USERS
            assert_same(ask(client, bodies[user]), alone[user])
            count += 1
        return count

    threads = [threading.Thread(target=storm) for _ in range(16)]
    for thread in threads:
        thread.start()
    with ThreadPoolExecutor(8) as pool:
        compared = sum(pool.map(compare, range(8)))
    for thread in threads:
        thread.join()
    assert len(left) > 200 and compared > 50
    running.proxy.delay = 0.0
    for gauge in GAUGES:
        wait_for(client, gauge, 0)
    assert sums(client, "slatewise_client_disconnects_total")[0] > 0
    for body, expected in zip(bodies, alone, strict=True):
        assert_same(ask(client, body), expected)
    assert running.proxy.open <= at_rest + 8, "connections to Redis are not lost"
    with connect(f"redis://127.0.0.1:{port}/0") as redis:
        assert redis.info("clients")["connected_clients"] <= running.proxy.open + 1


def as_bytes(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content
