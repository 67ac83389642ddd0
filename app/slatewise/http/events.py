"""The endpoints for users: POST /events, /feedback and /encode, DELETE /users/{user}.

Called by: `app.py`. Calls: `events/`, `ranking/ahead.py`, `rank.py` (to read), `mistakes.py`, `problems.py`,
`calls/aws.py`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

import pydantic_core
from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import ClientDisconnect

from slatewise import metrics
from slatewise.errors import Invalid, NotJson, RankingError
from slatewise.events.event import EventBody, EventCounts, EventsBody, check_times
from slatewise.events.foreign import Feedback, FeedbackAnswer, PutEventsBody
from slatewise.events.writer import EventWriter
from slatewise.http.body import check_counts, check_names
from slatewise.http.calls import aws
from slatewise.http.health import ready_pipeline
from slatewise.http.mistakes import wrong_times
from slatewise.http.problems import PROBLEMS, request_id_of, schema_error
from slatewise.http.rank import CLIENT_GONE, read_admitted, while_connected
from slatewise.ranking.ahead import encode_ahead
from slatewise.ranking.pipeline import Pipeline
from slatewise.schemas import EncodeRequest, EncodeResponse, Problem, User


class CountedRoute(APIRoute):
    """Counts each request, and each that failed, by the template of the route and the status of the answer."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        metrics.show_endpoint(self.path_format)

        async def counted(request: Request) -> Response:
            code = 500
            try:
                response = await handle(request)
                code = response.status_code
                return response
            except RankingError as error:
                code = error.status
                raise
            finally:
                metrics.series(metrics.REQUESTS, self.path_format, "", "", "", str(code)).inc()
                if str(code) in metrics.FAILURES:  # 504 too: no client sets a deadline here
                    metrics.series(metrics.FAILED, self.path_format, str(code)).inc()

        return counted


routes = APIRouter(route_class=CountedRoute)
Model = TypeVar("Model", bound=BaseModel)
USER: TypeAdapter[str] = TypeAdapter(User)
BODIES = (EventBody, EventsBody, PutEventsBody, Feedback, EncodeRequest)  # parsed here, not by FastAPI
FEEDBACK = TypeAdapter(list[Feedback])
FAULTS: dict[int | str, dict[str, Any]] = {
    status: PROBLEMS[status] for status in (400, 401, 408, 413, 415, 422, 429, 500, 503)
}


