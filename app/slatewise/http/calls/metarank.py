"""POST /rank/{model}, as Metarank has it. Numeric item fields become features, other known ones describe new items.

Called by: `rank.py` through the dialect. Calls: `common.py` and `rows.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from typing import Annotated, Any, NotRequired

from pydantic import Field, SkipValidation, ValidationError, with_config
from pydantic_core import from_json
from starlette.responses import Response
from typing_extensions import TypedDict

from slatewise.bundle.ranker import Ranker
from slatewise.errors import Invalid, NotJson, RankingError
from slatewise.http.body import check_names
from slatewise.http.calls.common import (
    ForeignModel,
    check_count,
    checked_ids,
    rank_request,
    ranked,
    renamed,
    request_id,
    respond,
    warnings_of,
)
from slatewise.http.calls.rows import read_rows, render_rows, with_member
from slatewise.http.dialect import Dialect, Incoming
from slatewise.http.problems import PROBLEMS, problem, schema_error
from slatewise.ranking.pipeline import Ranking
from slatewise.ranking.trace import Timings
from slatewise.schemas import CLOSED, LAST_TIME, MAX_ID, Candidates, Id, Integer, RankRequest, Text, User

NAMES = {"/candidates/item_ids": "/items", "/candidates": "/items"}
NUMBERS: set[type] = {int, float, bool}  # values that can be features
WORDS: set[type] = {str, list}  # values that can be fields
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
    ignored: Counter[str]


def parse(incoming: Incoming) -> tuple[RankRequest, dict[str, int]]:
    """Parse a call. The second result has the number of ignored values by the names of their fields.

    The first way is for items that have the same fields, as programs write them. It takes half of the time for a field
    of each item. The second way is for all other bodies, right and wrong. It is the reference: where the first way has
    a result, the results are equal.
    """
    try:
        return parse_rows(incoming)
    except (ValueError, TypeError, KeyError, OverflowError):
        return parse_items(incoming)


def parse_rows(incoming: Incoming) -> tuple[RankRequest, dict[str, int]]:
    """Parse a call without an object for each item. Raises RankingError as `parse_items` does, or one of the above."""
    content, keys, columns = read_rows(incoming.body, "items", "id|value")
    sent = MetarankRequest.model_validate(content)
    first = sent.items[0]
    fields = first.get("fields") or []
    if keys != ["id"] + ["value"] * len(fields) or [column[0] for column in columns] != [
        first["id"],
        *(field["value"] for field in fields),
    ]:
        raise ValueError("a key is somewhere else")
    ids = checked_ids(columns[0])
    check_count("/items", len(ids), incoming.limits)
    ranker = incoming.registry.resolve(incoming.path["model"])
    names = [field["name"] for field in fields]
    return rank_request_of(sent, ids, ranker, columns_of_fields(names, columns[1:], ranker))


def parse_items(incoming: Incoming) -> tuple[RankRequest, dict[str, int]]:
    """Parse any call. Raises NotJson, Invalid or NotFound."""
    sent = read(incoming.body)
    items = sent.items
    check_count("/items", len(items), incoming.limits)
    ranker = incoming.registry.resolve(incoming.path["model"])
    ids = ids_of(items)
    try:
        return rank_request_of(sent, ids, ranker, columns_of_items(items, ranker))
    except ValidationError as error:
        raise renamed(schema_error(error), {"/features": "/items", "/fields": "/items"}) from None


def rank_request_of(
    sent: MetarankRequest, ids: list[str], ranker: Ranker, columns: Columns
) -> tuple[RankRequest, dict[str, int]]:
    """Raises Invalid for the time, and ValidationError for the columns."""
    request = rank_request(
        ids,
        id=request_id(sent.id),
        ranker=ranker.name,
        user=sent.session if sent.user is None else sent.user,
        request_time=None if sent.timestamp is None else seconds(sent.timestamp),
    )
    if not columns.features and not columns.fields:
        return request, dict(columns.ignored.most_common(MOST_NAMES))
    checked = Candidates(item_ids=["0"], features=columns.features, fields=columns.fields)  # the ids are checked
    candidates = checked.model_copy(update={"item_ids": ids})
    return request.model_copy(update={"candidates": candidates}), dict(columns.ignored.most_common(MOST_NAMES))


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
        return checked_ids(ids)
    except ValidationError as error:
        raise renamed(schema_error(error), {"": "/items"}) from None


def columns_of_fields(names: list[str], values: list[list[Any]], ranker: Ranker) -> Columns:
    """Sort the columns of fields that all items have. No work for each item. Raises ValueError, TypeError or
    OverflowError if that needs a look at each value.
    """
    if len(set(names)) < len(names) or not set(map(type, names)) <= {str}:
        raise ValueError("a name comes twice, or is no text")
    columns = Columns({}, {}, Counter())
    for name, column in zip(names, values):
        kinds = set(map(type, column))
        numbers = NUMBERS if name in ranker.manifest.features else set()
        words = WORDS if name in ranker.manifest.fields else set()
        if not kinds & (numbers | words):
            columns.ignored[name[:MAX_ID]] += len(column)
        elif kinds <= numbers:
            columns.features[name] = list(map(float, column)) if bool in kinds else column
        elif kinds <= words:
            columns.fields[name] = column
        else:
            raise ValueError("the values are of several kinds")
    return columns


def columns_of_items(items: list[MetarankItem], ranker: Ranker) -> Columns:
    """Turn the fields of any items into columns, one value after the other. Raises Invalid.

    A name counts as ignored if the ranker lacks it, or lacks its type.
    """
    features: dict[str, list[Any]] = {}
    fields: dict[str, list[Any]] = {}
    ignored: Counter[str] = Counter()
    if set(map(len, items)) == {1}:  # ids alone
        return Columns(features, fields, ignored)
    for position, item in enumerate(items):
        try:
            for name, value in pairs_of(item):
                if name in ranker.manifest.features and isinstance(value, (int, float)):
                    features.setdefault(name, [None] * len(items))[position] = float(value)
                elif name in ranker.manifest.fields and isinstance(value, (str, list)):
                    fields.setdefault(name, [None] * len(items))[position] = value
                else:
                    ignored[name[:MAX_ID]] += 1
        except (KeyError, TypeError, OverflowError):
            detail = f"must be a list of at most {MOST_FIELDS} objects with `name` and `value`, and numbers finite"
            raise Invalid.at(f"/items/{position}/fields", detail) from None
    return Columns(features, fields, ignored)


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
    return respond(with_member(content, "items", rows), request, timings, warnings_of(ranking))


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
