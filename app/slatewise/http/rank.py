"""HTTP in, HTTP out: parse, call the pipeline, answer. With `main.py` the only place that knows FastAPI.

/rerank /score                  the pipeline, sorted or in input order
/models /models/{ranker}        what is served, with limits, quality and latency
/livez /readyz /metrics         open; everything else asks for a key where keys are set
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable
from functools import partial
from typing import Any

import pydantic_core
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from slatewise import metrics
from slatewise.bundle.ranker import Ranker
from slatewise.errors import MOST_FAULTS, Fault, Invalid, NotFound, NotJson, NotReady, Overloaded, RankingError, pointer
from slatewise.http.body import read_body
from slatewise.metrics import Timings
from slatewise.ranking.pipeline import Call, Pipeline, order
from slatewise.schemas import (
    REQUEST_ID,
    Health,
    Limits,
    ModelCard,
    ModelName,
    Models,
    Problem,
    RankRequest,
    RankResponse,
)
from slatewise.settings import Settings

TOO_MANY_FAULTS = 1_000  # to look at each
CLIENT_GONE = 499  # in the metrics only

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text, "content": {"application/problem+json": {}}}
    for status, text in {
        400: "The body is not JSON, or its coding is broken.",
        401: "The API key is missing or wrong.",
        404: "No such ranker, variant or path.",
        408: "The body did not arrive in time.",
        413: "The body is too long, as sent or inflated.",
        415: "The body's type or coding is not supported.",
        422: "A member is missing, unknown or outside its limits: `errors[].pointer` says which.",
        429: "Overloaded: try again after `Retry-After` seconds.",
        500: "The model failed on this request.",
        503: "Not ready, or overloaded and `allow_degraded` is false.",
        504: "The deadline passed and `allow_degraded` is false.",
    }.items()
}
BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/RankRequest"}}},
    }
}


def pipeline_of(request: Request) -> Pipeline:
    pipeline: Pipeline | None = getattr(request.app.state, "pipeline", None)
    if pipeline is None:
        raise NotReady("the models are not loaded yet, or the server is stopping")
    return pipeline


routes = APIRouter()


@routes.get("/livez", response_model=Health)
async def livez() -> dict[str, str]:
    """The process answers."""
    return {"status": "alive"}


@routes.get("/readyz", response_model=Health, responses={503: PROBLEMS[503]})
async def readyz(request: Request) -> dict[str, str]:
    """The models are loaded and warm, and the server is not draining. Redis is not asked: without it the service degrades and serves."""
    pipeline_of(request)
    if request.app.state.draining:
        raise NotReady("the server is draining")
    return {"status": "ready"}


@routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def prometheus_metrics(request: Request) -> Response:
    if pipeline := request.app.state.pipeline:
        metrics.OUTSTANDING_TOKENS.set(pipeline.outstanding_tokens)
        metrics.QUEUE_LENGTH.set(len(pipeline.workers.queue))
        metrics.HISTORY_CACHE_BYTES.set(pipeline.cache.nbytes)
    return Response(generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@routes.get("/models", response_model=Models, responses={401: PROBLEMS[401], 503: PROBLEMS[503]})
async def list_models(request: Request) -> Models:
    """The rankers that are served."""
    return Models(
        models=[
            ModelName(name=r.name, version=r.manifest.version, variants=list(r.engines))
            for r in pipeline_of(request).rankers.values()
        ]
    )


@routes.get("/models/{ranker}", response_model=ModelCard, responses={s: PROBLEMS[s] for s in (401, 404, 503)})
async def show_model(ranker: str, request: Request) -> ModelCard:
    """One ranker: limits, heads, quality and latency of its variants, and an example request."""
    pipeline = pipeline_of(request)
    if ranker not in pipeline.rankers:
        raise NotFound(f"no such ranker; served: {', '.join(pipeline.rankers)}")
    return model_card(pipeline.rankers[ranker], pipeline)


def model_card(ranker: Ranker, pipeline: Pipeline) -> ModelCard:
    manifest = ranker.manifest
    return ModelCard(
        name=ranker.name,
        version=manifest.version,
        trained_on=manifest.trained_on,
        heads=manifest.heads,
        exits=manifest.exits,
        default_exit=manifest.default_exit,
        default_variant=ranker.default_variant,
        set_wise="set" in manifest.exits,
        actions=manifest.actions,
        features=manifest.features,
        fields={name: field.values for name, field in manifest.fields.items()},
        limits=Limits(
            max_candidates=pipeline.max_candidates,
            max_history=pipeline.max_history,
            history_used=manifest.limits.history_used,
            set_wise=manifest.limits.set_wise,
        ),
        variants={name: manifest.variants[name].model_dump(exclude={"golden_scores"}) for name in ranker.engines},
        refused_variants=ranker.refused,
        report=ranker.report,
        example=manifest.example,
    )


@routes.post("/rerank", response_model=RankResponse, responses=PROBLEMS, openapi_extra=BODY)
async def rerank(request: Request) -> Response:
    """The candidates in the order this user will like, cut to `top_n`."""
    return await answer(request, by_score=True)


@routes.post("/score", response_model=RankResponse, responses=PROBLEMS, openapi_extra=BODY)
async def score(request: Request) -> Response:
    """The same, with the results in input order; `top_n` is ignored."""
    return await answer(request, by_score=False)


async def answer(request: Request, *, by_score: bool) -> Response:
    """From the first door to the last byte; whatever happens, the request is counted once."""
    pipeline = pipeline_of(request)
    entered: float = request.scope["slatewise.entered"]
    state = request.app.state
    endpoint = request.scope["path"]
    settings: Settings = state.settings
    call = None
    timings = Timings(entered)
    code = 500
    refusal = "internal-error"
    state.in_flight += 1
    metrics.IN_FLIGHT.inc()
    try:
        if state.in_flight > settings.max_in_flight:
            metrics.REJECTED.labels("in_flight").inc()
            raise Overloaded(f"more than {settings.max_in_flight} requests are in flight")
        body = await read_body(request, settings.max_body_bytes, settings.body_timeout_s)
        call = Call(parse(body, request), timings)
        timings.lap("parse")
        request.state.request_id = call.request.id
        await while_connected(request, pipeline.rank(call))
        response = respond(call, by_score)
        timings.lap("serialize")
        code = 200
        refusal = ""
        return response
    except RankingError as error:
        code = error.status
        refusal = error.slug
        raise
    except ClientDisconnect:
        code = CLIENT_GONE
        refusal = "client-gone"
        metrics.DISCONNECTS.inc()
        return Response(status_code=CLIENT_GONE)  # nobody reads it
    finally:
        state.in_flight -= 1
        metrics.IN_FLIGHT.dec()
        seconds = time.perf_counter() - entered
        labels = count(call, timings, endpoint, code, seconds)
        state.lines.end(call, labels, partial(request_id, request), refusal, timings.seconds, seconds)


def parse(body: bytes, request: Request) -> RankRequest:
    """Bytes to a request, with what the headers may say in place of the body. Raises NotJson or Invalid."""
    try:
        parsed = RankRequest.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error) from None
    changes: dict[str, Any] = {}
    user = header_text(request, "x-user-id")
    identifier = header_text(request, "x-request-id")
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
            raise refusal(error) from None
        parsed = parsed.model_copy(update=changes)
    return parsed


def header_text(request: Request, name: str) -> str | None:
    """A header as UTF-8; starlette reads Latin-1. Raises Invalid."""
    value = request.headers.get(name)
    try:
        return None if value is None else value.encode("latin-1").decode()
    except UnicodeDecodeError:
        raise Invalid.at("", f"the header {name} is not UTF-8") from None


def refusal(error: ValidationError) -> RankingError:
    """What pydantic found, without the values that were sent."""
    if error.error_count() > TOO_MANY_FAULTS:
        return Invalid.at("", f"more than {TOO_MANY_FAULTS} faults")
    faults: dict[str, Fault] = {}
    for found in error.errors(include_url=False, include_input=False, include_context=False):
        if found["type"] == "json_invalid":
            return NotJson(found["msg"])
        path = [
            step for step in found["loc"] if not str(step).startswith(("constrained-", "list["))
        ]  # without branches of unions
        if (len(path) > 1 and isinstance(path[-1], str) and isinstance(path[-2], int)) or path[-1:] == ["[key]"]:
            path.pop()  # so is this one
        where = pointer(*path)
        if where in faults:
            faults[where] = Fault(where, f"{faults[where].detail}, or: {found['msg']}"[:400])
        elif len(faults) < MOST_FAULTS:
            faults[where] = Fault(where, found["msg"][:300])
    first = next(iter(faults.values()))
    return Invalid(
        f"{first.pointer or '/'}: {first.detail}" + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""),
        tuple(faults.values()),
    )


async def while_connected(request: Request, work: Awaitable[Any]) -> None:
    """Await `work`, or cancel it when the client goes away. Raises ClientDisconnect."""
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
        await work
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


def respond(call: Call, by_score: bool) -> Response:
    """The answer's bytes (the shape is schemas.RankResponse, which a test holds them to)."""
    request = call.request
    ranker = call.ranker
    assert ranker is not None
    index, scores = order(call, by_score)
    positions = index.tolist()
    ids = request.candidates.item_ids
    ranked = call.probabilities is not None
    if ranked and request.head_weights is None:
        call.best_score = float(scores.max())
    heads = (
        {}
        if call.probabilities is None
        else {h: call.probabilities[index, k].tolist() for k, h in enumerate(ranker.manifest.heads)}
    )
    meta = call.meta
    milliseconds = {
        stage: round(call.timings.seconds.get(stage, 0.0) * 1e3, 3) for stage in metrics.STAGES[:-1]
    }  # `serialize` is not over
    milliseconds["total"] = round((call.timings.marked - call.timings.entered) * 1e3, 3)
    content = {
        "id": request.id,
        "ranker": ranker.name,
        "version": ranker.manifest.version,
        "variant": call.variant if ranked else None,
        "exit": call.exit,
        "results": {
            "index": positions,
            "item_ids": list(map(ids.__getitem__, positions)),
            "scores": scores.tolist(),
            "heads": heads,
        },
        "unknown_candidates": call.unknown.tolist(),
        "history": {
            "used": call.history_used,
            "dropped": call.history_dropped,
            "unknown": call.history_unknown,
            "cache": call.cache,
        },
        "meta_embedding": {
            "status": meta.status if meta is not None else "off" if request.user is None else "default",
            "version": None if meta is None else meta.version,
            "age_seconds": None if meta is None else meta.age_seconds,
        },
        "degraded": sorted(call.degraded),
        "timings_ms": milliseconds,
    }
    headers = {"Server-Timing": ", ".join(f"{stage};dur={ms}" for stage, ms in milliseconds.items())}
    if request.id is not None:
        headers["X-Request-ID"] = request.id
    return Response(pydantic_core.to_json(content), media_type="application/json", headers=headers)


