"""The Open Inference Protocol, version 2 (KServe, Triton): health, metadata, and `infer` in JSON and binary.

The inputs are the columns of a native request, the outputs are the scores in input order.

Called by: `rank.py` through the dialects, and `app.py` for the other routes. Calls: `tensors.py` and `common.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NotRequired

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, ValidationError, with_config
from starlette.responses import Response
from typing_extensions import TypedDict

from slatewise import VERSION
from slatewise.bundle.ranker import Ranker
from slatewise.errors import Invalid, NotFound, RankingError
from slatewise.http.body import check_counts
from slatewise.http.calls.common import (
    LOWEST_PRIORITY,
    WARNINGS,
    ForeignModel,
    documented_errors,
    error_headers,
    parse_as,
    renamed,
    request_id,
    warnings_of,
)
from slatewise.http.calls.tensors import Tensor, check_names, read_values, split_binary, write_outputs
from slatewise.http.dialect import Dialect, Incoming
from slatewise.http.health import ready_pipeline, readyz
from slatewise.http.mistakes import wrong_times
from slatewise.http.problems import PROBLEMS
from slatewise.http.rank import response_headers, stage_milliseconds
from slatewise.ranking.pipeline import Ranking
from slatewise.ranking.registry import Registry
from slatewise.ranking.trace import Timings
from slatewise.schemas import CLOSED, MOST_MILLISECONDS, Milliseconds, RankRequest, RequestedExit, Text

HEADER_LENGTH = "Inference-Header-Content-Length"
NAMES = {
    "/candidates/item_ids": "candidates.item_ids",
    "/candidates/features": "features",
    "/candidates/fields": "fields",
    "/history/item_ids": "history.item_ids",
    "/history/actions": "history.actions",
    "/history/timestamps": "history.timestamps",
    "/history/offset": "history.offset",
    "/user": "user",
    "/request_time": "request_time",
}
ONE_VALUE = ("user", "history.offset", "request_time")
INPUTS = {  # name -> datatype in the metadata; other types are converted
    "user": "BYTES",
    "candidates.item_ids": "BYTES",
    "history.item_ids": "BYTES",
    "history.actions": "BYTES",
    "history.timestamps": "FP64",
    "history.offset": "INT64",
    "request_time": "FP64",
}


class InferParameters(ForeignModel):
    """The first four have the names and values of a native request, the others those of Triton."""

    exit: RequestedExit | None = None
    variant: Text | None = None
    deadline_ms: Milliseconds | None = None
    allow_degraded: bool | None = Field(None, strict=True)
    priority: int | None = Field(None, ge=0, strict=True, description="Lower is more important.")
    timeout: int | None = Field(None, ge=0, strict=True, description="Microseconds; 0: none.")
    binary_data_output: bool | None = Field(None, strict=True)


class OutputParameters(ForeignModel):
    binary_data: bool | None = Field(None, strict=True)


class WantedOutput(ForeignModel):
    name: str = Field(max_length=300, strict=True)
    parameters: OutputParameters = OutputParameters()


class InferRequest(ForeignModel):
    """A call of `infer`. Other members and parameters are ignored; an unknown input or output is an error."""

    id: str | None = Field(None, max_length=1_000, strict=True)
    parameters: InferParameters = InferParameters()
    inputs: list[Tensor] = Field(min_length=1, max_length=100)
    outputs: list[WantedOutput] = Field(default=[], max_length=100)


class InferAnswer(TypedDict):
    model_name: str
    model_version: str
    id: NotRequired[str]
    parameters: dict[str, str]
    outputs: list[dict[str, Any]]


class OipError(BaseModel):
    error: str


@dataclass(frozen=True)
class InferCall:
    id: str | None  # as sent
    binary: dict[str, bool]  # wanted output -> whether it is binary


def parse(incoming: Incoming) -> tuple[RankRequest, InferCall]:
    length = header_length(incoming)
    json = incoming.body[:length]
    check_counts(json, incoming.limits.max_values)
    sent = parse_as(InferRequest, json)
    ranker = resolve(incoming.registry, incoming.path["model"], incoming.path.get("version"))
    most = max(incoming.limits.max_candidates, incoming.limits.max_history)
    counts = [math.prod(tensor.shape) for tensor in sent.inputs]
    if sum(counts) > incoming.limits.max_values >= most >= max(counts):  # `read_values` refuses a long input by name
        raise Invalid.at("inputs", f"more than {incoming.limits.max_values} values (SLATEWISE_MAX_VALUES)")
    members: dict[str, Any] = {"ranker": ranker.name, "candidates": {"item_ids": []}} | parameters_of(sent.parameters)
    check_names(sent.inputs)
    for tensor, raw in zip(sent.inputs, split_binary(sent.inputs, incoming.body[length:])):
        put(members, tensor.name, read_values(tensor, raw, most))
    if (identifier := request_id(sent.id)) is not None:
        members["id"] = identifier
    try:
        request = RankRequest.model_validate(members)
    except ValidationError as error:
        raise wrong_times(error) from None
    by_default = bool(sent.parameters.binary_data_output)
    known = output_names(ranker)
    wanted = {
        o.name: by_default if o.parameters.binary_data is None else o.parameters.binary_data for o in sent.outputs
    }
    if not wanted.keys() <= set(known):
        raise Invalid.at("outputs", f"unknown name; known: {', '.join(known)}")
    return request, InferCall(sent.id, wanted or dict.fromkeys(known, by_default))


def header_length(incoming: Incoming) -> int:
    """Return the length of the JSON part of a body. Raises Invalid."""
    given = incoming.headers.get(HEADER_LENGTH)
    if given is None:
        return len(incoming.body)
    if not (given.isascii() and given.isdigit() and len(given) < 10 and int(given) <= len(incoming.body)):
        raise Invalid.at(HEADER_LENGTH, "must be the length of the JSON part, in bytes")
    return int(given)


def resolve(registry: Registry, model: str, version: str | None) -> Ranker:
    """Return the ranker. Raises NotFound, also for a version that is not served."""
    ranker = registry.resolve(model)
    served = str(ranker.manifest.version)
    if version not in (None, served):
        raise NotFound(f"ranker {ranker.name} has no such version; served: {served}")
    return ranker


def parameters_of(sent: InferParameters) -> dict[str, Any]:
    """Return the members of a RankRequest that parameters give. Triton's timeout is in microseconds."""
    names = ("exit", "variant", "deadline_ms", "allow_degraded")
    members = {name: value for name in names if (value := getattr(sent, name)) is not None}
    if sent.priority is not None:
        members["priority"] = min(sent.priority, LOWEST_PRIORITY)
    if sent.timeout:
        members["deadline_ms"] = min(sent.timeout / 1e3, members.get("deadline_ms", MOST_MILLISECONDS))
    return members


