"""Pipelines and requests for the tests of this folder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pytest

from slatewise.bundle.ranker import Ranker
from slatewise.inference.arrays import Candidates, Float64
from slatewise.inference.workers import Workers
from slatewise.ranking.admission import Admission, RequestLimits
from slatewise.ranking.history_cache import HistoryCache
from slatewise.ranking.load import Running
from slatewise.ranking.pipeline import Pipeline, Ranking
from slatewise.ranking.registry import Registry
from slatewise.ranking.trace import Trace
from slatewise.schemas import RankRequest
from slatewise.store.lookup import EmbeddedStore, Store
from tests.support.blocked_engine import BlockedMethod

BOUND = 1e-5
ACTIONS = ["love", "like", "view", "dislike", "hate", "something else", None]
T = TypeVar("T")


def request_limits(**changes: Any) -> RequestLimits:
    """Limits that no test reaches, except for the given ones."""
    values: dict[str, Any] = {
        "max_in_flight": 1_000,
        "max_queue_s": 1e6,
        "max_body_bytes": 10**6,
        "body_timeout_s": 60.0,
        "max_values": 10**6,
        "max_candidates": 3_000,
        "max_history": 1_000,
        "deadline_ms": 0.0,
    }
    return RequestLimits(**(values | changes))


def run(
    ranker: Ranker,
    work: Callable[[Pipeline], Awaitable[T]],
    *,
    threads: int = 2,
    cache_bytes: int = 50_000_000,
    pack_history: bool = False,
    store: Store | None = None,
    **limits: Any,
) -> T:
    """`work` on a new pipeline with its own event loop and threads."""

    async def main() -> T:
        async with Workers(threads) as workers:
            pipeline = Pipeline(
                Registry([ranker]),
                store or EmbeddedStore(),
                HistoryCache(cache_bytes),
                workers,
                Admission(request_limits(**limits), threads),
                pack_history=pack_history,
            )
            return await work(pipeline)

    return asyncio.run(main())


def draw_request(ranker: Ranker, events: int, candidates: int, seed: int, **more: Any) -> RankRequest:
    rng = np.random.default_rng(seed)
    ids = [*ranker.vocabulary.items, "no-such-item"]
    return RankRequest.model_validate(
        {
            "history": {
                "item_ids": [ids[k] for k in rng.integers(0, len(ids), events)],
                "actions": [ACTIONS[k] for k in rng.integers(0, len(ACTIONS), events)],
                "timestamps": [
                    None if k % 11 == 10 else int(t) for k, t in enumerate(np.cumsum(rng.integers(0, 10_000, events)))
                ],
            },
            "candidates": {
                "item_ids": [ids[k] for k in rng.integers(0, len(ids), candidates)],
                "features": {
                    "popularity": [
                        None if k % 7 == 6 else float(v) for k, v in enumerate(rng.uniform(0, 3, candidates))
                    ]
                },
            },
            "request_time": 978_300_000,
            **more,
        }
    )


def cut(request: RankRequest, events: int) -> RankRequest:
    """The same request with only the first events of its history."""
    history = request.history.model_copy(
        update={k: getattr(request.history, k)[:events] for k in ("item_ids", "actions", "timestamps")}
    )
    return request.model_copy(update={"history": history})


def reference(ranker: Ranker, request: RankRequest, exit: str) -> Float64:
    """(N, heads) probabilities by `Engine.score`, without cache and chunks, and slate by slate."""
    history = ranker.history(request)
    candidates, _ = ranker.candidates(request, request.request_time or 0)
    engine, meta = ranker.engines["fp32"], ranker.embedded_meta_of(request.user)
    if exit != "set" or len(candidates) <= engine.slate:
        return engine.score(history, candidates, meta, exit)
    point = engine.score(history, candidates, meta, "point").tolist()
    best_first = sorted(range(len(point)), key=lambda k: -sum(point[k]))
    slates = -(-len(point) // (engine.slate // 2))
    found = np.empty((len(point), len(ranker.manifest.heads)))
    for first in range(slates):
        rows = best_first[first::slates]
        slate = Candidates(candidates.vectors[rows], candidates.numeric[rows], candidates.context)
        found[rows] = engine.score(history, slate, meta, "set")
    return found


async def rank(pipeline: Pipeline, request: RankRequest) -> Ranking:
    return (await traced_rank(pipeline, request))[0]


async def traced_rank(pipeline: Pipeline, request: RankRequest) -> tuple[Ranking, Trace]:
    trace = Trace(time.perf_counter())
    return await pipeline.rank(request, trace), trace


def worst(ranking: Ranking, expected: Float64) -> float:
    """Largest difference of a probability."""
    assert ranking.scored is not None
    return float(np.abs(ranking.scored.probabilities - expected).max())


@contextmanager
def working(admission: Admission, requests: int, seconds: float = 1_000.0) -> Iterator[None]:
    """Act as if so many other requests with so much work were running."""
    others = {Running(seconds, None) for _ in range(requests)}
    admission.load.running |= others
    try:
        yield
    finally:
        admission.load.running -= others


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the condition changes in other threads
            await asyncio.sleep(0.001)


async def cancel_in_chunk(pipeline: Pipeline, request: RankRequest, stop: BlockedMethod) -> None:
    """Cancel a request in the first chunk that calls the blocked method, then let the chunk end."""
    task = asyncio.create_task(rank(pipeline, request))
    await until(stop.begun.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not pipeline.admission.load.running
    stop.may_end.set()
    await until(lambda: not pipeline.workers.busy and not pipeline.workers.queue)
