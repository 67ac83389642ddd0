"""The number of series is bounded: 100,000 users, 100,000 items and many bad requests of each kind add no series."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from prometheus_client import REGISTRY

from slatewise.bundle.ranker import Ranker
from slatewise.store.lookup import EmbeddedStore

USERS = 100_000
ITEMS = 100_000
A_REQUEST = 2_000
BAD = 150


def series() -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for metric in REGISTRY.collect()
        for sample in metric.samples
    }


def ask(client: httpx.Client, example: dict[str, Any], first: int) -> None:
    """One request with new items, a new user and a new id, and one bad request of each kind with new names."""
    items = [f"item-{k}" for k in range(first, first + A_REQUEST)]
    body = example | {"id": f"r-{first}", "user": f"user-{first}", "candidates": {"item_ids": items}}
    assert client.post("/rerank", json=body | {"exit": "dot"}).status_code == 200
    bad(client, example, first)


def bad(client: httpx.Client, example: dict[str, Any], k: int) -> None:
    assert client.post("/rerank", json=example | {"ranker": f"ranker-{k}"}).status_code == 404
    assert client.post("/score", json=example | {"variant": f"variant-{k}"}).status_code == 404
    assert client.post("/rerank", json=example | {"exit": f"exit-{k}"}).status_code == 422
    assert client.post("/rerank", json=example | {f"member-{k}": k}).status_code == 422
    assert client.post("/rerank", json=example | {"head_weights": {f"head-{k}": 1.0}}).status_code == 422
    assert client.post(f"/rerank-{k}", json=example).status_code == 404
    assert client.get(f"/models/ranker-{k}").status_code == 404
    assert (
        client.post("/rerank", content=b"{" * (k % 7 + 1), headers={"Content-Type": "application/json"}).status_code
        == 400
    )
    assert client.post("/rerank", content=b"{}", headers={"Content-Type": f"text/kind-{k}"}).status_code == 415
    assert client.post("/rerank", json=example, headers={"Content-Encoding": f"coding-{k}"}).status_code == 415
    assert client.patch(f"/models/ranker-{k}").status_code == 405


def test_users_items_and_bad_requests_add_no_metric_series(
    client: httpx.Client, example: dict[str, Any], ranker: Ranker
) -> None:
    async def look_up(first: int, last: int) -> None:
        store = EmbeddedStore()
        for k in range(first, last):
            await store.look_up(ranker, f"user-{k}")

    ask(client, example, 0)  # each kind once, which creates all series
    asyncio.run(look_up(0, 10))
    before = series()
    for first in range(A_REQUEST, ITEMS, A_REQUEST):
        ask(client, example, first)
    for k in range(BAD):
        bad(client, example, k)
    asyncio.run(look_up(10, USERS))
    assert series() == before
    assert len(before) < 3_000
    assert not [labels for _, labels in before if any("user-" in value or "item-" in value for _, value in labels)]
