"""/rerank and /score: read, parse, rank, respond.

Called by: the hot-route table of `app.py`. Calls: `body.py`, the pipeline, `problems.py`, `request_log.py`, and
`capture.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

import numpy as np
import pydantic_core
from fastapi import Request, Response
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from slatewise import metrics
from slatewise.errors import Invalid, NotReady, RankingError
from slatewise.http.body import content_coding, content_length, read_body
from slatewise.http.health import ready_pipeline
from slatewise.http.problems import header_request_id, problem, schema_error, unexpected
from slatewise.http.request_log import Outcome
from slatewise.ranking.admission import Admission
from slatewise.ranking.pipeline import Ranking
from slatewise.ranking.trace import Timings, Trace
from slatewise.schemas import RankRequest, RankResponse

CLIENT_GONE = 499  # the client disconnected; used in the metrics only

T = TypeVar("T")


async def rerank(request: Request, entered: float) -> Response:
    """The candidates by descending score, cut to `top_n`."""
    return await answer(request, entered, by_score=True)


async def score(request: Request, entered: float) -> Response:
    """The same as /rerank, with the results in input order; `top_n` is ignored."""
    return await answer(request, entered, by_score=False)


async def answer(request: Request, entered: float, *, by_score: bool) -> Response:
    """The response, for every outcome. Each request is counted and logged once, when it ends.

    entered: time.perf_counter() when the request entered the application; the deadline counts from there.
    """
    try:
        pipeline = ready_pipeline(request.app)
    except NotReady as error:
        return problem(error, header_request_id(request.headers))
    trace = Trace(entered)
    parsed: RankRequest | None = None
    ranking: Ranking | None = None
    code = 500
    refusal = "internal-error"

    def request_id() -> str | None:
        return (None if parsed is None else parsed.id) or header_request_id(request.headers)

    try:
        pipeline.admission.enter()
        body = await read_admitted(request, pipeline.admission)
        parsed = parse(body, request.headers)
        trace.timings.lap("parse")
        ranking = await while_connected(request, pipeline.rank(parsed, trace))
        response = render(parsed, ranking, by_score, trace.timings)
        trace.timings.lap("serialize")
        code = 200
        refusal = ""
        return response
    except RankingError as error:
        code = error.status
        refusal = error.slug
        return problem(error, request_id())
    except ClientDisconnect:
        code = CLIENT_GONE
        refusal = "client-gone"
        metrics.DISCONNECTS.inc()
        return Response(status_code=CLIENT_GONE)  # not sent: the connection is closed
    except Exception as error:
        return problem(unexpected(error), request_id())
    finally:
        pipeline.admission.leave()
        seconds = time.perf_counter() - entered
        labels = count(request.scope["path"], code, seconds, trace)
        degraded: tuple[str, ...] = ()
        if code == 200 and parsed is not None and ranking is not None:
            degraded = tuple(sorted(ranking.degraded))
            count_ranking(parsed, ranking, seconds)
            if request.app.state.capture is not None:
                request.app.state.capture.record(parsed)
        candidates = None if parsed is None else len(parsed.candidates.item_ids)
        outcome = Outcome(labels, refusal, degraded, seconds)
        request.app.state.request_log.record(outcome, trace, candidates, request_id)


async def read_admitted(request: Request, admission: Admission) -> bytes:
    """The body. Raises the errors of `body.py`, and TooLarge by the Content-Length alone."""
    limits = admission.limits
    coding = content_coding(request.headers)
    admission.check_content_length(content_length(request.headers))
    return await read_body(request, coding, limits.max_body_bytes, limits.body_timeout_s)


def parse(body: bytes, headers: Headers) -> RankRequest:
    """The request; user and id may also come from the headers. Raises NotJson or Invalid."""
    try:
        parsed = RankRequest.model_validate_json(body)
    except ValidationError as error:
        raise schema_error(error) from None
    changes: dict[str, Any] = {}
    user = header_text(headers, "x-user-id")
    identifier = header_text(headers, "x-request-id")
    if user is not None:
        if parsed.user is not None and parsed.user != user:
            raise Invalid.at("/user", "differs from the header X-User-ID")
        changes["user"] = user
    if parsed.id is None and identifier is not None:
        changes["id"] = identifier
    if changes:
        try:
            RankRequest.model_validate({"candidates": {"item_ids": ["0"]}, **changes})
        except ValidationError as error:
            raise schema_error(error) from None
        parsed = parsed.model_copy(update=changes)
    return parsed


def header_text(headers: Headers, name: str) -> str | None:
    """A header decoded as UTF-8; Starlette decodes Latin-1. Raises Invalid."""
    value = headers.get(name)
    try:
        return None if value is None else value.encode("latin-1").decode()
    except UnicodeDecodeError:
        raise Invalid.at("", f"the header {name} is not UTF-8") from None


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`. Cancels it and raises ClientDisconnect if the client disconnects first."""
    task = asyncio.current_task()
    gone = False
    assert task is not None
    listener = asyncio.ensure_future(request.receive())  # after the body, the next message is the disconnect

    def leave(_: object) -> None:
        nonlocal gone
        gone = True
        task.cancel()

    listener.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if gone:
            task.uncancel()
            raise ClientDisconnect from None
        if not task.cancelling():
            raise NotReady("the server is stopping") from None
        raise
    finally:
        listener.remove_done_callback(leave)
        listener.cancel()


