"""POST /personalize-ranking, as Amazon Personalize has it: GetPersonalizedRanking of boto3 with `endpoint_url`.

Called by: `rank.py` through the dialect; `auth.py` and `events.py` for the errors. Calls: `common.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import BaseModel, Field, with_config
from starlette.datastructures import Headers
from starlette.responses import Response
from typing_extensions import TypedDict

from slatewise.errors import RankingError
from slatewise.http.calls.common import (
    ForeignModel,
    documented_errors,
    error_headers,
    parse_as,
    rank_request,
    ranked,
    renamed,
    respond,
    warnings_of,
)
from slatewise.http.calls.rows import render_rows, with_member
from slatewise.http.dialect import Dialect, Incoming
from slatewise.ranking.pipeline import Ranking
from slatewise.ranking.trace import Timings
from slatewise.schemas import CLOSED, MAX_ID, RankRequest, SomeIds, User

NAMES = {"/candidates/item_ids": "/inputList", "/user": "/userId", "/ranker": "/campaignArn"}
EXCEPTIONS = {  # status of this server -> exception of AWS and the status that goes with it
    401: ("UnrecognizedClientException", 403),
    404: ("ResourceNotFoundException", 404),
    429: ("ThrottlingException", 429),
    500: ("InternalServerException", 500),
    503: ("ServiceUnavailableException", 503),
    504: ("ServiceUnavailableException", 504),
}
OTHERWISE = "InvalidInputException", 400
ERROR_TYPE = "x-amzn-ErrorType"
SIGNATURE = "AWS4-HMAC-SHA256"  # the scheme of the header Authorization


class AwsRequest(ForeignModel):
    """A call of GetPersonalizedRanking. Other members are ignored."""

    campaign_arn: Annotated[str, Field(min_length=1, max_length=2_048, strict=True)] = Field(
        alias="campaignArn", description="Its part behind the last `/` is the name of the ranker."
    )
    user_id: User = Field(alias="userId")
    input_list: SomeIds = Field(alias="inputList", description="Ids of the items to rank.")
    filter_arn: Annotated[str, Field(strict=True)] | None = Field(
        None, alias="filterArn", description="Ignored, with a warning in a header."
    )


@with_config(CLOSED)
class AwsResult(TypedDict):
    itemId: str
    score: NotRequired[float]


@with_config(CLOSED)
class AwsAnswer(TypedDict):
    personalizedRanking: list[AwsResult]
    recommendationId: str


class AwsError(BaseModel):
    """The header x-amzn-ErrorType has the name of the exception."""

    message: str


def is_signed(headers: Headers) -> bool:
    """Whether a client of AWS sent the request. Clients sign in every case, also where a server has no keys."""
    return headers.get("authorization", "").startswith(SIGNATURE + " ")


def parse(incoming: Incoming) -> tuple[RankRequest, bool]:
    """Parse a call. The second result is whether the call has a filter, which is ignored."""
    sent = parse_as(AwsRequest, incoming.body)
    ranker = sent.campaign_arn.rsplit("/", 1)[-1][:MAX_ID]
    return rank_request(sent.input_list, ranker=ranker, user=sent.user_id), sent.filter_arn is not None


def render(request: RankRequest, filtered: bool, ranking: Ranking, timings: Timings) -> Response:
    """Render the ranking. `score` is optional at AWS, so an unscored item has none."""
    index, scores = ranked(ranking, None)
    columns: dict[str, list[Any]] = {"itemId": list(map(request.candidates.item_ids.__getitem__, index))}
    if ranking.scored is not None:
        columns["score"] = scores
    body = with_member({"recommendationId": request.id or ""}, "personalizedRanking", render_rows(columns))
    warnings = warnings_of(ranking) + ["filterArn is ignored"] * filtered
    return respond(body, request, timings, warnings)


def render_error(error: RankingError, identifier: str) -> Response:
    error = renamed(error, NAMES)
    name, status = EXCEPTIONS.get(error.status, OTHERWISE)
    detail = "the access key id must be a key of this server" if error.status == 401 else error.detail
    headers = error_headers(error, identifier) | {ERROR_TYPE: name}
    headers.pop("WWW-Authenticate", None)
    return Response(AwsError(message=detail).model_dump_json(), status, headers, media_type="application/json")


ERRORS: dict[int | str, dict[str, Any]] = {
    status: shown
    for status, shown in documented_errors(AwsError).items()
    if status in {431, OTHERWISE[1], *(status for _, status in EXCEPTIONS.values())}
}
ERRORS[403] = {"model": AwsError, "description": "The access key id is no key of this server."}

DIALECT: Dialect[bool] = Dialect(
    path="/personalize-ranking",
    name="get_personalized_ranking",
    description="Rank items as GetPersonalizedRanking of Amazon Personalize. The access key id is the API key.",
    parse=parse,
    render=render,
    render_error=render_error,
    body=AwsRequest,
    answer=AwsAnswer,
    responses=ERRORS,
    any_type=True,
)
