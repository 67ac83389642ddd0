"""The likely mistake is named in the error: another unit of time, rows, other names, the body of another API."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from slatewise.errors import MOST_FAULTS, Invalid, NotJson, RankingError
from slatewise.http.mistakes import OTHER_COLUMN_NAMES, OTHER_NAMES, wrong_request
from slatewise.schemas import Candidates, History, RankRequest
from tests.http.support import ask, assert_problem

NOW = 1_700_000_000
ITEMS = {"candidates": {"item_ids": ["1"]}}
SECRET = "s3cr3t"


def error_of(body: Any) -> RankingError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ValidationError) as caught:
        RankRequest.model_validate_json(raw)
    return wrong_request(caught.value, raw)


def faults_of(body: Any) -> dict[str, str]:
    return {fault.pointer: fault.detail for fault in error_of(body).faults}


UNITS = [
    ("milliseconds", 1_000),
    ("microseconds", 1_000_000),
    ("nanoseconds", 1_000_000_000),
]


@pytest.mark.parametrize(("unit", "factor"), UNITS)
@pytest.mark.parametrize("seconds", [100_000_000, 832_059_458, NOW, 9_999_999_999], ids=["1973", "1996", "now", "2286"])
def test_time_in_another_unit_is_named(unit: str, factor: int, seconds: int) -> None:
    for value in (seconds * factor, float(seconds * factor)):
        history = {"item_ids": ["1", "2"], "timestamps": [None, value]}
        found = faults_of(ITEMS | {"request_time": value, "history": history})
        assert list(found) == ["/history/timestamps/1", "/request_time"]
        for detail in found.values():
            assert detail.startswith("unix seconds are wanted") and unit in detail and f"{factor:,}" in detail


@pytest.mark.parametrize("value", [10**13, 10**20, 10**400, 1e308])
def test_time_in_no_unit_is_only_too_large(value: float) -> None:
    (detail,) = faults_of(ITEMS | {"request_time": value}).values()
    assert "look like" not in detail


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("2024-01-31", "ISO 8601"),
        ("2024-01-31T12:00:00+02:00", "ISO 8601"),
        ("1700000000", "quotes"),
        ("1700000000.5", "quotes"),
        ("yesterday", "not text"),
        ("", "not text"),
        ("9" * 100_000, "quotes"),
    ],
)
def test_time_as_text_is_named(text: str, hint: str) -> None:
    found = faults_of(ITEMS | {"request_time": text, "history": {"item_ids": ["1"], "timestamps": [text]}})
    assert len(found) == 2 and all("unix seconds" in detail and hint in detail for detail in found.values())


def test_nan_is_named_with_null_as_the_remedy() -> None:
    history = {"item_ids": ["1"], "timestamps": [math.nan]}
    candidates = {"item_ids": ["1"], "features": {"year": [math.nan]}}
    found = faults_of({"candidates": candidates, "history": history, "head_weights": {"like": math.inf}})
    assert found == {
        "/history/timestamps/0": "must be finite; a missing time is null",
        "/candidates/features/year/0": "must be a finite number; a missing value is null",
        "/head_weights/like": "must be a finite number",
    }


FOREIGN = [
    ({"query": "u1", "documents": ["1", "2"]}, "/v2/rerank"),
    ({"model": "m", "query": "u1", "documents": [{"id": "1"}], "top_n": 3, "return_documents": True}, "/v2/rerank"),
    ({"query": "u1", "texts": ["1"], "raw_scores": False}, "/tei/rerank"),
    ({"campaignArn": "a", "userId": "u", "inputList": ["1"]}, "/personalize-ranking"),
    ({"inputs": [{"name": "user", "shape": [1], "datatype": "BYTES", "data": ["u"]}]}, "/v2/models/{ranker}/infer"),
    ({"id": "r", "user": "u", "timestamp": "1700000000000", "items": [{"id": "1"}]}, "/rank/{ranker}"),
]


@pytest.mark.parametrize(("body", "path"), FOREIGN)
def test_body_of_another_api_is_told_its_path(client: httpx.Client, body: dict[str, Any], path: str) -> None:
    for endpoint in ("/rerank", "/score"):
        answer = assert_problem(client.post(endpoint, json=body), 422)
        assert answer["detail"].endswith(f"POST {path}") and len(answer["errors"]) == 1
        assert answer["errors"][0]["pointer"][1:] in body


@pytest.mark.parametrize("body", [{"query": "u"}, {"documents": ["1"]}, {"items": []}, {"items": ["1"]}, {"userId": 1}])
def test_other_bodies_are_sent_to_no_other_path(body: dict[str, Any]) -> None:
    assert "POST" not in error_of(body).detail


def test_native_body_with_foreign_members_stays_native() -> None:
    found = faults_of(ITEMS | {"query": "u", "documents": ["1"]})
    assert list(found) == ["/query", "/documents"] and "candidates.item_ids" in found["/documents"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("user_id", "user"),
        ("userId", "user"),
        ("UserID", "user"),
        ("usr", "user"),
        ("model", "ranker"),
        ("topN", "top_n"),
        ("top-k", "top_n"),
        ("limit", "top_n"),
        ("timestamp", "request_time"),
        ("candidatez", "candidates"),
        ("headWeights", "head_weights"),
        ("deadline", "deadline_ms"),
        ("items", "candidates.item_ids"),
        ("item_ids", "candidates.item_ids"),
        ("features", "candidates.features"),
        ("timestamps", "history.timestamps"),
    ],
)
def test_unknown_member_is_answered_with_the_nearest(name: str, meant: str) -> None:
    (detail,) = faults_of(ITEMS | {name: 1}).values()
    assert detail.startswith(f"unknown member; did you mean {meant}")


def test_unknown_column_is_answered_with_the_nearest() -> None:
    history = {"ids": [], "times": [], "event_types": [], "position": []}
    found = faults_of({"candidates": {"items": [], "features_": {}, "metadata": {}}, "history": history})
    assert found["/candidates/items"].endswith("item_ids?")
    assert found["/candidates/item_ids"] == "is missing"
    assert found["/candidates/features_"].endswith("features?") and found["/candidates/metadata"].endswith("fields?")
    assert found["/history/ids"].endswith("item_ids?") and found["/history/times"].endswith("timestamps?")
    assert found["/history/event_types"].endswith("actions?")
    assert found["/history/position"] == "unknown member; known: item_ids, actions, timestamps, offset"


def test_suggested_members_exist() -> None:
    known = {"": RankRequest, "candidates": Candidates, "history": History}
    for text in OTHER_NAMES:
        for member in text.replace("(to rank) or ", "").replace("(past events)", "").split():
            parent, _, name = member.rpartition(".")
            assert name in known[parent].model_fields
    assert set(OTHER_COLUMN_NAMES) <= Candidates.model_fields.keys() | History.model_fields.keys()


@pytest.mark.parametrize("rows", [["1"], [{"id": "1"}], [], "1", 1, None])
def test_rows_in_place_of_columns_are_named(rows: Any) -> None:
    found = faults_of({"candidates": rows, "history": rows})
    assert set(found) == {"/candidates", "/history"}
    assert all(detail.startswith('must be an object of columns: {"item_ids"') for detail in found.values())
    found = faults_of({"candidates": {"item_ids": "1,2", "features": [1.0]}})
    assert "list" in found["/candidates/item_ids"] and "columns" in found["/candidates/features"]


@pytest.mark.parametrize(
    ("value", "hint"), [(1.0, "pandas"), (None, "null"), ({"id": 1}, "object"), (True, "integer"), (math.nan, "pandas")]
)
def test_wrong_id_is_named(value: Any, hint: str) -> None:
    found = faults_of({"candidates": {"item_ids": ["1", value]}, "history": {"item_ids": [value]}})
    assert set(found) == {"/candidates/item_ids/1", "/history/item_ids/0"}
    for detail in found.values():
        assert detail.startswith("an id must be text or an integer") and hint in detail


@pytest.mark.parametrize(
    ("raw", "hint"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"user=u1&candidates=1", "form"),
        (b"{'user': 'u1'}", "json.dumps"),
        (b"\x1f\x8b\x08\x00", "Content-Encoding: gzip"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
    ],
)
def test_broken_json_is_named(client: httpx.Client, raw: bytes, hint: str) -> None:
    answer = client.post("/score", content=raw, headers={"Content-Type": "application/json"})
    assert hint in assert_problem(answer, 400)["detail"]


def test_body_that_is_no_object_is_named() -> None:
    assert "encoded twice" in faults_of(json.dumps(ITEMS))[""]
    for body in ([], [ITEMS], 1, None):
        assert "one JSON object" in faults_of(body)[""]


def test_form_is_answered_with_the_header(client: httpx.Client) -> None:
    for files in (None, {"file": b"x"}):
        answer = assert_problem(client.post("/rerank", data={"user": SECRET}, files=files), 415)
        assert "Content-Type: application/json" in answer["detail"] and "curl" in answer["detail"]
        assert SECRET not in json.dumps(answer)


NAMES = st.sampled_from(
    [*RankRequest.model_fields, *History.model_fields, *Candidates.model_fields, "query", "documents", "items", "x"]
) | st.text(max_size=3).map("constrained-".__add__)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.just(SECRET) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(NAMES, JSON, max_size=6) | JSON)
def test_random_wrong_body_has_a_bounded_error_without_values(body: Any) -> None:
    raw = json.dumps(body).encode()
    try:
        RankRequest.model_validate_json(raw)
    except ValidationError as found:
        error = wrong_request(found, raw)
        assert isinstance(error, Invalid | NotJson)
        assert len(error.detail) < 2_000 and len(error.faults) <= MOST_FAULTS
        assert SECRET not in error.detail and all(SECRET not in fault.detail for fault in error.faults)


def test_huge_wrong_values_are_neither_repeated_nor_long() -> None:
    huge = SECRET * 100_000
    body = {
        "candidates": {"item_ids": [huge], "fields": {"genres": [[huge]]}, "m" * 100_000: huge},
        "history": {"item_ids": [1], "timestamps": [huge]},
        "user": huge,
        "id": huge,
        "exit": huge,
        "request_time": huge,
        "documents": huge,
    }
    error = error_of(body)
    assert len(error.faults) == 10 and len(error.detail) < 2_000
    assert all(len(fault.detail) <= 400 and len(fault.pointer) < 200 for fault in error.faults)
    assert SECRET not in error.detail and all(SECRET not in fault.detail for fault in error.faults)


def test_thousands_of_faults_are_not_listed() -> None:
    assert "1000 faults" in error_of({f"m{k}": 0 for k in range(2_000)}).detail
    assert len(error_of({f"m{k}": 0 for k in range(900)}).faults) == MOST_FAULTS


def test_right_request_beside_these_is_ranked(client: httpx.Client, example: dict[str, Any]) -> None:
    assert ask(client, example | {"request_time": NOW})["results"]["scores"]
