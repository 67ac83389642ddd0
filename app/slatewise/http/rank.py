"""The life of a call that ranks, in any dialect: read, parse, rank, respond; and the native calls /rerank and /score.

Called by: `hot_routes.py`. Calls: the functions of the dialect, `body.py`, `ranking/pipeline.py` and `problems.py`, and
at the end the request log and the capture that `app.py` has opened.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pydantic_core
from fastapi import Request, Response
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from slatewise import metrics
from slatewise.errors import NotReady, RankingError
from slatewise.http.body import check_counts, check_names, content_coding, content_length, read_body
from slatewise.http.dialect import Dialect, Incoming
from slatewise.http.health import ready_pipeline
from slatewise.http.mistakes import wrong_request
from slatewise.http.problems import PROBLEMS, problem, request_id_of, unexpected
from slatewise.http.request_headers import with_headers
from slatewise.http.request_log import Outcome
from slatewise.http.trace_context import caller_of
from slatewise.ranking.admission import Admission
from slatewise.ranking.pipeline import Pipeline, Ranking
from slatewise.ranking.trace import Timings, Trace
from slatewise.ranking.validation import unpruned
from slatewise.schemas import EXPLORING, RankRequest, RankResponse

MOST_MEMBERS = 1_000  # of a native body, whose lists are columns
CLIENT_GONE = 499  # the client disconnected; only metrics and the log contain this code

T = TypeVar("T")


class Exchange:
    """A request and its outcome, which is counted and logged once, when the request ends."""

    def __init__(self, request: Request, dialect: Dialect[Any], entered: float) -> None:
        self.request = request
        self.dialect = dialect
        self.trace = Trace(entered)
        self.parsed: RankRequest | None = None
        self.ranking: Ranking | None = None  # set together with the code 200
        self.given_id: str | None = None  # id of a request that could not be parsed
        self.code = 500
        self.error: RankingError | None = None
        self.refusal = "internal-error"  # slug of the error; empty for a ranking

    def request_id(self) -> str:
        """Return the id in the body or in the header, or one that the server makes: the same at every call."""
        if self.parsed is not None and self.parsed.id is not None:
            return self.parsed.id
        self.given_id = self.given_id or request_id_of(self.request.headers)
        return self.given_id

    def refuse(self, error: RankingError) -> Response:
        """Render an error in the dialect of the request, and note it as the outcome."""
        response = self.dialect.render_error(error, self.request_id())
        self.code = response.status_code
        self.error = error
        self.refusal = error.slug
        return response

    def failed(self) -> str:
        """Return the native status if the service failed, or an empty text. Who sets a deadline may miss it."""
        code = str(self.code if self.error is None else self.error.status)
        is_own = code == "504" and self.parsed is not None and bool(self.parsed.deadline_ms)
        return code if code in metrics.FAILURES and not is_own else ""

    def record(self) -> None:
        """Count the request, and log and capture it if it is selected."""
        state = self.request.app.state
        seconds = time.perf_counter() - self.trace.timings.entered
        headers = self.request.headers
        span = None
        context = caller_of(headers)
        if state.tracing is not None:
            span = state.tracing.start(self.request.scope, headers, self.dialect.path, seconds)
            context = state.tracing.context(span)
        exemplar = context.ids() if context is not None and context.sampled else None
        labels = count(self.dialect.path, self.code, seconds, self.trace, exemplar)
        if failure := self.failed():
            metrics.series(metrics.FAILED, self.dialect.path, failure).inc()
        degraded: tuple[str, ...] = ()
        if self.parsed is not None and self.ranking is not None:
            degraded = tuple(sorted(self.ranking.degraded))
            count_ranking(self.parsed, self.ranking, seconds, exemplar)
            if state.capture is not None:
                state.capture.record(self.parsed)
        candidates = None if self.parsed is None else len(self.parsed.candidates.item_ids)
        outcome = Outcome(labels, self.refusal, degraded, seconds, candidates)
        state.request_log.record(outcome, self.trace, self.request_id, context)
        if span is not None:  # after the response is sent
            asyncio.get_running_loop().call_soon(state.tracing.finish, span, outcome, self.trace)


async def answer(request: Request, dialect: Dialect[Any], path: Mapping[str, str], entered: float) -> Response:
    """Return the response, whatever the outcome is.

    path: parameters of the route. entered: time.perf_counter() at the time from which the deadline counts.
    """
    try:
        pipeline = ready_pipeline(request.app)
    except NotReady as error:
        return dialect.render_error(error, request_id_of(request.headers))
    exchange = Exchange(request, dialect, entered)
    try:
        pipeline.admission.enter()
        return await rank(exchange, pipeline, path)
    except RankingError as error:
        return exchange.refuse(error)
    except ClientDisconnect:
        exchange.code = CLIENT_GONE
        exchange.refusal = "client-gone"
        metrics.DISCONNECTS.inc()
        return Response(status_code=CLIENT_GONE)  # not sent: the connection is closed
    except Exception as error:
        return exchange.refuse(unexpected(error, request.headers))
    finally:
        pipeline.admission.leave()
        exchange.record()
        if pipeline.after_answer is not None:
            pipeline.after_answer(exchange.parsed, exchange.ranking, exchange.trace, exchange.code)


async def rank(exchange: Exchange, pipeline: Pipeline, path: Mapping[str, str]) -> Response:
    """Read, parse and rank the request, and render the ranking. Raises RankingError and ClientDisconnect."""
    request = exchange.request
    dialect = exchange.dialect
    trace = exchange.trace
    body = await read_admitted(request, pipeline.admission, dialect.any_type)
    trace.timings.lap("parse")
    await pipeline.admission.turn()
    trace.timings.lap("queue")
    if not dialect.is_binary:
        check_counts(body, pipeline.admission.limits.max_values)
    incoming = Incoming(body, request.headers, path, pipeline.registry, pipeline.admission.limits)
    parsed, call = await pipeline.admission.turns.parse(len(body), partial(dialect.parse, incoming))
    parsed = exchange.parsed = request.scope["caller"].bounded(with_headers(parsed, request.headers))
    trace.timings.lap("parse")
    ranking = await while_connected(request, pipeline.rank(parsed, trace))
    response = dialect.render(parsed, call, ranking, trace.timings)
    trace.timings.lap("serialize")
    exchange.ranking = ranking
    exchange.code = 200
    exchange.refusal = ""
    return response


async def read_admitted(request: Request, admission: Admission, any_type: bool = False) -> bytes:
    """Check the headers, then read and decompress the body.

    Raises TooLarge (by the Content-Length, before a byte is read) and the errors of `body.py`.
    """
    limits = admission.limits
    coding = content_coding(request.headers, any_type)
    admission.check_content_length(content_length(request.headers))
    return await read_body(request, coding, limits.max_body_bytes, limits.body_timeout_s)


def parse(incoming: Incoming) -> tuple[RankRequest, None]:
    """Parse and check a native body. Raises NotJson or Invalid."""
    check_names(incoming.body, MOST_MEMBERS)
    try:
        return RankRequest.model_validate_json(incoming.body), None
    except ValidationError as error:
        raise wrong_request(error, incoming.body) from None


def parse_score(incoming: Incoming) -> tuple[RankRequest, None]:
    """Parse and check the body of /score. Raises NotJson or Invalid."""
    return unpruned(parse(incoming)[0]), None


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`. If the client disconnects first, cancel `work` and raise ClientDisconnect."""
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


