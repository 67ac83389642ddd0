"""What all foreign calls share: limits, errors of their own shape, unknown members, metrics, and the native scores."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client import REGISTRY
from pydantic import TypeAdapter
from starlette.datastructures import Headers

from slatewise.bundle.loader import load_rankers
from slatewise.bundle.manifest import versions
from slatewise.http import wrong_keys
from slatewise.http.app import ROUTES
from slatewise.http.calls.aws import AwsAnswer, AwsError
from slatewise.http.calls.cohere import CohereAnswer, CohereError
from slatewise.http.calls.metarank import MetarankAnswer
from slatewise.http.calls.oip import InferAnswer, OipError
from slatewise.http.calls.tei import TeiError, TeiResult
from slatewise.http.capture import capture_line
from slatewise.http.dialect import Dialect, Incoming
from slatewise.ranking.admission import RequestLimits
from slatewise.ranking.registry import Registry
from slatewise.schemas import Problem, RankRequest
from tests.conftest import DEMO
from tests.http.calls.support import FILMS, KEY, MODEL, USER

VERSION = max(versions(DEMO / MODEL))

WARNINGS = "X-Slatewise-Warnings"
LIMITS = RequestLimits(256, 50_000, 10**6, 10.0, 65_536, 4096, 4096, 0.0)


def cohere(ids: list[Any], **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "query": USER, "documents": ids} | more


def tei(ids: list[Any], **more: Any) -> dict[str, Any]:
    return {"query": USER, "texts": ids} | more


def aws(ids: list[Any], **more: Any) -> dict[str, Any]:
    return {"campaignArn": f"arn:aws:personalize:x:0:campaign/{MODEL}", "userId": USER, "inputList": ids} | more


def metarank(ids: list[Any], **more: Any) -> dict[str, Any]:
    return {"id": "r1", "user": USER, "items": [{"id": i} for i in ids]} | more


def oip(ids: list[Any], **more: Any) -> dict[str, Any]:
    user = {"name": "user", "shape": [1], "datatype": "BYTES", "data": [USER]}
    return {
        "inputs": [user, {"name": "candidates.item_ids", "shape": [len(ids)], "datatype": "BYTES", "data": ids}]
    } | more


CALLS = {
    "/v2/rerank": (cohere, CohereAnswer, CohereError),
    "/v1/rerank": (cohere, CohereAnswer, CohereError),
    "/tei/rerank": (tei, list[TeiResult], TeiError),
    "/personalize-ranking": (aws, AwsAnswer, AwsError),
    f"/rank/{MODEL}": (metarank, MetarankAnswer, Problem),
    f"/v2/models/{MODEL}/infer": (oip, InferAnswer, OipError),
    f"/v2/models/{MODEL}/versions/{VERSION}/infer": (oip, InferAnswer, OipError),
}
EVERY_CALL = pytest.mark.parametrize("path", CALLS)


@pytest.fixture(autouse=True)
def many_wrong_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of this file send more of them within seconds than one address may."""
    monkeypatch.setattr(wrong_keys, "MOST_TRIES", 1_000)


def scores_by_id(path: str, answer: Any, ids: list[str]) -> list[tuple[str, float]]:
    """The ids with their scores, best first."""
    if "infer" in path:
        scores = answer["outputs"][0]["data"]
        return [(ids[i], scores[i]) for i in np.argsort(-np.array(scores), kind="stable")]
    if path == "/personalize-ranking":
        return [(row["itemId"], row["score"]) for row in answer["personalizedRanking"]]
    if path.startswith("/rank/"):
        return [(row["item"], row["score"]) for row in answer["items"]]
    if path == "/tei/rerank":
        return [(ids[row["index"]], row["score"]) for row in answer]
    return [(ids[row["index"]], row["relevance_score"]) for row in answer["results"]]


def check_error(answer: httpx.Response, error: Any, *statuses: int) -> None:
    assert answer.status_code in statuses, answer.text[:300]
    error.model_validate(answer.json())
    assert len(answer.content) < 5_000 and "Traceback" not in answer.text


