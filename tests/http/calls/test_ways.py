"""Foreign bodies are read in a quick way and in a slow one: the quick way has no other result, for right and wrong
bodies, and it is the way of the bodies that clients send.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from slatewise.bundle.loader import load_rankers
from slatewise.errors import RankingError
from slatewise.http.calls import cohere, metarank
from slatewise.http.calls.common import members_of_query, parse_as
from slatewise.http.calls.rows import read_rows
from slatewise.http.dialect import Incoming
from slatewise.ranking.admission import RequestLimits
from slatewise.ranking.registry import Registry
from tests.conftest import DEMO
from tests.http.calls.support import MODEL

LIMITS = RequestLimits(256, 50_000, 10**6, 10.0, 50_000, 4096, 4096, 0.0)

PIECES = [
    '"',
    "\\",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    " ",
    "\n",
    "\t",
    "1",
    "null",
    "true",
    '"id"',
    '"value"',
    '"items": [',
]
PIECES += [
    '}, {"id": ',
    '"}, {"id": "',
    '"fields": [',
    '"documents": [',
    '"name": "year", "value": ',
    "\\u0000",
    ',"x":1',
]
RIGHT = (
    st.text("abü}", min_size=1, max_size=3)
    | st.text("ab", min_size=1)
    | st.sampled_from(["id: x", "id: 'x'\n", *PIECES])
)
WORDS = RIGHT | st.text(max_size=3)
SCALARS = st.one_of(WORDS, st.integers(), st.floats(), st.booleans(), st.none(), st.just(10**400), st.just("x" * 257))
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2))


def mostly(right: st.SearchStrategy[Any], other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 7).flatmap(lambda number: right if number else other)


@st.composite
def bodies(draw: st.DrawFn, contents: st.SearchStrategy[Any]) -> bytes:
    """JSON as programs write it: mostly right, else with a piece of the text left out, put in or put in twice."""
    separators = draw(st.sampled_from([(", ", ": "), (",", ":"), (" , ", " :\t")]))
    indent = draw(st.sampled_from([None, None, None, 1]))
    text = json.dumps(draw(contents), separators=separators, indent=indent, ensure_ascii=draw(st.booleans()))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at, to = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        text = text[:at] + draw(st.sampled_from([text[to:], text[at:to] + text[at:], *(p + text[at:] for p in PIECES)]))
    return text.encode("utf-8", "surrogatepass")


def equal_rows(row: st.SearchStrategy[Callable[[Any], Any]], values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Rows of one form, each with another value in it."""
    return st.tuples(row, st.lists(values, min_size=2, max_size=5) | st.lists(values, max_size=1)).map(
        lambda drawn: [drawn[0](value) for value in drawn[1]]
    )


def outcome(function: Callable[[], Any]) -> Any:
    """The result, or the error as a client gets it. NaN equals NaN."""
    try:
        return "right", repr(function())
    except RankingError as error:
        return type(error), error.status, error.detail, error.faults


FORMS: list[Callable[[Any], Any]] = [
    lambda v: v,
    lambda v: {"id": v},
    lambda v: {"text": v},
    lambda v: {"id": v, "title": "a"},
    lambda v: {"title": {"id": "a"}, "id": v},
    lambda v: {"id": "a", "text": v},
    lambda v: {"title": v, "id": "a"},
    lambda v: {"id": [v]},
    lambda v: {"id": v, "x": [{"id": v}]},
    lambda v: yaml.dump({"id": v}) if isinstance(v, (str, int, float)) else v,
]
DOCUMENTS = mostly(
    equal_rows(st.sampled_from(FORMS[:5]), RIGHT),
    equal_rows(st.sampled_from(FORMS), RIGHT | SCALARS) | st.lists(ANYTHING, max_size=3) | ANYTHING,
)
PAST = {"user": "a", "history": {"item_ids": ["1"], "timestamps": [1, None], "offset": 3}, "request_time": 7}
CALLS = st.fixed_dictionaries(
    {"query": mostly(st.sampled_from(["a", 1, PAST, json.dumps(PAST)]), ANYTHING), "documents": DOCUMENTS},
    optional={
        "top_n": mostly(st.integers(1, 3), SCALARS),
        "return_documents": mostly(st.booleans(), SCALARS),
        "more": mostly(RIGHT, ANYTHING),
    },
)


