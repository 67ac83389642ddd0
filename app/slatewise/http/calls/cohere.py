"""POST /v2/rerank and /v1/rerank, as Cohere and Jina have them. The documents are item ids, the query is a user.

Also called by LiteLLM, rerankers, LangChain, Gorse, Weaviate and Elasticsearch's custom service.

Called by: `rank.py` through the dialects. Calls: `common.py` and `rows.py`.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from functools import partial
from itertools import repeat
from operator import contains, itemgetter
from typing import Annotated, Any, NotRequired

from pydantic import BaseModel, Field, SkipValidation, with_config
from pydantic_core import from_json
from starlette.responses import Response
from typing_extensions import TypedDict

from slatewise.errors import Invalid, RankingError
from slatewise.http.calls.common import (
    LOWEST_PRIORITY,
    AnyQuery,
    ForeignModel,
    Otherwise,
    check_count,
    checked_ids,
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
from slatewise.http.calls.rows import read_rows, render_rows, with_member
from slatewise.http.dialect import Dialect, Incoming
from slatewise.ranking.pipeline import Ranking
from slatewise.ranking.trace import Timings
from slatewise.schemas import CLOSED, MAX_ID, Column, FaultBody, Id, Integer, RankRequest, Text

NAMES = {
    "/candidates/item_ids": "/documents",
    "/candidates": "/documents",
    "/user": "/query",
    "/history": "/query/history",
    "/ranker": "/model",
}
YAML_START = "id: "  # LangChain sends a document with rank_fields=["id"] as YAML
YAML_ID = re.compile(r"""id: (?:'((?:[^']|'')*)'|"((?:[^"\\]|\\.)*)"|([^\n]*))(?:\n|$)""")
YAML_FOLD = re.compile(r"\n +")  # a long scalar goes on in indented lines
YAML_ESCAPE = re.compile(r"\\(x..|u....|U........|.)")
SIMPLE_YAML = re.compile(  # of documents joined by zeros: `id` alone, short and without escapes
    rf"""(?:\A|\0)id: (')?([^'"\s\0]{{1,{MAX_ID}}})(?(1)')\n(?=\0|\Z)"""
)
MOST_YAML = 100_000  # characters of one document in YAML
YAML_START_LENGTH = 10_000  # characters that `id` may take, escaped and folded


class DocumentObject(TypedDict):
    """A document as an object: the id of an item in `id` or, as Jina and Pinecone have it, in `text`."""

    id: NotRequired[Id]
    text: NotRequired[Id]


Document = Annotated[  # the most frequent forms first: each failed attempt takes time
    Text
    | DocumentObject
    | Integer
    | Annotated[str, Field(pattern=f"^{YAML_START}", max_length=MOST_YAML, strict=True)],
    Field(union_mode="left_to_right"),
    Otherwise(f"must be the id of an item, of 1 to {MAX_ID} characters, or an object with `id`; texts are not ranked"),
]


class CohereRequest(ForeignModel):
    """A call of Cohere v2 or v1, or of Jina. Other members are ignored."""

    model: Text | None = Field(None, description="Name of the ranker; optional if the server has only one.")
    query: AnyQuery
    documents: Annotated[Column[Document], Field(min_length=1, description="Ids of the items to rank.")]
    top_n: int | None = Field(None, ge=1, strict=True)
    priority: int | None = Field(None, ge=0, le=999, strict=True, description="Lower is more important.")
    return_documents: bool | None = Field(None, strict=True)


class UncheckedDocuments(CohereRequest):
    """The same call before its documents are looked at."""

    documents: list[SkipValidation[Any]] = Field(min_length=1)


@with_config(CLOSED)
class CohereResult(TypedDict):
    index: int
    relevance_score: float
    document: NotRequired[dict[str, str]]


@with_config(CLOSED)
class CohereAnswer(TypedDict):
    id: str
    model: str
    results: list[CohereResult]
    usage: dict[str, int]
    meta: dict[str, Any]