def put(members: dict[str, Any], name: str, values: list[Any]) -> None:
    """Put the values of an input where a native request has them. Raises Invalid for an unknown input.

    An empty text stands for a missing action or field, and NaN for a missing number: tensors have no null.
    """
    group, _, column = name.partition(".")
    if name in ONE_VALUE:
        if len(values) != 1:
            raise Invalid.at(name, f"{len(values)} values, not 1")
        if not column:
            members[name] = values[0]
            return
        values = values[0]
    elif name in ("history.actions", "history.timestamps") or group in ("features", "fields"):
        values = [None if value == "" or value != value else value for value in values]
    if group in ("features", "fields") and column:
        members["candidates"].setdefault(group, {})[column] = values
    elif name == "candidates.item_ids":
        members["candidates"]["item_ids"] = values
    elif name in INPUTS:
        members.setdefault("history", {})[column] = values
    else:
        raise Invalid.at("inputs", f"unknown name; known: {', '.join(INPUTS)}, features.* and fields.*")


def output_names(ranker: Ranker) -> list[str]:
    return ["scores", *(f"heads.{head}" for head in ranker.manifest.heads)]


def render(request: RankRequest, call: InferCall, ranking: Ranking, timings: Timings) -> Response:
    """Render the wanted outputs in input order. Without a score of a model, all values are 0."""
    scored = ranking.scored
    table = np.zeros((ranking.candidates, 1 + len(ranking.ranker.manifest.heads)))
    if scored is not None:
        table[:, 0] = scored.scores
        table[:, 1:] = scored.probabilities
    columns = {name: table[:, k] for k, name in enumerate(output_names(ranking.ranker)) if name in call.binary}
    warnings = "; ".join(warnings_of(ranking))
    answer: dict[str, Any] = {
        "model_name": ranking.ranker.name,
        "model_version": str(ranking.ranker.manifest.version),
        "parameters": {"exit": ranking.exit, "degraded": ",".join(sorted(ranking.degraded)), "warnings": warnings},
    }
    if call.id is not None:
        answer["id"] = call.id
    body, length = write_outputs(answer, columns, call.binary)
    headers = response_headers(request, stage_milliseconds(timings)) | ({WARNINGS: warnings} if warnings else {})
    if length is None:
        return Response(body, media_type="application/json", headers=headers)
    return Response(body, media_type="application/octet-stream", headers=headers | {HEADER_LENGTH: str(length)})