def body_of(*models: type[BaseModel], or_list: bool = False) -> dict[str, Any]:
    """Describe a body that the endpoint parses itself, for the OpenAPI document."""
    refs: list[dict[str, Any]] = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in models]
    if or_list:
        refs.append({"type": "array", "items": refs[0]})
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def read_json(request: Request, pipeline: Pipeline, any_type: bool = False) -> Any:
    """Read the body within its limits. Raises the errors of `read_admitted`, or NotJson."""
    body = await read_admitted(request, pipeline.admission, any_type)
    check_counts(body, pipeline.admission.limits.max_values)
    check_names(body, pipeline.admission.limits.max_values // 4)
    try:
        return pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise NotJson(f"Invalid JSON: {error}") from None


def parse(model: type[Model], content: Any) -> Model:
    """Raises Invalid."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise wrong_times(error) from None


def check_count(request: Request, count: int, pointer: str) -> None:
    """Raises Invalid."""
    limit: int = request.app.state.max_events
    if count > limit:
        raise Invalid.at(pointer, f"{count} events, limit {limit} (SLATEWISE_MAX_EVENTS): send several requests")


@asynccontextmanager
async def admitted(request: Request) -> AsyncIterator[tuple[Pipeline, EventWriter]]:
    """Count a request with events as in flight. Raises NotReady, or Overloaded if too many are."""
    pipeline = ready_pipeline(request.app)
    writer: EventWriter = request.app.state.events
    with writer.request(pipeline.admission.limits.max_in_flight):
        yield pipeline, writer


@routes.post(
    "/events",
    status_code=202,
    response_model=EventCounts,
    responses=FAULTS
    | {status: FAULTS[status] | {"model": Problem | aws.AwsError} for status in (400, 429, 503)}
    | {
        200: {"description": "PutEvents was taken."},
        403: {"model": aws.AwsError, "description": "The access key id of PutEvents is no key of this server."},
    },
    openapi_extra=body_of(EventBody, EventsBody, PutEventsBody),
)
async def post_events(request: Request) -> Response:
    """Store events of users. The answer comes when they are written.

    A body with `eventList` is PutEvents of Amazon Personalize, and gets the answers of that service.
    """
    is_aws = aws.is_signed(request.headers)  # until the body is read
    try:
        async with admitted(request) as (pipeline, writer):
            content = await read_json(request, pipeline)
            is_aws = isinstance(content, dict) and "eventList" in content
            counts = await (put_events if is_aws else native_events)(request, content, writer)
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)
    except RankingError as error:
        if not is_aws:
            raise
        return aws.render_error(error, request_id_of(request.headers))
    if is_aws:
        return Response(status_code=200)
    return Response(counts.model_dump_json(), 202, media_type="application/json")


async def native_events(request: Request, content: Any, writer: EventWriter) -> EventCounts:
    now = time.time()
    if isinstance(content, dict) and "events" in content:
        if isinstance(content["events"], list):
            check_count(request, len(content["events"]), "/events")
        events = [body.event(now) for body in parse(EventsBody, content).events]
        check_times(events, "/events")
    else:
        events = [parse(EventBody, content).event(now)]
        check_times(events, "/timestamp")
    return await writer.submit(events)


async def put_events(request: Request, content: Any, writer: EventWriter) -> EventCounts:
    body = parse(PutEventsBody, content)
    check_count(request, len(body.eventList), "/eventList")
    events = body.events()
    check_times(events, "/eventList")
    return await writer.submit(events)


def events_in(feedback: Any) -> int:
    """Count the events that one event of Metarank becomes, before it is checked: a ranking has one for each item."""
    items = feedback.get("items") if isinstance(feedback, dict) else None
    return len(items) if isinstance(items, list) and items else 1


@routes.post(
    "/feedback",
    response_model=FeedbackAnswer,
    responses=FAULTS,
    openapi_extra=body_of(Feedback, or_list=True),
)
async def post_feedback(request: Request) -> Response:
    """Store events in the form of Metarank: one, or a list. Other media types than JSON are taken, as curl sends them.

    Items of a `ranking` go to the Parquet files as impressions, and not to the history.
    """
    begin = time.perf_counter()
    now = time.time()
    try:
        async with admitted(request) as (pipeline, writer):
            content = await read_json(request, pipeline, any_type=True)
            listed = content if isinstance(content, list) else [content]
            check_count(request, sum(map(events_in, listed)), "")
            try:
                bodies = FEEDBACK.validate_python(listed)
            except ValidationError as error:
                raise schema_error(error) from None
            events = [event for position, body in enumerate(bodies) for event in body.events(now, position)]
            check_times(events, "")
            counts = await writer.submit(events)
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)
    answer = FeedbackAnswer(
        accepted=len(bodies),
        status="ok",
        tookMillis=round((time.perf_counter() - begin) * 1e3),
        updated=counts.accepted,
        ignored=sum(body.event in ("item", "user") for body in bodies),
    )
    return Response(answer.model_dump_json(), media_type="application/json")


@routes.post(
    "/encode",
    response_model=EncodeResponse,
    responses=FAULTS | {404: PROBLEMS[404], 504: PROBLEMS[504]},
    openapi_extra=body_of(EncodeRequest),
)
async def post_encode(request: Request) -> Response:
    """Encode a history ahead of a rank request of the same user, so that the request finds the kept state."""
    pipeline = ready_pipeline(request.app)
    try:
        pipeline.admission.enter()
        content = await read_json(request, pipeline)
        answer = await while_connected(request, encode_ahead(pipeline, parse(EncodeRequest, content)))
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)
    finally:
        pipeline.admission.leave()
    return Response(answer.model_dump_json(), media_type="application/json")


class AnyText(Convertor[str]):
    """The rest of a path, line breaks included: `path` would cut one at the end, and name another user."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("any", AnyText())


@routes.delete(
    "/users/{user:any}",
    status_code=204,
    response_class=Response,
    responses={status: PROBLEMS[status] for status in (401, 422, 429, 503)},
)
async def delete_user(user: str, request: Request) -> Response:
    """Delete the stored history, the kept states and the vectors in Redis, also for an unknown user.

    Other replicas drop what they keep within two seconds. Files with events are not changed.
    """
    try:
        unquote_to_bytes(request.scope.get("raw_path", b"")).decode()  # in `user`, other bytes are replaced
        name = USER.validate_python(user)
    except ValueError:
        raise Invalid.at("", "a user id has 1 to 256 characters, in UTF-8") from None
    async with admitted(request) as (pipeline, writer):
        pipeline.forget(name)  # first, so that a fault of Redis leaves nothing here
        await writer.histories.delete(name)
        await pipeline.store.delete_user(name)
        pipeline.forget(name)  # what a request read before the deletion
    return Response(status_code=204)
