"""Parts that several foreign calls share: ids and the query as they send them, warnings, and errors in their names.

Called by: the other files of this folder. Calls: `problems.py`, `mistakes.py` and `rank.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema
from starlette.responses import Response

from slatewise.errors import MOST_FAULTS, Fault, Invalid, NotJson, RankingError
from slatewise.http.body import check_counts
from slatewise.http.mistakes import wrong_times
from slatewise.http.problems import PROBLEMS, schema_error
from slatewise.http.rank import response_headers, stage_milliseconds
from slatewise.ranking.admission import RequestLimits
from slatewise.ranking.pipeline import Ranking
from slatewise.ranking.trace import Timings
from slatewise.schemas import (
    MAX_ID,
    REQUEST_ID,
    Candidates,
    Column,
    History,
    Ids,
    Integer,
    Milliseconds,
    RankRequest,
    RequestModel,
    Text,
    UnixSeconds,
    User,
)

WARNINGS = "X-Slatewise-Warnings"
LOWEST_PRIORITY = 100  # of a RankRequest
# What `rank_request` copies: a copy takes a quarter of the time of a request that is built member by member.
NO_CANDIDATES = Candidates.model_construct(item_ids=[])
NO_REQUEST = RankRequest.model_construct(candidates=NO_CANDIDATES)

IDS: TypeAdapter[list[str]] = TypeAdapter(Ids)
TEXTS: TypeAdapter[list[str]] = TypeAdapter(Column[Text])

M = TypeVar("M", bound=BaseModel)


class ForeignModel(BaseModel):
    """A foreign request. Unknown members are ignored: each client sends some."""

    model_config = ConfigDict(extra="ignore", frozen=True, cache_strings="keys")


@dataclass(frozen=True)
class Otherwise:
    """Annotation: one message in place of the faults of each member of a union."""

    message: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.custom_error_schema(
            handler(source), custom_error_type="foreign", custom_error_message=self.message
        )


class Query(RequestModel):
    """A query in JSON: the user and more of a native request. It is of this server, so unknown members are errors."""

    user: User | None = None
    history: History | None = None
    request_time: UnixSeconds | None = None
    deadline_ms: Milliseconds | None = None
    allow_degraded: bool | None = Field(None, strict=True)


AnyQuery = Annotated[
    Annotated[str, Field(min_length=1, strict=True)] | Integer | Query,
    Field(
        union_mode="left_to_right",
        description="User id, or JSON (also as text) such as "
        '`{"user": "u42", "history": {"item_ids": ["1193"], "actions": ["like"]}}`.',
    ),
    Otherwise('must be a user id, or JSON such as {"user": "u42", "history": {"item_ids": ["1193"]}}'),
]


def members_of_query(query: str | int | Query, limits: RequestLimits) -> dict[str, Any]:
    """Return the members of a RankRequest that a query gives. Raises Invalid."""
    if isinstance(query, int):
        return {"user": str(query)}
    if isinstance(query, str):
        if not query.lstrip().startswith("{"):
            if len(query) > MAX_ID:
                raise Invalid.at("/query", f"a user id has at most {MAX_ID} characters; texts are not ranked")
            return {"user": query}
        try:
            check_counts(query.encode(), limits.max_values)
            query = Query.model_validate_json(query)
        except Invalid as error:
            raise in_query(error) from None
        except ValidationError as error:
            raise in_query(wrong_times(error)) from None
    members = {name: getattr(query, name) for name in query.model_fields_set}
    return {name: value for name, value in members.items() if value is not None}


def in_query(error: RankingError) -> RankingError:
    """Point the faults of a query's JSON text into the member `query`."""
    if isinstance(error, NotJson):
        return Invalid.at("/query", "begins with { and is not JSON")
    return renamed(error, {"": "/query"})


