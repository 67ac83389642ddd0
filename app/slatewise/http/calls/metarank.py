"""POST /rank/{model}, as Metarank has it. Numeric item fields become features, other known ones describe new items.

Called by: `rank.py` through the dialect. Calls: `common.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from typing import Annotated, Any, NotRequired

from pydantic import Field, SkipValidation, TypeAdapter, ValidationError, with_config
from pydantic_core import from_json
from starlette.responses import Response
from typing_extensions import TypedDict

from slatewise.bundle.ranker import Ranker
from slatewise.errors import Invalid, NotJson, RankingError
from slatewise.http.body import check_names
from slatewise.http.calls.common import (
    ForeignModel,
    check_count,
    rank_request,
    ranked,
    renamed,
    request_id,
    respond,
    warnings_of,
)
from slatewise.http.calls.rows import render_rows, with_member
from slatewise.http.dialect import Dialect, Incoming
from slatewise.http.problems import PROBLEMS, problem, schema_error
from slatewise.ranking.pipeline import Ranking
from slatewise.ranking.trace import Timings
from slatewise.schemas import CLOSED, LAST_TIME, MAX_ID, Candidates, Column, Id, Ids, Integer, RankRequest, Text, User

NAMES = {"/candidates/item_ids": "/items", "/candidates": "/items"}
IDS: TypeAdapter[list[str]] = TypeAdapter(Ids)
TEXTS: TypeAdapter[list[str]] = TypeAdapter(Column[Text])
MOST_MEMBERS = 32_768  # of all objects of a body
MOST_FIELDS = 1_000  # of one item
MOST_NAMES = 20  # most names of ignored fields in one answer


class MetarankField(TypedDict):
    name: Text
    value: Any


class MetarankItem(TypedDict):
    id: Id
    fields: NotRequired[list[MetarankField] | None]


class MetarankRequest(ForeignModel):
    """A ranking event of Metarank. Other members are ignored."""

    id: Any = Field(None, description="Id of the request, if it is 1 to 128 printable characters without spaces.")
    timestamp: Annotated[str, Field(max_length=64, strict=True)] | Integer | None = Field(
        None, description="Milliseconds, also as text, or ISO 8601; default: now."
    )
    user: User | None = None
    session: User | None = Field(None, description="Stands for the user if there is none.")
    items: list[SkipValidation[MetarankItem]] = Field(min_length=1)


@with_config(CLOSED)
class MetarankResult(TypedDict):
    item: str
    score: float


@with_config(CLOSED)
class MetarankAnswer(TypedDict):
    took: int
    items: list[MetarankResult]
    ignored_fields: Annotated[
        dict[str, int], Field(description="For each name of `items[].fields` without use: the number of values.")
    ]


@dataclass(frozen=True)
class Columns:
    """The fields of the items as columns of candidates, and the numbers of values that no column takes."""

    features: dict[str, list[Any]]
    fields: dict[str, list[Any]]
    ignored: dict[str, int]


def parse(incoming: Incoming) -> tuple[RankRequest, dict[str, int]]:
    """Parse a call. The second result has the number of ignored values by the names of their fields."""
    sent = read(incoming.body)
    items = sent.items
    check_count("/items", len(items), incoming.limits)
    ranker = incoming.registry.resolve(incoming.path["model"])
    ids = ids_of(items)
    request = rank_request(
        ids,
        id=request_id(sent.id),
        ranker=ranker.name,
        user=sent.session if sent.user is None else sent.user,
        request_time=None if sent.timestamp is None else seconds(sent.timestamp),
    )
    if set(map(len, items)) == {1} or not any("fields" in item for item in items):
        return request, {}
    columns = columns_of(items, ranker)
    try:
        candidates = Candidates(item_ids=ids, features=columns.features, fields=columns.fields)
    except ValidationError as error:
        raise renamed(schema_error(error), {"/features": "/items", "/fields": "/items"}) from None
    return request.model_copy(update={"candidates": candidates}), columns.ignored


def read(body: bytes) -> MetarankRequest:
    """Parse a body, all but its items. Raises NotJson or Invalid.

    Pydantic takes twice as long for a thousand objects as `from_json` and the checks below.
    """
    check_names(body, MOST_MEMBERS)
    try:
        content = from_json(body, cache_strings="keys")
    except ValueError as error:
        raise NotJson(str(error)) from None
    try:
        return MetarankRequest.model_validate(content)
    except ValidationError as error:
        raise schema_error(error) from None


def ids_of(items: list[MetarankItem]) -> list[str]:
    """Check the items and return their ids. Raises Invalid."""
    try:
        ids = list(map(itemgetter("id"), items))
    except (KeyError, TypeError):
        right = [isinstance(item, dict) and "id" in item for item in items]
        raise Invalid.at(f"/items/{right.index(False)}", "must be an object with `id`") from None
    try:
        return TEXTS.validate_python(ids)  # three times as fast as IDS, and nearly always right
    except ValidationError:
        pass
    try:
        return IDS.validate_python(ids)
    except ValidationError as error:
        raise renamed(schema_error(error), {"": "/items"}) from None


def columns_of(items: list[MetarankItem], ranker: Ranker) -> Columns:
    """Turn the fields of items into columns. A name counts as ignored if the ranker lacks it, or lacks its type."""
    features: dict[str, list[Any]] = {name: [None] * len(items) for name in ranker.manifest.features}
    fields: dict[str, list[Any]] = {name: [None] * len(items) for name in ranker.manifest.fields}
    ignored: Counter[str] = Counter()
    for position, item in enumerate(items):
        try:
            for name, value in pairs_of(item):
                if name in features and isinstance(value, (int, float)):
                    features[name][position] = float(value)
                elif name in fields and isinstance(value, (str, list)):
                    fields[name][position] = value
                else:
                    ignored[name[:MAX_ID]] += 1
        except (KeyError, TypeError, OverflowError):
            detail = f"must be a list of at most {MOST_FIELDS} objects with `name` and `value`, and numbers finite"
            raise Invalid.at(f"/items/{position}/fields", detail) from None
    return Columns(features, fields, dict(ignored.most_common(MOST_NAMES)))


def pairs_of(item: MetarankItem) -> Iterator[tuple[str, Any]]:
    """Yield names and values of one item's fields. Raises KeyError or TypeError if they are malformed."""
    listed = item.get("fields") or ()
    if len(listed) > MOST_FIELDS:
        raise TypeError
    for field in listed:
        if not isinstance(field["name"], str):
            raise TypeError
        yield field["name"], field["value"]