def find(path: str) -> tuple[Dialect[Any], Mapping[str, str]]:
    found = ROUTES.find({"type": "http", "method": "POST", "path": path})
    assert found is not None
    return found


def test_every_foreign_route_is_tested() -> None:
    foreign = [dialect.path for dialect in ROUTES.dialects if dialect.path not in ("/rerank", "/score")]
    assert len(foreign) == len(CALLS)


@EVERY_CALL
def test_order_and_scores_are_those_of_the_native_call(demo: httpx.Client, path: str) -> None:
    body, kind, _ = CALLS[path]
    strange = ['quote"', "comma,", '","', "new\nline", "zero\0", "ünïcode", " ", "-"]
    for ids in (["1198"], FILMS, FILMS + FILMS[:2], FILMS + strange):
        answer = demo.post(path, json=body(ids))
        assert answer.status_code == 200, answer.text
        TypeAdapter(kind).validate_python(answer.json())
        found = scores_by_id(path, answer.json(), ids)
        native = demo.post("/rerank", json={"user": USER, "candidates": {"item_ids": ids}}).json()["results"]
        assert [item for item, _ in found] == native["item_ids"]
        assert [score for _, score in found] == pytest.approx(native["scores"], abs=1e-4)  # the time goes on
        assert all(0 <= score <= 1 for _, score in found)


@EVERY_CALL
def test_history_is_unset_when_the_call_brings_none(demo: httpx.Client, path: str) -> None:
    """A request with a user and without a history can then be ranked by the stored one."""
    registry = Registry(load_rankers(DEMO, ("int8",)).values())
    dialect, parameters = find(path)
    body = json.dumps(CALLS[path][0](FILMS)).encode()
    request, _ = dialect.parse(Incoming(body, Headers({}), parameters, registry, LIMITS))
    assert request.user == USER and request.candidates.item_ids == FILMS
    assert "history" not in request.model_fields_set and request.history.item_ids == []
    captured = RankRequest.model_validate_json(capture_line(request, 1.0, b"key"))
    assert captured.candidates == request.candidates and captured.ranker == request.ranker


@EVERY_CALL
def test_unknown_members_are_ignored(demo: httpx.Client, path: str) -> None:
    more = {"max_tokens_per_doc": None, "truncate": True, "nothing": {"a": [[[]]]}, "fields": [], "context": {"a": "b"}}
    answer = demo.post(path, json=CALLS[path][0](FILMS, **more))
    assert answer.status_code == 200, answer.text


BAD = {
    "empty": b"",
    "not JSON": b"{oops",
    "not UTF-8": b'{"query": "\xff"}',
    "lone surrogate": b'{"query": "\\ud800", "documents": ["1"]}',
    "array": b"[]",
    "number": b"1",
    "null": b"null",
    "nothing": b"{}",
    "brackets": b"[" * 100_000,
    "objects": b'{"a":' * 50_000,
    "long number": b'{"id": ' + b"9" * 50_000 + b"}",
    "many members": b"{" + b",".join(b'"m%d":0' % k for k in range(50_000)) + b"}",
}


@EVERY_CALL
@pytest.mark.parametrize("what", BAD)
def test_bad_body_is_refused_in_the_shape_of_the_call(demo: httpx.Client, path: str, what: str) -> None:
    answer = demo.post(path, content=BAD[what], headers={"Content-Type": "application/json"})
    check_error(answer, CALLS[path][2], 400, 422)


@EVERY_CALL
@pytest.mark.parametrize("wrong", [[], [1.5], [None], [True], [""], ["x" * 257], [["1"]], ["1"] * 5000, "1"])
def test_wrong_items_are_refused(demo: httpx.Client, path: str, wrong: Any) -> None:
    body, _, error = CALLS[path]
    answer = demo.post(
        path,
        json=body(wrong)
        if isinstance(wrong, list)
        else body(["1"]) | {name: wrong for name in ("documents", "texts", "inputList", "items", "inputs")},
    )
    check_error(answer, error, 400, 422)