def parse_as(model: type[M], body: bytes) -> M:
    """Parse and check a body. Raises NotJson or Invalid."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise schema_error(error) from None


def rank_request(ids: list[str], **members: Any) -> RankRequest:
    """Build a request from checked members, without checking them again. `None`: the member is not set."""
    given = {name: value for name, value in members.items() if value is not None}
    candidates = NO_CANDIDATES.model_copy(update={"item_ids": ids})
    return NO_REQUEST.model_copy(update={"candidates": candidates, **given})


def checked_ids(ids: list[Any]) -> list[str]:
    """Check the ids of items, and return them as text. Raises ValidationError."""
    try:
        return TEXTS.validate_python(ids)  # three times as fast as IDS, and nearly always right
    except ValidationError:
        return IDS.validate_python(ids)


def check_count(pointer: str, count: int, limits: RequestLimits) -> None:
    """Check the number of candidates as `validation.py` does, but before any work for each of them. Raises Invalid."""
    if count > limits.max_candidates:
        raise Invalid.at(pointer, f"{count} candidates, limit {limits.max_candidates}")


def request_id(identifier: object) -> str | None:
    """Return the id of a foreign request if it can be the id of a RankRequest."""
    return identifier if isinstance(identifier, str) and re.fullmatch(REQUEST_ID, identifier) else None


def ranked(ranking: Ranking, top_n: int | None) -> tuple[list[int], list[float]]:
    """Return the positions by descending score, and their scores. Unscored candidates have 0.0, in input order.

    Foreign answers must have scores. A decreasing placeholder would look like a probability, so all are equal.
    """
    order = ranking.order(top_n)
    scores = np.zeros(len(order)) if ranking.scored is None else ranking.scored.scores[order]
    return order.tolist(), scores.tolist()


def warnings_of(ranking: Ranking) -> list[str]:
    """Say what a client could not see otherwise: other exits, degraded answers, and candidates that are no items."""
    found = []
    n = ranking.candidates
    limit = ranking.ranker.manifest.limits.set_wise
    if ranking.scored is None:
        found.append("no model scored this request: it is in input order, and all scores are 0")
    elif ranking.exit == "set" and (compared := len(ranking.scored.exit_scores())) > limit:
        found.append(f"{compared} candidates, set-wise limit {limit}: they were compared in several slates")
    if ranking.degraded:
        found.append(f"degraded: {', '.join(sorted(ranking.degraded))}; exit {ranking.exit}")
    if ranking.unknown:
        found.append(f"{len(ranking.unknown)} of {n} candidates are not ids of items that the ranker knows")
    return found


def respond(body: bytes, request: RankRequest, timings: Timings, warnings: list[str]) -> Response:
    """Return an answer in JSON with the native headers, and the warnings in a header of their own."""
    headers = response_headers(request, stage_milliseconds(timings))
    if warnings:
        headers[WARNINGS] = "; ".join(warnings)
    return Response(body, media_type="application/json", headers=headers)


def renamed(error: RankingError, names: Mapping[str, str]) -> RankingError:
    """Return the error with the names of the foreign request in place of native ones: prefixes of pointers."""
    if not isinstance(error, Invalid) or not error.faults:
        return error
    faults = tuple(Fault(new_name(fault.pointer, names), fault.detail) for fault in error.faults)[:MOST_FAULTS]
    return Invalid.of(faults)


def new_name(pointer: str, names: Mapping[str, str]) -> str:
    """Replace the first prefix of `names` that a pointer has."""
    for native, foreign in names.items():
        if pointer == native or pointer.startswith(native + "/"):
            return foreign + pointer[len(native) :]
    return pointer


def error_headers(error: RankingError, identifier: str) -> dict[str, str]:
    return dict(error.headers) | {"X-Request-ID": identifier}


def documented_errors(model: Any) -> dict[int | str, dict[str, Any]]:
    """Describe errors for the OpenAPI document: those of the native calls, in another shape."""
    return {status: {"model": model, "description": shown["description"]} for status, shown in PROBLEMS.items()} | {
        431: PROBLEMS[431]  # answered before the call is known
    }