def render(request: RankRequest, ranking: Ranking, by_score: bool, timings: Timings) -> Response:
    """The ranking as JSON. The type checker, and no validation at run time, holds the members to RankResponse."""
    ids = request.candidates.item_ids
    scored = ranking.scored
    index = ranking.order(len(ids), request.top_n) if by_score else np.arange(len(ids))
    positions = index.tolist()
    heads = ranking.ranker.manifest.heads
    milliseconds = {
        stage: round(timings.seconds.get(stage, 0.0) * 1e3, 3) for stage in metrics.STAGES if stage != "serialize"
    }  # `serialize` is still running
    milliseconds["total"] = round((timings.marked - timings.entered) * 1e3, 3)
    meta = ranking.meta
    content: RankResponse = {
        "id": request.id,
        "ranker": ranking.ranker.name,
        "version": ranking.ranker.manifest.version,
        "variant": None if scored is None else scored.variant,
        "exit": ranking.exit,
        "results": {
            "index": positions,
            "item_ids": list(map(ids.__getitem__, positions)),
            "scores": None if scored is None else scored.scores[index].tolist(),
            "heads": {}
            if scored is None
            else {h: scored.probabilities[index, k].tolist() for k, h in enumerate(heads)},
        },
        "unknown_candidates": ranking.unknown,
        "history": ranking.history,
        "meta_embedding": {"status": meta.status, "version": meta.version, "age_seconds": meta.age_seconds},
        "degraded": sorted(ranking.degraded),
        "timings_ms": milliseconds,
    }
    headers = {"Server-Timing": ", ".join(f"{stage};dur={ms}" for stage, ms in milliseconds.items())}
    if request.id is not None:
        headers["X-Request-ID"] = request.id
    return Response(pydantic_core.to_json(content), media_type="application/json", headers=headers)


def count(endpoint: str, code: int, seconds: float, trace: Trace) -> dict[str, str]:
    """Count a request that has ended, whatever the outcome. Returns its labels."""
    ranker = trace.ranker
    name = "" if ranker is None else ranker.name
    version = "" if ranker is None else str(ranker.manifest.version)
    metrics.series(metrics.REQUESTS, endpoint, name, version, trace.variant, str(code)).inc()
    metrics.series(metrics.DURATION, endpoint, name, trace.variant).observe(seconds)
    trace.timings.observe()
    return {"endpoint": endpoint, "ranker": name, "version": version, "variant": trace.variant, "code": str(code)}


def count_ranking(request: RankRequest, ranking: Ranking, seconds: float) -> None:
    """Count a request that was ranked."""
    name = ranking.ranker.name
    scored = ranking.scored
    candidates = len(request.candidates.item_ids)
    for reason in ranking.degraded:
        metrics.series(metrics.DEGRADED, reason).inc()
    metrics.series(metrics.EXITS, name, ranking.exit).inc()
    metrics.series(metrics.CANDIDATES, name).observe(candidates)
    if scored is not None:
        metrics.DURATIONS[metrics.size_bucket(ranking.history.used + candidates)].observe(seconds)
        if request.head_weights is None:
            metrics.series(metrics.BEST_SCORE, name, scored.variant).observe(float(scored.scores.max()))
    metrics.HISTORY_LENGTH.observe(ranking.history.used)
    metrics.series(metrics.HISTORY_CACHE, ranking.history.cache).inc()
    metrics.series(metrics.UNKNOWN_CANDIDATES, name).inc(len(ranking.unknown))