class CohereError(BaseModel):
    """Cohere's clients show the body, Weaviate reads `message`, LangChain's Jina class reads `detail`."""

    id: str
    message: str
    detail: str
    errors: list[FaultBody] = []


def parse(incoming: Incoming) -> tuple[RankRequest, list[Any] | None]:
    """Parse a call. The second result is its documents, if they are to be returned."""
    sent, documents = read(incoming.body)
    check_count("/documents", len(documents), incoming.limits)
    request = rank_request(
        item_ids(documents),
        ranker=sent.model,
        top_n=sent.top_n,
        priority=None if sent.priority is None else min(sent.priority, LOWEST_PRIORITY),
        **members_of_query(sent.query, incoming.limits),
    )
    return request, documents if sent.return_documents else None


def read(body: bytes) -> tuple[CohereRequest, list[Any]]:
    """Return a call and its documents, objects by their ids if all documents are objects. Raises NotJson or Invalid.

    The first two ways are for documents of one form. They take half of the time for a thousand objects, which Pydantic
    would build twice. The last way is for all other bodies, right and wrong. It is the reference: where another way has
    a result, the results are equal.
    """
    for read_quickly in (read_equal_objects, read_one_form):
        with suppress(ValueError, TypeError, KeyError):
            return read_quickly(body)
    sent = parse_as(CohereRequest, body)
    return sent, sent.documents


def read_equal_objects(body: bytes) -> tuple[CohereRequest, list[str]]:
    """Read documents that are objects with nothing but one `id` or `text`, or with equal other members.

    Raises ValueError, TypeError or KeyError for any other body.
    """
    content, keys, columns = read_rows(body, "documents", "id|text")
    sent = UncheckedDocuments.model_validate(content)
    first = sent.documents[0]
    if len(keys) > 1 or first.keys() & {"id", "text"} != {keys[0]} or first[keys[0]] != columns[0][0]:
        raise ValueError("a key is somewhere else")
    return sent, ids_of_objects(columns[0])


def read_one_form(body: bytes) -> tuple[CohereRequest, list[str]]:
    """Read documents that are all ids, or all objects with `id` or all with `text`.

    Raises ValueError, TypeError or KeyError for any other body.
    """
    sent = UncheckedDocuments.model_validate(from_json(body, cache_strings="keys"))
    documents = sent.documents
    if not isinstance(documents[0], dict):
        return sent, checked_ids(documents)
    name, other = ("id", "text") if "id" in documents[0] else ("text", "id")
    if any(map(contains, documents, repeat(other))):
        raise KeyError(other)
    return sent, ids_of_objects(list(map(itemgetter(name), documents)))


def ids_of_objects(ids: list[Any]) -> list[str]:
    """Check the ids that objects have. Raises ValueError, also for YAML, which is returned without its quotes."""
    ids = checked_ids(ids)
    if has_yaml("\0".join(ids)):
        raise ValueError("YAML in an object")
    return ids


def has_yaml(text: str) -> bool:
    """Whether a document may be YAML. text: the documents, joined by zeros."""
    return "\0" + YAML_START in "\0" + text


def item_ids(documents: list[Any]) -> list[str]:
    """Return the ids of the items that documents name. Plain ids cost no work for each document. Raises Invalid."""
    if set(map(type, documents)) <= {str}:
        text = "\0".join(documents)
        if not has_yaml(text):
            return documents
        ids = ids_in_short_yaml(text)
        if len(ids) == len(documents) == text.count("\0") + 1:  # else a document has a zero itself
            return ids
    return [item_id(document, position) for position, document in enumerate(documents)]