def render_error(error: RankingError, identifier: str) -> Response:
    error = renamed(error, NAMES)
    headers = error_headers(error, identifier)
    body = OipError(error=error.detail).model_dump_json()
    return Response(body, error.status, headers, media_type="application/json")


INFER: Dialect[InferCall] = Dialect(
    path="/v2/models/{model}/infer",
    name="infer",
    description="Score candidates by the Open Inference Protocol, version 2. The outputs are in input order.",
    parse=parse,
    render=render,
    render_error=render_error,
    body=InferRequest,
    answer=InferAnswer,
    responses=documented_errors(OipError) | {200: {"content": {"application/octet-stream": {}}}},
    is_binary=True,
    any_type=True,
)
DIALECTS = [INFER, replace(INFER, path="/v2/models/{model}/versions/{version}/infer", name="infer_by_version")]


@with_config(CLOSED)
class TensorMetadata(TypedDict):
    name: str
    datatype: str
    shape: list[int]


@with_config(CLOSED)
class ModelMetadata(TypedDict):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


@with_config(CLOSED)
class ServerMetadata(TypedDict):
    name: str
    version: str
    extensions: list[str]


@with_config(CLOSED)
class ServerHealth(TypedDict):
    live: bool
    ready: NotRequired[bool]


@with_config(CLOSED)
class ModelHealth(TypedDict):
    name: str
    ready: bool


routes = APIRouter()
OF_A_MODEL: dict[int | str, dict[str, Any]] = {status: PROBLEMS[status] for status in (401, 404, 429, 503)}


@routes.get("/v2", response_model=ServerMetadata, responses={s: PROBLEMS[s] for s in (401, 429)})
async def server_metadata() -> ServerMetadata:
    """Name the server, by the Open Inference Protocol."""
    return {"name": "slatewise", "version": VERSION, "extensions": ["binary_tensor_data"]}


@routes.get("/v2/health/live", response_model=ServerHealth)
async def server_live() -> ServerHealth:
    """Respond with 200 while the process runs, as /livez does."""
    return {"live": True}


@routes.get("/v2/health/ready", response_model=ServerHealth, responses={503: PROBLEMS[503]})
async def server_ready(request: Request) -> ServerHealth:
    """Respond with 200 while rankers are served, as /readyz does."""
    await readyz(request)
    return {"live": True, "ready": True}


@routes.get("/v2/models/{model}", response_model=ModelMetadata, responses=OF_A_MODEL)
async def model_metadata(model: str, request: Request) -> ModelMetadata:
    """Describe the inputs and outputs of a ranker."""
    return metadata(resolve(ready_pipeline(request.app).registry, model, None))


@routes.get("/v2/models/{model}/versions/{version}", response_model=ModelMetadata, responses=OF_A_MODEL)
async def version_metadata(model: str, version: str, request: Request) -> ModelMetadata:
    """Describe the inputs and outputs of one version of a ranker."""
    return metadata(resolve(ready_pipeline(request.app).registry, model, version))


@routes.get("/v2/models/{model}/ready", response_model=ModelHealth, responses=OF_A_MODEL)
async def model_ready(model: str, request: Request) -> ModelHealth:
    """Respond with 200 if the ranker is served."""
    return {"name": resolve(ready_pipeline(request.app).registry, model, None).name, "ready": True}


@routes.get("/v2/models/{model}/versions/{version}/ready", response_model=ModelHealth, responses=OF_A_MODEL)
async def version_ready(model: str, version: str, request: Request) -> ModelHealth:
    """Respond with 200 if this version of the ranker is served."""
    return {"name": resolve(ready_pipeline(request.app).registry, model, version).name, "ready": True}


def metadata(ranker: Ranker) -> ModelMetadata:
    """Describe a ranker. All inputs but `candidates.item_ids` are optional."""
    inputs = INPUTS | {f"features.{name}": "FP64" for name in ranker.manifest.features}
    inputs |= {f"fields.{name}": "BYTES" for name in ranker.manifest.fields}
    return {
        "name": ranker.name,
        "versions": [str(ranker.manifest.version)],
        "platform": "onnxruntime",
        "inputs": [{"name": n, "datatype": t, "shape": [1 if n in ONE_VALUE else -1]} for n, t in inputs.items()],
        "outputs": [{"name": name, "datatype": "FP64", "shape": [-1]} for name in output_names(ranker)],
    }
