"""Unreadable values in Redis, of vectors and of histories: requests are answered, and other users are not affected."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import redis

from slatewise.bundle.ranker import Ranker
from slatewise.events.redis_histories import history_key
from slatewise.settings import Settings
from slatewise.store.codec import HEADER, pack, user_key
from tests.conftest import Tiny
from tests.http.support import ask, sums
from tests.http.test_crowd import push_vectors
from tests.support.application import serve

BODY = {"candidates": {"item_ids": ["1", "2", "3"]}, "request_time": 1_700_000_000}


@pytest.fixture(scope="module")
def poisoned(tiny: Tiny, redis_port: int) -> Iterator[httpx.Client]:
    settings = Settings(
        bundles=tiny.root,
        redis_url=f"redis://127.0.0.1:{redis_port}/0",  # type: ignore[arg-type]
        redis_timeout_ms=20_000,
        embedding_cache_s=0,
    )
    with serve(settings) as client:
        yield client


def values(size: int) -> dict[str, bytes]:
    """Values of generation 1 that are wrong in one way each."""
    right = pack(np.ones(size, np.float32), 1, 1.0)
    head, numbers = HEADER.pack(b"SLWM", 0, size, 1.0, 1, 0), struct.pack("<f", float("nan")) * size
    nan = head[:-4] + struct.pack("<I", zlib.crc32(head + numbers)) + numbers
    return {
        "empty": b"",
        "another magic number": b"XXXX" + right[4:],
        "another dtype": right[:4] + b"\x09" + right[5:],
        "another checksum": right[:-1] + bytes([right[-1] ^ 1]),
        "cut": right[:-3],
        "NaN": nan,
        "another size": pack(np.ones(size + 1, np.float32), 1, 1.0),
        "another generation": pack(np.ones(size, np.float32), 2, 1.0),
        "1 MB": bytes(1_000_000),
    }


def test_unreadable_vectors_are_counted_and_ignored(poisoned: httpx.Client, ranker: Ranker, redis_port: int) -> None:
    names = (
        'slatewise_embedding_lookups_total{result="corrupt"',
        'slatewise_embedding_lookups_total{result="mismatched"',
    )
    with redis.Redis(port=redis_port) as client:
        client.flushall()
        push_vectors(redis_port, ranker)
        wait_for_hit(poisoned)
        right = ask(poisoned, BODY | {"user": "crowd-2"})["results"]
        key = user_key(ranker.name, ranker.manifest.space, "crowd-1")
        for name, value in values(ranker.manifest.meta_size).items():
            client.hset(key, "1", value)
            before = sum(sums(poisoned, *names))
            answer = ask(poisoned, BODY | {"user": "crowd-1"})
            assert answer["meta_embedding"]["status"] == "default" and len(answer["results"]["scores"]) == 3, name
            assert sum(sums(poisoned, *names)) == before + 1, name
            assert ask(poisoned, BODY | {"user": "crowd-2"})["results"] == right, name
        client.delete(key)
        client.set(key, "a text")
        assert ask(poisoned, BODY | {"user": "crowd-1"})["meta_embedding"]["status"] == "default"
        assert ask(poisoned, BODY | {"user": "crowd-2"})["results"] == right


def wait_for_hit(client: httpx.Client) -> None:
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        if ask(client, BODY | {"user": "crowd-2"})["meta_embedding"]["status"] == "hit":
            return
        time.sleep(0.05)
    raise AssertionError("the vectors were not found")


def test_unreadable_histories_are_counted_and_ignored(poisoned: httpx.Client, redis_port: int) -> None:
    with redis.Redis(port=redis_port) as client:
        for user in ("h-1", "h-2"):
            assert poisoned.post("/events", json={"user": user, "item_id": "1"}).status_code == 202
        right = ask(poisoned, BODY | {"user": "h-2"})
        assert right["history"]["used"] == 1
        key = history_key("h-1")
        good = client.get(key)
        assert isinstance(good, bytes)
        for value in (b"", b"\xff" * 40, good[:-1], good + b"x", b"XXXX" + good[4:], bytes(1_000_000)):
            client.set(key, value)
            before = sums(poisoned, 'slatewise_history_reads_total{result="corrupt"')
            answer = ask(poisoned, BODY | {"user": "h-1"})
            assert answer["history"]["used"] == 0 and len(answer["results"]["scores"]) == 3, value[:10]
            assert sums(poisoned, 'slatewise_history_reads_total{result="corrupt"') == [before[0] + 1], value[:10]
            assert ask(poisoned, BODY | {"user": "h-2"})["results"] == right["results"]
        client.delete(key)
        client.rpush(key, "a list")
        assert ask(poisoned, BODY | {"user": "h-1"})["history"]["used"] == 0