def seconds(timestamp: str | int) -> float:
    """Convert milliseconds, also as text, or ISO 8601 (without a zone: UTC) to unix seconds. Raises Invalid."""
    try:
        if isinstance(timestamp, int) or (timestamp.isascii() and timestamp.isdecimal()):
            result = int(timestamp) / 1e3
        else:
            moment = datetime.fromisoformat(timestamp)
            result = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise Invalid.at("/timestamp", "must be milliseconds since 1970, or ISO 8601") from None
    if not 0 <= result <= LAST_TIME:
        raise Invalid.at("/timestamp", f"must lie between 0 and {LAST_TIME * 1000} milliseconds since 1970")
    return result


def render(request: RankRequest, ignored: dict[str, int], ranking: Ranking, timings: Timings) -> Response:
    index, scores = ranked(ranking, None)
    ids = request.candidates.item_ids
    rows = render_rows({"item": list(map(ids.__getitem__, index)), "score": scores})
    content = {"took": round((timings.marked - timings.entered) * 1e3), "ignored_fields": ignored}
    return respond(with_member(content, "items", rows), request, timings, warnings_of(request, ranking))


def render_error(error: RankingError, identifier: str) -> Response:
    """Render an error as the native calls do: Metarank defines no shape."""
    return problem(renamed(error, NAMES), identifier)


DIALECT: Dialect[dict[str, int]] = Dialect(
    path="/rank/{model}",
    name="rank_as_metarank",
    description="Rank items as the call of Metarank. `explain` is accepted and has no effect.",
    parse=parse,
    render=render,
    render_error=render_error,
    body=MetarankRequest,
    answer=MetarankAnswer,
    responses=PROBLEMS,
    any_type=True,
)