@EVERY_CALL
def test_body_above_the_limit_is_refused(demo: httpx.Client, path: str) -> None:
    body, _, error = CALLS[path]
    expected = 400 if error is AwsError else 413
    plain = json.dumps(body(["1"] * 10, filler="x" * 1_100_000)).encode()
    check_error(demo.post(path, content=plain, headers={"Content-Type": "application/json"}), error, expected)
    packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    check_error(demo.post(path, content=gzip.compress(plain), headers=packed), error, expected)


@EVERY_CALL
def test_request_without_key_is_refused_and_counted(demo: httpx.Client, path: str) -> None:
    body, _, error = CALLS[path]
    dialect, _ = find(path)
    status = 403 if error is AwsError else 401

    def refused() -> float:
        labels = {"endpoint": dialect.path, "ranker": "", "version": "", "variant": "", "code": str(status)}
        return REGISTRY.get_sample_value("slatewise_requests_total", labels) or 0.0

    before = refused()
    for key in ("", "Bearer", "Bearer wrong", "AWS4-HMAC-SHA256 Credential=wrong/20260101/x/personalize/aws4_request"):
        check_error(demo.post(path, json=body(FILMS), headers={"Authorization": key}), error, status)
    assert refused() == before + 4


def test_access_key_id_is_the_key_on_paths_of_aws_alone(demo: httpx.Client) -> None:
    signed = "AWS4-HMAC-SHA256 Credential=KEY/20260101/x/personalize/aws4_request, SignedHeaders=host, Signature=0"
    for path, (body, _, _) in CALLS.items():
        answer = demo.post(path, json=body(FILMS), headers={"Authorization": signed})
        assert (answer.status_code == 200) == (path == "/personalize-ranking")
    for broken in (
        "Credential=KEY",
        "Credential=KEY/a/b/c",
        "Credential=/a/b/c/aws4_request",
        "KEY/a/b/c/aws4_request",
    ):
        headers = {"Authorization": f"AWS4-HMAC-SHA256 {broken}"}
        assert demo.post("/personalize-ranking", json=aws(FILMS), headers=headers).status_code == 403


def test_events_signed_for_aws_get_its_errors(demo: httpx.Client) -> None:
    """Before the body is read too: a wrong key, and a body that is no JSON."""
    signed = "AWS4-HMAC-SHA256 Credential={}/20260101/x/personalize/aws4_request, SignedHeaders=host, Signature=0"
    for key, status, name in (
        ("wrong", 403, "UnrecognizedClientException"),
        (KEY, 400, "InvalidInputException"),
    ):
        answer = demo.post("/events", content=b"{", headers={"Authorization": signed.format(key)})
        check_error(answer, AwsError, status)
        assert answer.headers["x-amzn-ErrorType"] == name
    check_error(demo.post("/events", content=b"{", headers={"Authorization": "Bearer wrong"}), Problem, 401)
    check_error(demo.post("/models", headers={"Authorization": signed.format("wrong")}), Problem, 401)


@EVERY_CALL
def test_error_has_an_id_where_none_was_sent(demo: httpx.Client, path: str) -> None:
    """Also for a request that is refused before it is read."""
    body, _, _ = CALLS[path]
    for key, sent in ((KEY, body([])), ("wrong", body(FILMS))):
        answers = [demo.post(path, json=sent, headers={"Authorization": f"Bearer {key}"}) for _ in range(2)]
        ids = {answer.headers["X-Request-ID"] for answer in answers}
        assert len(ids) == 2 and set(map(len, ids)) == {20}
        assert {answer.json().get("id", answer.headers["X-Request-ID"]) for answer in answers} == ids


@EVERY_CALL
def test_user_of_header_and_query_must_agree(demo: httpx.Client, path: str) -> None:
    body, _, error = CALLS[path]
    assert demo.post(path, json=body(FILMS), headers={"X-User-ID": USER}).status_code == 200
    check_error(demo.post(path, json=body(FILMS), headers={"X-User-ID": "another"}), error, 400, 422)