def read(body: bytes) -> Any:
    sent, documents = cohere.read(body)
    ids = cohere.item_ids(documents)
    return translated(sent, documents, ids)


def read_slowly(body: bytes) -> Any:
    sent = parse_as(cohere.CohereRequest, body)
    ids = [cohere.item_id(document, position) for position, document in enumerate(sent.documents)]
    return translated(sent, sent.documents, ids)


def translated(sent: cohere.CohereRequest, documents: list[Any], ids: list[str]) -> Any:
    return (
        ids,
        cohere.texts_of(documents, ids),
        sent.model_dump(exclude={"documents"}),
        members_of_query(sent.query, LIMITS),
    )


@given(bodies(CALLS))
@example(b'{"query": "a", "documents": [{"id": "b"}, {"id": "c"}], "documents": [{"id": "d"}, {"id": "e"}]}')
@example(b'{"query": "a", "x": {"documents": [{"id": "b"}, {"id": "c"}]}, "documents": ["d"]}')
@example(b'{"query": "a", "documents": ["id: a\\n\\u0000id: b\\n", "c"]}')
@example(b'{"query": "a", "documents": ["\\u0069d: \'a\'\\n", "id: b\\n"]}')
@example(b'{"query": "a", "documents": [{"id": "b", "x": [{"id": "c", "x": [{"id": "d", "x": []}]}]}]}')
def test_documents_are_read_alike(body: bytes) -> None:
    assert outcome(lambda: read(body)) == outcome(lambda: read_slowly(body))


@given(st.lists(st.text("ab1 '\n\0:#", min_size=1, max_size=4) | st.integers(), min_size=1, max_size=4), st.booleans())
def test_short_yaml_is_read_as_each_document_is(ids: list[str | int], written: bool) -> None:
    """Written by yaml.dump, and with the same beginning but any text behind it."""
    documents = [yaml.dump({"id": i}) if written else f"id: {i}\n" for i in ids]
    found = outcome(lambda: cohere.item_ids(documents))
    assert found == outcome(lambda: [cohere.item_id(document, k) for k, document in enumerate(documents)])
    if written and "".join(map(str, ids)).isprintable():
        assert found == ("right", repr(list(map(str, ids))))


@cache
def registry() -> Registry:
    return Registry(load_rankers(DEMO, ("int8",)).values())


def incoming(body: bytes, path: Mapping[str, str] = {"model": MODEL}) -> Incoming:
    return Incoming(body, Headers({}), path, registry(), LIMITS)


def field(name: Any, value: Any) -> dict[str, Any]:
    return {"name": name, "value": value}


ITEMS: list[Callable[[Any], Any]] = [
    lambda v: {"id": v},
    lambda v: {"id": "a", "fields": [field("year", v)]},
    lambda v: {"id": f"a{v}"[:200], "fields": [field("year", 1990), field("genres", v), field("price", v)]},
    lambda v: {"id": f"a{v}"[:200], "fields": [field("genres", "Drama"), field("year", v)], "label": 1},
    lambda v: {"id": "a", "fields": [field("year", v), field("year", 1)]},
    lambda v: {"id": "a", "fields": [field(v, 1), field("year", 2)]},
    lambda v: {"fields": [field("year", v)], "id": "a"},
    lambda v: {"id": "a", "fields": [field("genres", [v])]},
    lambda v: {"id": "a", "fields": [], "x": {"value": v}},
    lambda v: {"id": "a", "fields": v},
]
EVENTS = st.fixed_dictionaries(
    {
        "items": mostly(
            equal_rows(st.sampled_from(ITEMS), RIGHT) | equal_rows(st.sampled_from(ITEMS), SCALARS),
            st.lists(ANYTHING, max_size=3) | ANYTHING,
        )
    },
    optional={
        "user": mostly(RIGHT, SCALARS),
        "timestamp": mostly(st.just("1700000000000"), SCALARS),
        "id": SCALARS,
        "more": mostly(RIGHT, ANYTHING),
    },
)


