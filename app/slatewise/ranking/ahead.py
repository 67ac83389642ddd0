"""Encodes histories ahead of a rank request: `POST /encode`, and after events of users.

The state goes to the history cache and the vector to its cache, as if the user had been ranked.
Called by: `http/events.py`; `main.py` opens `AheadOfRequests`. Calls: `pipeline.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from typing import Any

from slatewise.errors import DeadlineExceeded, RankingError
from slatewise.inference.engine import EngineError
from slatewise.ranking.pipeline import Pipeline
from slatewise.ranking.trace import Timings
from slatewise.schemas import Candidates, DegradedReason, EncodedHistory, EncodeRequest, EncodeResponse, RankRequest

log = logging.getLogger("slatewise")

MOST_WAITING = 64  # users whose events trigger an encoding; of more users, the first requests encode
LAST = 100  # priority after all rank requests


async def encode_ahead(pipeline: Pipeline, body: EncodeRequest, priority: int = 0) -> EncodeResponse:
    """Encode a history into the cache. Raises NotFound, Invalid, OverloadedUndegraded, DeadlineExceeded, RankingError.

    It is planned as a rank request that ends before its candidates.
    """
    timings = Timings(time.perf_counter())
    ranker = pipeline.registry.choose(body.ranker, body.user, None)
    members: dict[str, Any] = {"history": body.history} if "history" in body.model_fields_set else {}
    request = RankRequest(
        user=body.user,
        variant=body.variant,
        candidates=Candidates(item_ids=["0"]),
        allow_degraded=False,
        priority=priority,
        **members,
    )
    given = await pipeline.with_history(request, ranker, timings)
    plan = pipeline.plan(given, ranker, timings)
    look_up = pipeline.begin_look_up(plan)
    history = ranker.history(given.request)
    reuse = pipeline.find_cached(plan, history)
    pipeline.admission.begin_work(plan.running)
    try:
        async with plan.deadline.timeout():
            await pipeline.encode(plan, history, reuse, timings)
            if look_up is not None:
                await look_up
    except TimeoutError:
        raise DeadlineExceeded(f"not done within {plan.deadline.milliseconds:g} ms") from None
    except EngineError as error:
        raise RankingError("the model failed on this request") from error
    finally:
        pipeline.admission.end_work(plan.running)
    use = EncodedHistory(used=len(history), dropped=plan.dropped, cache=reuse.result, source=given.source)
    faults: list[DegradedReason] = ["store_error"] if given.fault else []
    version = ranker.manifest.version
    return EncodeResponse(ranker=ranker.name, version=version, variant=plan.variant, history=use, degraded=faults)


class AheadOfRequests:
    """Encodes the stored histories of users after their events, one at a time, with the default variants."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.users: dict[str, None] = {}  # in the order of their events
        self.arrived = asyncio.Event()

    async def __aenter__(self) -> AheadOfRequests:
        self.task = asyncio.create_task(self.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    def add(self, users: Iterable[str]) -> None:
        for user in users:
            if len(self.users) < MOST_WAITING:
                self.users[user] = None
        self.arrived.set()

    async def run(self) -> None:
        while True:
            await self.arrived.wait()
            self.arrived.clear()
            while self.users:
                user = next(iter(self.users))
                del self.users[user]
                for ranker in self.pipeline.registry.serving():
                    try:
                        await encode_ahead(self.pipeline, EncodeRequest(user=user, ranker=ranker.name), LAST)
                    except RankingError as error:  # overload: the next request of the user encodes
                        log.debug("encoding ahead: %s", error)
                    except Exception as error:  # a defect costs this user's encoding, and not those after it
                        log.error("encoding ahead", exc_info=error)