def response_members(request: RankRequest, ranking: Ranking, by_score: bool, timings: Timings) -> RankResponse:
    """Return the answer as plain Python values; a ranker in process answers with the same (`local/ranker.py`).

    The type checker compares the members with RankResponse; nothing does at run time.
    """
    assert request.id is not None  # set for every request, here and in process
    ids = request.candidates.item_ids
    scored = ranking.scored
    index = ranking.order(request.top_n) if by_score else np.arange(ranking.candidates)
    positions = index.tolist()
    heads = ranking.ranker.manifest.heads
    milliseconds = stage_milliseconds(timings)
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
        "unknown_candidates": list(ranking.unknown),
        "unknown_values": ranking.unknown_values,
        "history": ranking.history,
        "meta_embedding": {"status": meta.status, "version": meta.version, "age_seconds": meta.age_seconds},
        "degraded": sorted(ranking.degraded),
        "timings_ms": milliseconds,
    }
    if ranking.adapted:
        content["adapted_candidates"] = list(ranking.adapted)
    if request.return_fields is not None:
        titles = ranking.ranker.titles
        content["results"]["fields"] = titles.columns(request.return_fields, content["results"]["item_ids"])
    if scored is not None and (pruned := scored.pruned) is not None:
        content["pruned"] = pruned
    if request.explore:
        content["explored"] = ranking.exit in EXPLORING
    if request.explain:
        content["explanations"] = ranking.explanations
    return content


