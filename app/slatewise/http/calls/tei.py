"""POST /tei/rerank, as Text Embeddings Inference has it: the texts are item ids, the answer is a bare array.

Called by: `rank.py` through the dialect. Calls: `common.py`.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import BaseModel, Field, with_config
from starlette.responses import Response
from typing_extensions import TypedDict

from slatewise.errors import RankingError
from slatewise.http.calls.common import (
    AnyQuery,
    ForeignModel,
    documented_errors,
    error_headers,
    members_of_query,
    parse_as,
    rank_request,
    ranked,
    renamed,
    respond,
    warnings_of,
)
from slatewise.http.calls.rows import render_rows
from slatewise.http.dialect import Dialect, Incoming
from slatewise.ranking.pipeline import Ranking
from slatewise.ranking.trace import Timings
from slatewise.schemas import CLOSED, Ids, RankRequest

NAMES = {"/candidates/item_ids": "/texts", "/user": "/query", "/history": "/query/history"}


class TeiRequest(ForeignModel):
    """A call of Text Embeddings Inference. Other members are ignored; scores are probabilities, never raw."""

    query: AnyQuery
    texts: Ids = Field(description="Ids of the items to rank.")
    return_text: bool = Field(False, strict=True)


@with_config(CLOSED)
class TeiResult(TypedDict):
    index: int
    score: float
    text: NotRequired[str]


class TeiError(BaseModel):
    error: str
    error_type: Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Empty"]


class NoTexts(RankingError):
    """Text Embeddings Inference answers an empty list with 400, and other invalid requests with 422."""

    status = 400
    title = "No texts"


def parse(incoming: Incoming) -> tuple[RankRequest, bool]:
    """Parse a call. The second result is whether the texts are to be returned."""
    sent = parse_as(TeiRequest, incoming.body)
    if not sent.texts:
        raise NoTexts("`texts` cannot be empty")
    return rank_request(sent.texts, **members_of_query(sent.query, incoming.limits)), sent.return_text


def render(request: RankRequest, return_text: bool, ranking: Ranking, timings: Timings) -> Response:
    index, scores = ranked(ranking, None)
    columns: dict[str, list[Any]] = {"index": index, "score": scores}
    if return_text:
        columns["text"] = list(map(request.candidates.item_ids.__getitem__, index))
    return respond(render_rows(columns), request, timings, warnings_of(ranking))


def render_error(error: RankingError, identifier: str) -> Response:
    error = renamed(error, NAMES)
    kind, status = kind_of(error)
    body = TeiError(error=error.detail, error_type=kind)
    headers = error_headers(error, identifier)
    return Response(body.model_dump_json(), status, headers, media_type="application/json")


def kind_of(error: RankingError) -> tuple[Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Empty"], int]:
    """Return the error type and the status that Text Embeddings Inference has for an error."""
    if isinstance(error, NoTexts):
        return "Empty", error.status
    if error.status == 500:
        return "Backend", 424
    if error.status == 503:
        return "Unhealthy", 503
    if error.status in (429, 504):
        return "Overloaded", error.status
    return "Validation", error.status


DIALECT: Dialect[bool] = Dialect(
    path="/tei/rerank",
    name="rerank_as_tei",
    description="Rank item ids as the call of Text Embeddings Inference: the query is a user.",
    parse=parse,
    render=render,
    render_error=render_error,
    body=TeiRequest,
    answer=list[TeiResult],
    responses=documented_errors(TeiError)
    | {424: {"model": TeiError, "description": "The model failed on this request."}},
)