@given(bodies(EVENTS))
@example(b'{"items": [{"id": "a", "fields": [{"name": "year", "value": 1, "value": 2}]}, {"id": "b"}]}')
@example(
    b'{"items": [{"id": "a", "fields": [{"name": "year", "value": 1, "fields": [{"name": "year", "value": 2}]}]}]}'
)
@example(b'{"items": [{"id": "a"}, {"id": "b"}], "items": [{"id": "c"}, {"id": "d"}]}')
@example(b'{"x": {"items": [{"id": "a"}, {"id": "b"}]}, "\\u0069tems": [{"id": "c"}, {"id": "d"}]}')
@example(json.dumps({"items": [{"id": str(k)} for k in range(5000)]}).encode())
def test_items_are_read_alike(body: bytes) -> None:
    assert outcome(lambda: metarank.parse(incoming(body))) == outcome(lambda: metarank.parse_items(incoming(body)))


def test_ranker_that_is_not_served_is_found_both_ways() -> None:
    sent = incoming(b'{"items": [{"id": "a"}, {"id": "b"}]}', {"model": "none"})
    assert outcome(lambda: metarank.parse_rows(sent)) == outcome(lambda: metarank.parse_items(sent))


@given(bodies(st.fixed_dictionaries({"a": equal_rows(st.sampled_from(ITEMS), SCALARS) | ANYTHING, "b": ANYTHING})))
def test_rows_are_those_of_the_json(body: bytes) -> None:
    """The rows can be made again from the columns; a body that is no JSON is refused."""
    with suppress(ValueError):
        content, keys, columns = read_rows(body, "a", "id|value")
        whole = json.loads(body)
        assert len(content["a"]) == 1 and content["a"][0] == whole["a"][0] and content["b"] == whole["b"]
        assert repr([found(row, keys) for row in whole["a"]]) == repr(list(map(list, zip(*columns))))


def found(value: Any, keys: list[str]) -> list[Any]:
    """The scalars of these keys in a row, in their order."""
    if isinstance(value, list):
        return [scalar for element in value for scalar in found(element, keys)]
    if not isinstance(value, dict):
        return []
    return [
        scalar
        for key, member in value.items()
        for scalar in ([member] if key in keys and not isinstance(member, (list, dict)) else found(member, keys))
    ]


IDS = ["318", "B07", "ü", 'a"b', "back\\slash"]


@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":")], ids=["Python", "JavaScript"])
def test_bodies_of_clients_take_the_quick_way(separators: tuple[str, str]) -> None:
    def dumped(**members: Any) -> bytes:
        return json.dumps(members, separators=separators).encode()

    for key in ("id", "text"):
        sent, ids = cohere.read_equal_objects(dumped(query="a", documents=[{key: i} for i in IDS], top_n=3))
        assert ids == IDS and sent.top_n == 3
        documents = [{key: i, "title": f"title of {i}"} for i in IDS]
        assert cohere.read_one_form(dumped(query="a", documents=documents))[1] == IDS
    assert cohere.read_one_form(dumped(query="a", documents=IDS))[1] == IDS
    fields = [[field("year", 1990 + k), field("price", k)] for k in range(len(IDS))]
    items = [{"id": i, "fields": f} for i, f in zip(IDS, fields)]
    request, ignored = metarank.parse_rows(incoming(dumped(user="a", items=items)))
    assert request.candidates.item_ids == IDS and ignored == {"price": len(IDS)}
    assert request.candidates.features == {"year": [1990.0 + k for k in range(len(IDS))]}