def render(request: RankRequest, ranking: Ranking, by_score: bool, timings: Timings) -> Response:
    """Render the ranking as JSON."""
    content = response_members(request, ranking, by_score, timings)
    headers = response_headers(request, content["timings_ms"])
    return Response(pydantic_core.to_json(content), media_type="application/json", headers=headers)


def stage_milliseconds(timings: Timings) -> dict[str, float]:
    """Return the milliseconds of each stage up to now, and their `total`."""
    milliseconds = {
        stage: round(timings.seconds.get(stage, 0.0) * 1e3, 3) for stage in metrics.STAGES if stage != "serialize"
    }  # `serialize` is still running
    milliseconds["total"] = round((timings.marked - timings.entered) * 1e3, 3)
    return milliseconds


def response_headers(request: RankRequest, milliseconds: dict[str, float]) -> dict[str, str]:
    """Return the headers of every answer with a ranking: the stages, and the id of the request."""
    assert request.id is not None  # set for every request
    return {
        "Server-Timing": ", ".join(f"{stage};dur={ms}" for stage, ms in milliseconds.items()),
        "X-Request-ID": request.id,
    }


def count(endpoint: str, code: int, seconds: float, trace: Trace, exemplar: dict[str, str] | None) -> dict[str, str]:
    """Count a request that has ended, whatever the outcome. Return the labels of the request counter."""
    ranker = trace.ranker
    name = "" if ranker is None else ranker.name
    version = "" if ranker is None else str(ranker.manifest.version)
    metrics.series(metrics.REQUESTS, endpoint, name, version, trace.variant, str(code)).inc()
    metrics.series(metrics.DURATION, endpoint, name, trace.variant).observe(seconds, exemplar)
    trace.timings.observe(exemplar)
    return {"endpoint": endpoint, "ranker": name, "version": version, "variant": trace.variant, "code": str(code)}


def count_ranking(request: RankRequest, ranking: Ranking, seconds: float, exemplar: dict[str, str] | None) -> None:
    """Count a response that contains a ranking, with its size, exit and history."""
    name = ranking.ranker.name
    scored = ranking.scored
    candidates = ranking.candidates
    for reason in ranking.degraded:
        metrics.series(metrics.DEGRADED, reason).inc()
    metrics.series(metrics.EXITS, name, ranking.exit).inc()
    if request.explore and ranking.exit in EXPLORING:
        metrics.series(metrics.EXPLORED, name).inc()
    metrics.series(metrics.CANDIDATES, name).observe(candidates)
    if scored is not None:
        metrics.DURATIONS[metrics.size_bucket(ranking.history.used + candidates)].observe(seconds, exemplar)
        if request.head_weights is None and not request.explore:
            metrics.series(metrics.BEST_SCORE, name, scored.variant).observe(float(scored.exit_scores().max()))
    metrics.HISTORY_LENGTH.observe(ranking.history.used)
    metrics.series(metrics.HISTORY_CACHE, ranking.history.cache).inc()
    metrics.series(metrics.UNKNOWN_CANDIDATES, name).inc(len(ranking.unknown))
    metrics.series(metrics.ADAPTED_CANDIDATES, name).inc(len(ranking.adapted))
    if ranking.history.unknown_actions:
        metrics.series(metrics.UNKNOWN_ACTIONS, name).inc(ranking.history.unknown_actions)
    for field, values in ranking.unknown_values.items():
        metrics.series(metrics.UNKNOWN_VALUES, name, field).inc(values)


RERANK: Dialect[None] = Dialect(
    path="/rerank",
    name="rerank",
    description="Rank the candidates by descending score, cut to `top_n`.",
    parse=parse,
    render=lambda request, _, ranking, timings: render(request, ranking, True, timings),
    render_error=problem,
    body=RankRequest,
    answer=RankResponse,
    responses=PROBLEMS,
)
SCORE: Dialect[None] = replace(
    RERANK,
    path="/score",
    name="score",
    description="Score all candidates and return them in input order; `top_n` and `prune` are ignored.",
    parse=parse_score,
    render=lambda request, _, ranking, timings: render(request, ranking, False, timings),
)
