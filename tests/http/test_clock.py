"""The clock of the machine jumps by an hour: deadlines hold, and no age is negative."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from slatewise.bundle.ranker import Ranker
from slatewise.settings import Settings
from slatewise.store.client import connect
from tests.conftest import Tiny
from tests.http.support import ask
from tests.http.test_crowd import push_vectors
from tests.support.application import serve

HOUR = 3_600.0
REAL_TIME = time.time


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_a_jump_of_the_clock_misses_no_deadline(
    tiny: Tiny, ranker: Ranker, redis_port: int, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    with connect(f"redis://127.0.0.1:{redis_port}/0") as redis:
        redis.flushall()
    push_vectors(redis_port, ranker)
    settings = Settings(
        bundles=tiny.root,
        redis_url=f"redis://127.0.0.1:{redis_port}/0",  # type: ignore[arg-type]
        redis_timeout_ms=5_000,
        embedding_cache_s=1_000,
        stored_history_days=1,
    )
    with serve(settings) as client:
        body = {"user": "crowd-1", "candidates": {"item_ids": ["1", "2"]}, "request_time": 1_700_000_000}
        body |= {"deadline_ms": 60_000, "allow_degraded": False}
        before = ask(client, body)
        store(client, "before", REAL_TIME())
        monkeypatch.setattr(time, "time", lambda: REAL_TIME() + jump)
        for user in ("crowd-1", "crowd-2"):  # one vector from the cache and one from Redis
            answer = ask(client, body | {"user": user})
            assert answer["degraded"] == [] and answer["meta_embedding"]["status"] == "hit"
            assert answer["meta_embedding"]["age_seconds"] >= 0
            assert all(0 <= ms < 60_000 for ms in answer["timings_ms"].values())
        store(client, "after", REAL_TIME())  # by a client whose clock is right
        assert ask(client, body)["results"] == before["results"]
        stored = ask(client, {"user": "kept", "candidates": {"item_ids": ["1"]}})["history"]
        assert stored["source"] == "stored" and stored["used"] == 2 and stored["reordered"] == 0
        for name, value in ages(client).items():
            assert value >= 0, name


def store(client: httpx.Client, event_id: str, at: float) -> None:
    event: dict[str, Any] = {"user": "kept", "item_id": "1", "event_id": event_id, "timestamp": at}
    answer = client.post("/events", json=event)
    assert answer.status_code == 202 and answer.json()["accepted"] == 1, answer.text


def ages(client: httpx.Client) -> dict[str, float]:
    """All metrics of ages and durations."""
    lines = (line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines if "seconds" in name and "created" not in name}