@EVERY_CALL
def test_request_id_of_the_header_is_returned(demo: httpx.Client, path: str) -> None:
    sent = CALLS[path][0](FILMS)
    sent.pop("id", None)
    assert demo.post(path, json=sent, headers={"X-Request-ID": "r-7"}).headers["X-Request-ID"] == "r-7"
    assert demo.post(path, json={}, headers={"X-Request-ID": "r-7"}).headers["X-Request-ID"] == "r-7"


@EVERY_CALL
def test_warnings_name_the_set_wise_limit_and_unknown_items(demo: httpx.Client, path: str) -> None:
    body = CALLS[path][0]
    limit = demo.get("/v1/models").json()["data"][0]["set_wise"]
    few = demo.post(path, json=body(["1198"] * limit))
    many = demo.post(path, json=body(["1198"] * (limit + 1)))
    assert few.status_code == many.status_code == 200
    assert WARNINGS not in few.headers
    assert many.headers[WARNINGS] == (
        f"{limit + 1} candidates, set-wise limit {limit}: they were compared in several slates"
    )
    unknown = demo.post(path, json=body(["1198", "a text about something"]))
    assert unknown.headers[WARNINGS].startswith("1 of 2 candidates are not ids of items")


def test_unscored_answer_keeps_the_order_with_scores_of_0(demo: httpx.Client) -> None:
    late = json.dumps({"user": USER, "deadline_ms": 0.001})
    answer = demo.post("/v2/rerank", json=cohere(FILMS, query=late)).json()
    assert [(r["index"], r["relevance_score"]) for r in answer["results"]] == [(k, 0.0) for k in range(len(FILMS))]
    assert "no model scored" in answer["meta"]["warnings"][0] and "deadline" in answer["meta"]["warnings"][1]
    answer = demo.post("/tei/rerank", json=tei(FILMS, query=late))
    assert answer.json() == [{"index": k, "score": 0.0} for k in range(len(FILMS))]
    assert "no model scored" in answer.headers[WARNINGS]
    answer = demo.post(f"/v2/models/{MODEL}/infer", json=oip(FILMS, parameters={"timeout": 1}))
    assert answer.json()["parameters"]["exit"] == "input_order"
    assert answer.json()["outputs"][0]["data"] == [0.0] * len(FILMS)


def test_unknown_models_add_no_metric_series(demo: httpx.Client) -> None:
    def series() -> set[tuple[str, tuple[tuple[str, str], ...]]]:
        samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
        return {(sample.name, tuple(sorted(sample.labels.items()))) for sample in samples}

    def ask(k: int) -> None:
        for path in (f"/rank/m{k}", f"/v2/models/m{k}/infer", f"/v2/models/{MODEL}/versions/{k}00/infer"):
            body = metarank(FILMS) if "rank" in path else oip(FILMS)
            assert demo.post(path, json=body).status_code == 404
            assert demo.post(path, json=body, headers={"Authorization": ""}).status_code == 401
            assert demo.post(path + "/more", json=body).status_code == 404
        assert demo.post("/v2/rerank", json=cohere(FILMS, model=f"m{k}")).status_code == 404

    ask(1)
    before = series()
    for k in range(2, 12):
        ask(k)
    assert series() == before


def test_other_methods_and_paths_are_problems(demo: httpx.Client) -> None:
    for path in CALLS:
        assert demo.get(path).status_code == 405 or "models" in path
    assert demo.post("/v3/rerank", json=cohere(FILMS)).status_code == 404
    assert demo.post("/v2/rerank%0A", json=cohere(FILMS)).status_code == 404


def test_limits_are_listed(demo: httpx.Client) -> None:
    card = demo.get(f"/models/{MODEL}").json()
    assert demo.get("/models").json()["models"][0]["limits"] == card["limits"]
    listed = demo.get("/v1/models").json()
    assert listed["object"] == "list" and listed["models"] == [{"name": MODEL, "endpoints": ["rerank"]}]
    found = listed["data"][0]
    assert (found["id"], found["object"]) == (MODEL, "model")
    assert found["max_documents"] == card["limits"]["max_candidates"]
    assert found["set_wise"] == card["limits"]["set_wise"]