def ids_in_short_yaml(text: str) -> list[str]:
    """Return the ids of documents in YAML with `id` alone, short and without escapes; fewer ids if any is different.

    text: the documents, joined by zeros. yaml.dump writes `id: '1193'` for texts that look like numbers, and `id: B07`
    for most others.
    """
    start, end = YAML_START + "'", "'\n"
    if text.startswith(start) and text.endswith(end):
        ids = text[len(start) : -len(end)].split(end + "\0" + start)
        n = len(ids)
        if [text.count(c) for c in "\0\n'"] == [n - 1, n, 2 * n] and all(ids):
            return ids  # since each document is one quoted text in one line
    return [match[1] for match in SIMPLE_YAML.findall(text)]


def item_id(document: Any, position: int) -> str:
    """Return the id that one document names. Raises Invalid."""
    if isinstance(document, dict):
        document = document.get("id", document.get("text"))
        if document is None:
            raise Invalid.at(f"/documents/{position}", "the object has no `id`")
    if isinstance(document, str) and document.startswith(YAML_START):
        return id_in_yaml(document, position)
    return str(document)


def id_in_yaml(text: str, position: int) -> str:
    """Return the value of `id`, the first key of a YAML document: a plain or a quoted scalar. Raises Invalid."""
    text = text[:YAML_START_LENGTH]
    match = YAML_ID.match(YAML_FOLD.sub(" ", text) if "\n " in text else text)
    single, double, plain = match.groups() if match else (None, None, "")
    found = ""
    if single is not None:
        found = single.replace("''", "'")
    elif double is None:
        found = plain.strip()
    else:
        with suppress(ValueError, OverflowError):
            found = YAML_ESCAPE.sub(unescape, double).encode().decode()  # refuses half of a surrogate pair
    if not 1 <= len(found) <= MAX_ID:
        raise Invalid.at(f"/documents/{position}", f"its YAML has no `id` of 1 to {MAX_ID} characters")
    return found


def unescape(match: re.Match[str]) -> str:
    """Return the character of an escape sequence in YAML. Raises ValueError or OverflowError."""
    name = match[1]
    return json.loads(f'"\\{name}"') if len(name) == 1 else chr(int(name[1:], 16))


def render(
    version: str, request: RankRequest, documents: list[Any] | None, ranking: Ranking, timings: Timings
) -> Response:
    index, scores = ranked(ranking, request.top_n)
    columns: dict[str, list[Any]] = {"index": index, "relevance_score": scores}
    if documents is not None:
        columns["document.text"] = list(map(texts_of(documents, request.candidates.item_ids).__getitem__, index))
    warnings = warnings_of(ranking)
    tokens = ranking.history.used + ranking.candidates
    content = {
        "id": request.id or "",
        "model": ranking.ranker.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "meta": {"api_version": {"version": version}, "billed_units": {"search_units": 1}, "warnings": warnings},
    }
    return respond(with_member(content, "results", render_rows(columns)), request, timings, warnings)


def texts_of(documents: list[Any], ids: list[str]) -> list[str]:
    """Return the documents as text: as they were sent, or the id of an object."""
    if set(map(type, documents)) <= {str}:
        return documents
    return [sent if isinstance(sent, str) else identifier for sent, identifier in zip(documents, ids)]


def render_error(error: RankingError, identifier: str) -> Response:
    error = renamed(error, NAMES)
    body = CohereError(
        id=identifier,
        message=error.detail,
        detail=error.detail,
        errors=[FaultBody(pointer=fault.pointer, detail=fault.detail) for fault in error.faults],
    )
    headers = error_headers(error, identifier)
    return Response(body.model_dump_json(), error.status, headers, media_type="application/json")


DIALECTS: list[Dialect[list[Any] | None]] = [
    Dialect(
        path=f"/v{version}/rerank",
        name=f"rerank_as_cohere_v{version}",
        description=f"Rank item ids as the call of Cohere v{version} and Jina: the query is a user.",
        parse=parse,
        render=partial(render, version),
        render_error=render_error,
        body=CohereRequest,
        answer=CohereAnswer,
        responses=documented_errors(CohereError),
    )
    for version in ("2", "1")
]