def request_id(request: Request) -> str | None:
    """The body's where it was read and has one, else the header's."""
    header = request.headers.get("x-request-id", "")
    return getattr(request.state, "request_id", None) or (header if re.fullmatch(REQUEST_ID, header) else None)


def count(call: Call | None, timings: Timings, endpoint: str, code: int, seconds: float) -> dict[str, str]:
    """The one place where a request enters the metrics: when it ends. The labels by which it was counted, for the log."""
    ranker = None if call is None else call.ranker
    name, version = ("", "") if ranker is None else (ranker.name, str(ranker.manifest.version))
    variant = "" if call is None or call.probabilities is None else call.variant or ""
    metrics.series(metrics.REQUESTS, endpoint, name, version, variant, str(code)).inc()
    metrics.series(metrics.DURATION, endpoint, name, variant).observe(seconds)
    timings.observe()
    labels = {"endpoint": endpoint, "ranker": name, "version": version, "variant": variant, "code": str(code)}
    if call is None or code != 200:
        return labels
    for reason in call.degraded:
        metrics.series(metrics.DEGRADED, reason).inc()
    metrics.series(metrics.EXITS, name, call.exit).inc()
    candidates = len(call.request.candidates.item_ids)
    metrics.series(metrics.CANDIDATES, name).observe(candidates)
    if variant:
        metrics.DURATIONS[metrics.size_bucket(call.history_used + candidates)].observe(seconds)
    if call.best_score is not None:
        metrics.series(metrics.BEST_SCORE, name, variant).observe(call.best_score)
    metrics.HISTORY_LENGTH.observe(call.history_used)
    metrics.series(metrics.HISTORY_CACHE, call.cache).inc()
    metrics.series(metrics.UNKNOWN_CANDIDATES, name).inc(len(call.unknown))
    return labels
