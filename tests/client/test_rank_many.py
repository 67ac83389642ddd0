"""`rank_many`: frames of every kind keep their rows, each slate is one request, and few are in flight."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

from slatewise import AsyncClient, Client
from slatewise.client.errors import Invalid, NotFound
from slatewise.client.frames import Slates, groups
from slatewise.client.results import Ranking

AT = {"request_time": 1.2e9}
ROWS = [
    {"user": "b", "item_id": 595, "popularity": 2.0},
    {"user": "small:99", "item_id": 1, "popularity": None},
    {"user": "b", "item_id": 589, "popularity": 3.0},
    {"user": "b", "item_id": 595, "popularity": 2.0},
    {"user": "small:99", "item_id": 2028, "popularity": 1.0},
]
EVENTS = {"user": ["b", "x", "b"], "item_id": [318, 1, 500], "action": ["love", "like", "like"]}
KINDS: list[Callable[[Any], Any]] = [pd.DataFrame, lambda rows: pl.DataFrame(rows), list]


@pytest.fixture
def client(demo_url: str) -> Iterator[Client]:
    with Client(demo_url, timeout=30) as client:
        yield client


def columns(frame: Any) -> dict[str, list[Any]]:
    if isinstance(frame, list):
        return {name: [row[name] for row in frame] for name in frame[0]}
    return {name: frame[name].to_list() for name in frame.columns}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_single_calls(client: Client, kind: Callable[[Any], Any]) -> None:
    frame = kind(ROWS)
    ranked = client.rank_many(frame, histories=pd.DataFrame(EVENTS), **AT)
    assert type(ranked) is type(frame)
    found = columns(ranked)
    assert found["item_id"] == [row["item_id"] for row in ROWS] and found["user"] == [row["user"] for row in ROWS]
    for user, history in (("b", [(318, "love"), (500, "like")]), ("small:99", None)):
        rows = [k for k, row in enumerate(ROWS) if row["user"] == user]
        items = [ROWS[k]["item_id"] for k in rows]
        candidates = {"item_ids": items, "features": {"popularity": [ROWS[k]["popularity"] for k in rows]}}
        alone = client.score(user=user, history=history, candidates=candidates, **AT)
        assert [found["score"][k] for k in rows] == alone.scores
        assert [found["rank"][k] for k in rows] == alone.ranks


def test_index_and_input_of_pandas_are_kept(client: Client) -> None:
    frame = pd.DataFrame(ROWS, index=[9, 7, 7, 5, 3])
    before = frame.copy()
    ranked = client.rank_many(frame, **AT)
    assert ranked.index.tolist() == [9, 7, 7, 5, 3] and [*ranked.columns] == [*frame.columns, "score", "rank"]
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize("frame", [pd.DataFrame(ROWS)[:0], pl.DataFrame(ROWS)[:0], []])
def test_an_empty_frame_stays_empty(client: Client, frame: Any) -> None:
    ranked = client.rank_many(frame)
    assert len(ranked) == 0 and type(ranked) is type(frame)
    if not isinstance(frame, list):
        assert [*ranked.columns][-2:] == ["score", "rank"]


def test_async_client_gives_the_same(client: Client, demo_url: str) -> None:
    async def ask() -> Any:
        async with AsyncClient(demo_url, timeout=30) as client:
            return await client.rank_many(pl.DataFrame(ROWS), concurrency=3, **AT)

    assert asyncio.run(ask()).equals(client.rank_many(pl.DataFrame(ROWS), **AT))


def test_columns_may_have_other_names(client: Client) -> None:
    frame = pl.DataFrame(ROWS).rename({"user": "who", "item_id": "film"})
    ranked = client.rank_many(frame, user="who", item_id="film", **AT)
    assert ranked["score"].equals(client.rank_many(pl.DataFrame(ROWS), **AT)["score"])


@pytest.mark.parametrize(
    ("frame", "more", "pointer"),
    [
        (pd.DataFrame({"user": ["a"]}), {}, "/item_id"),
        (pd.DataFrame({"item_id": ["a"]}), {}, "/user"),
        (pd.DataFrame({"user": ["a", None], "item_id": [1, 2]}), {}, "/user/1"),
        (pl.DataFrame(ROWS).with_columns(score=1), {}, "/score"),
        ([{"user": "a"}, 5], {}, "/1"),
        ("frame", {}, ""),
        ({"user": ["a"]}, {}, ""),
        (pl.DataFrame(ROWS), {"histories": [1]}, "/histories"),
        (pl.DataFrame(ROWS), {"histories": pd.DataFrame({"item_id": [1]})}, "/histories/user"),
        (pl.DataFrame(ROWS).with_columns(unheard=1), {}, "/candidates/features/unheard"),
    ],
)
def test_wrong_frames_are_refused(client: Client, frame: Any, more: dict[str, Any], pointer: str) -> None:
    with pytest.raises(Invalid) as caught:
        client.rank_many(frame, **more)
    assert caught.value.faults[0].pointer == pointer


def ranking_of(members: dict[str, Any]) -> Ranking:
    items = members["candidates"]["item_ids"]
    results = {"index": [*range(len(items))], "item_ids": items, "scores": None, "heads": {}}
    return Ranking.from_response({"results": results, "ranker": "r", "version": 1, "exit": "input_order"})


def test_few_requests_are_in_flight() -> None:
    lock = threading.Lock()
    now = most = 0

    def rerank(**members: Any) -> Ranking:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1
        return ranking_of(members)

    slates = Slates(pl.DataFrame({"user": [*range(30)], "item_id": [1] * 30}), "user", "item_id")
    slates.rank_all(rerank, {}, 3)
    assert most == 3
    assert slates.result()["score"].null_count() == 30 and set(slates.result()["rank"]) == {1}


def test_the_first_error_ends_it(client: Client) -> None:
    calls = []

    def rerank(**members: Any) -> Ranking:
        calls.append(members)
        raise NotFound("no such ranker")

    slates = Slates(pl.DataFrame({"user": [*range(1000)], "item_id": [1] * 1000}), "user", "item_id")
    with pytest.raises(NotFound):
        slates.rank_all(rerank, {}, 2)
    assert len(calls) <= 2
    with pytest.raises(ValueError, match="concurrency"):
        client.rank_many(pl.DataFrame(ROWS), concurrency=0)


def test_no_cheaper_answer_is_accepted_by_default() -> None:
    seen = []

    def rerank(**members: Any) -> Ranking:
        seen.append(members["allow_degraded"])
        return ranking_of(members)

    for options in ({}, {"allow_degraded": True}):
        Slates(ROWS, "user", "item_id").rank_all(rerank, options, 1)
    assert seen == [False, False, True, True]


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_those_of_a_dictionary(seed: int) -> None:
    """The slow reference; an integer and its text are one user."""
    rng = np.random.default_rng(seed)
    users = [k if rng.random() < 0.5 else str(k) for k in rng.integers(0, 12, rng.integers(1, 60)).tolist()]
    expected: dict[str, list[int]] = {}
    for row, user in enumerate(users):
        expected.setdefault(str(user), []).append(row)
    assert [(str(user), rows.tolist()) for user, rows in groups(users)] == [*expected.items()]
    assert [*groups([])] == []
