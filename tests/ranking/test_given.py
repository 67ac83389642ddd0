"""The history of a request: its own or the stored one; encoding ahead; what a deletion removes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any

import pytest

from slatewise.bundle.ranker import Ranker
from slatewise.events.histories import EmbeddedHistories, Stored
from slatewise.ranking import ahead
from slatewise.ranking.ahead import AheadOfRequests, encode_ahead
from slatewise.ranking.pipeline import Pipeline, Ranking
from slatewise.ranking.trace import Trace
from slatewise.schemas import EncodeRequest, RankRequest
from tests.events.support import NOW, event, pairs
from tests.ranking.support import run


class CountedHistories(EmbeddedHistories):
    """Embedded histories that record their reads, and hang or fail if told to."""

    def __init__(self) -> None:
        super().__init__(1_000, 0.0, 10**7)
        self.reads: list[tuple[str, int]] = []
        self.hangs = False
        self.fails = False

    def read(self, user: str, most: int) -> Awaitable[Stored]:
        self.reads.append((user, most))
        future: asyncio.Future[Stored] = asyncio.get_running_loop().create_future()
        if self.fails:
            future.set_result(Stored(None, fault=True))
        return future if self.hangs or self.fails else super().read(user, most)


async def prepared(pipeline: Pipeline, ranker: Ranker, events: int = 5) -> CountedHistories:
    """Histories with events of the user "u", in the pipeline."""
    histories = pipeline.histories = CountedHistories()
    items = list(ranker.vocabulary.items)
    await histories.write(pairs([event(items[k % len(items)], NOW + 60 * k) for k in range(events)]))
    return histories


async def rank(pipeline: Pipeline, ranker: Ranker, **members: Any) -> Ranking:
    ids = list(ranker.vocabulary.items)[:5]
    request = RankRequest.model_validate({"candidates": {"item_ids": ids}, "request_time": NOW} | members)
    return await pipeline.rank(request, Trace(time.perf_counter()))


def test_only_a_user_without_a_history_is_read(ranker: Ranker) -> None:
    async def work(pipeline: Pipeline) -> None:
        histories = await prepared(pipeline, ranker)
        for members, source, used in (
            ({}, "none", 0),
            ({"history": {"item_ids": ["1"]}}, "request", 1),
            ({"user": "u", "history": {"item_ids": ["1"]}}, "request", 1),
            ({"user": "u", "history": {}}, "request", 0),
        ):
            ranking = await rank(pipeline, ranker, **members)
            assert (ranking.history.source, ranking.history.used) == (source, used)
        assert histories.reads == []
        ranking = await rank(pipeline, ranker, user="u")
        assert (ranking.history.source, ranking.history.used, len(ranking.degraded)) == ("stored", 5, 0)
        assert (await rank(pipeline, ranker, user="v")).history.source == "none"
        assert histories.reads == [(user, ranker.manifest.limits.history_used) for user in "uv"]

    run(ranker, work)


def test_a_pipeline_without_histories_reads_none(ranker: Ranker) -> None:
    async def work(pipeline: Pipeline) -> None:
        ranking = await rank(pipeline, ranker, user="u")
        assert (ranking.history.source, ranking.degraded) == ("none", frozenset())

    run(ranker, work)


def test_a_stored_history_is_within_the_limit_of_requests(ranker: Ranker) -> None:
    """Otherwise a long stored history would be refused as a request with so many events is."""

    async def work(pipeline: Pipeline) -> None:
        await prepared(pipeline, ranker, 50)
        ranking = await rank(pipeline, ranker, user="u")
        assert ranking.history.source == "stored" and 0 < ranking.history.used <= 7

    run(ranker, work, max_history=7)


def test_a_fault_is_told_and_costs_the_history_alone(ranker: Ranker) -> None:
    async def work(pipeline: Pipeline) -> None:
        histories = await prepared(pipeline, ranker)
        histories.fails = True
        ranking = await rank(pipeline, ranker, user="u")
        assert (ranking.history.source, ranking.history.used) == ("none", 0)
        assert ranking.degraded == {"store_error"} and ranking.scored is not None

    run(ranker, work)


def test_a_deadline_ends_the_wait_for_a_history(ranker: Ranker) -> None:
    async def work(pipeline: Pipeline) -> None:
        histories = await prepared(pipeline, ranker)
        histories.hangs = True
        begin = time.perf_counter()
        ranking = await rank(pipeline, ranker, user="u", deadline_ms=30)
        assert time.perf_counter() - begin < 5
        assert "deadline" in ranking.degraded and "store_error" not in ranking.degraded
        assert ranking.history.source == "none"

    run(ranker, work)


# Encoding ahead


def test_users_that_wait_for_an_encoding_are_bounded(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []

    async def recorded(pipeline: Pipeline, body: EncodeRequest, priority: int = 0) -> None:
        encoded.append(body.user)

    monkeypatch.setattr(ahead, "encode_ahead", recorded)

    async def work(pipeline: Pipeline) -> None:
        async with AheadOfRequests(pipeline) as waiting:
            waiting.add(f"u{k}" for k in range(1_000))
            waiting.add(["u0"])
            async with asyncio.timeout(10):
                while waiting.users:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

    run(ranker, work)
    assert encoded == [f"u{k}" for k in range(ahead.MOST_WAITING)]


def test_a_defect_costs_the_encoding_of_one_user(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []

    async def broken(pipeline: Pipeline, body: EncodeRequest, priority: int = 0) -> None:
        if body.user == "u0":
            raise ValueError("a defect")
        encoded.append(body.user)

    monkeypatch.setattr(ahead, "encode_ahead", broken)

    async def work(pipeline: Pipeline) -> None:
        async with AheadOfRequests(pipeline) as waiting:
            waiting.add(["u0", "u1"])
            async with asyncio.timeout(10):
                while waiting.users and not waiting.task.done():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

    run(ranker, work)
    assert encoded == ["u1"]


# Deletion


def test_a_state_that_is_encoded_during_a_deletion_is_not_kept(ranker: Ranker) -> None:
    async def work(pipeline: Pipeline) -> None:
        await prepared(pipeline, ranker)
        body = EncodeRequest(user="u")
        assert (await encode_ahead(pipeline, body)).history.cache == "miss"
        assert (await encode_ahead(pipeline, body)).history.cache == "hit"
        pipeline.forget("other")
        assert (await encode_ahead(pipeline, body)).history.cache == "hit"
        pipeline.forget("u")
        assert pipeline.cache.nbytes == 0
        during = asyncio.ensure_future(encode_ahead(pipeline, body))
        while not pipeline.cache.encoding:  # noqa: ASYNC110
            await asyncio.sleep(0)
        pipeline.forget("u")
        await during
        assert pipeline.cache.nbytes == 0
        await encode_ahead(pipeline, body)
        pipeline.forget(None)
        assert (pipeline.cache.nbytes, len(pipeline.cache.entries)) == (0, 0)

    run(ranker, work)
