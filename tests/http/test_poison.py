"""Poison in every place of every body: each answer is right or a clear error, and the next request is not affected.

A poison is a piece of JSON text, so also what no JSON library writes: NaN, 1e400, lone surrogates, repeated members.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from slatewise.http.app import ROUTES
from slatewise.http.calls.aws import AwsError
from slatewise.http.calls.cohere import CohereError
from slatewise.http.calls.oip import OipError
from slatewise.http.calls.tei import TeiError
from slatewise.schemas import Problem
from tests.http.support import RESPONSE, ask, assert_problem

NOW = int(time.time())
SECRET = "s3cr3t"  # in long texts: an error must not repeat what it refuses
LONG = json.dumps(SECRET + "x" * 10_000)
POISONS = [
    *("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e999999999", "1e-400", "1" + "0" * 400),
    *("1e308", "-1e308", "-0.0", "5e-324", "0", "-1", "1000000000", "99999999999999999999"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775809", "18446744073709551616"),
    *("true", "null", '"1"', '"1e3"', '"NaN"', '""', '" "', r'"\u0000"', r'"\ud800"', r'"\udc00\ud800"'),
    *('"\u202e\u2067\u05d0\u200f"', '"\U0001f986\u200d\U0001f525"', LONG, "[]", "{}", "[[[]]]", '{"a": 1, "a": 2}'),
]
PROBLEM = "application/problem+json"
MARK = "\x00place"  # stands for the place of the poison while the body is made

EVENT = {"user": "p", "item_id": "1", "action": "view", "timestamp": NOW, "request_id": "r", "event_id": "e"}
RANKING = {
    "id": "r",
    "ranker": "tiny",
    "variant": "fp32",
    "exit": "set",
    "user": "p",
    "history": {"item_ids": ["1", "2"], "actions": ["watch", None], "timestamps": [NOW - 9, NOW], "offset": 0},
    "candidates": {
        "item_ids": ["1", "2", "3"],
        "features": {"year": [1990, 1991.5, None]},
        "fields": {"genres": ["Drama", ["War"], None]},
    },
    "request_time": NOW,
    "head_weights": {"watch": 1.0},
    "top_n": 2,
    "deadline_ms": 600_000,
    "allow_degraded": True,
    "priority": 0,
    "return_fields": ["title"],
    "explain": False,
}
TENSORS = [
    {"name": "user", "shape": [1], "datatype": "BYTES", "data": ["p"]},
    {"name": "candidates.item_ids", "shape": [2], "datatype": "BYTES", "data": ["1", "2"]},
    {"name": "features.year", "shape": [2], "datatype": "FP64", "data": [1.0, 2.0]},
]
PUT = {"eventType": "view", "sentAt": NOW, "itemId": "1", "eventId": "e"}
SHOWN = {"event": "ranking", "id": "r", "timestamp": f"{NOW}000", "user": "p", "items": [{"id": "1"}]}
CLICK = {"event": "interaction", "id": "c", "timestamp": NOW * 1000, "user": "p", "item": "1", "type": "click"}
FIELDS = [{"name": "year", "value": 1990.0}, {"name": "genres", "value": ["War"]}]
BODIES: list[tuple[str, Any, Any]] = [  # path, body, shape of an error
    ("/rerank", RANKING, Problem),
    ("/score", RANKING, Problem),
    ("/encode", {"user": "p", "ranker": "tiny", "variant": "fp32", "history": RANKING["history"]}, Problem),
    ("/events", EVENT, Problem),
    ("/events", {"events": [EVENT, EVENT]}, Problem),
    ("/events", {"trackingId": "t", "userId": "p", "sessionId": "s", "eventList": [PUT]}, AwsError),
    ("/feedback", [SHOWN, CLICK], Problem),
    ("/v2/rerank", {"model": "tiny", "query": "p", "documents": ["1", {"id": "2"}], "top_n": 1}, CohereError),
    ("/v1/rerank", {"model": "tiny", "query": "p", "documents": ["1", "2"], "return_documents": True}, CohereError),
    ("/tei/rerank", {"query": "p", "texts": ["1", "2"], "raw_scores": False, "return_text": True}, TeiError),
    ("/personalize-ranking", {"campaignArn": "a/tiny", "userId": "p", "inputList": ["1", "2"]}, AwsError),
    (
        "/rank/tiny",
        {"id": "r", "user": "p", "timestamp": NOW * 1000, "items": [{"id": "1", "fields": FIELDS}]},
        Problem,
    ),
    ("/v2/models/tiny/infer", {"id": "r", "inputs": TENSORS, "outputs": [{"name": "scores"}]}, OipError),
    ("/v2/models/tiny/versions/1/infer", {"inputs": TENSORS}, OipError),
]
NAMES = [f"{path} {k}" for k, (path, _, _) in enumerate(BODIES)]


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every member and of the first element of every list, the whole body included."""
    yield path
    if isinstance(content, dict):
        for name, value in content.items():
            yield from places(value, (*path, name))
    elif isinstance(content, list) and content:
        yield from places(content[-1], (*path, len(content) - 1))


def poisoned(body: Any, path: tuple[Any, ...], poison: str) -> bytes:
    """The body as JSON, with the poison at a place."""
    if not path:
        return poison.encode()
    copy = json.loads(json.dumps(body))
    inner = copy
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = MARK
    return json.dumps(copy).replace(json.dumps(MARK), poison).encode()


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def numbers_in(content: Any) -> Iterator[float]:
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from numbers_in(value)
    elif isinstance(content, float):
        yield content


def check(answer: httpx.Response, error: Any, what: str) -> None:
    """Strict JSON with finite numbers, of the documented shape, and no value of a refused body in it."""
    assert answer.status_code in (200, 202, 204, 400, 404, 413, 422), (
        f"{what}: {answer.status_code} {answer.text[:300]}"
    )
    if answer.status_code == 204 or not answer.content:
        return
    content = json.loads(answer.content, parse_constant=no_constant)
    assert all(map(math.isfinite, numbers_in(content))), what
    if answer.status_code >= 400:
        error.model_validate(content)
        assert answer.headers["content-type"] == (PROBLEM if error is Problem else "application/json"), what
        assert len(answer.content) < 5_000 and "Traceback" not in answer.text, what
        assert SECRET not in answer.text, f"{what}: {answer.text[:300]}"
        assert answer.headers["x-request-id"], what
    elif isinstance(content, dict) and "timings_ms" in content:
        RESPONSE.validate_python(content)


def test_every_ranking_route_is_poisoned() -> None:
    native = {dialect.path for dialect in ROUTES.dialects}
    named = {path.replace("/tiny", "/{model}").replace("versions/1", "versions/{version}") for path, _, _ in BODIES}
    assert native <= named


@pytest.mark.parametrize(("path", "body", "error"), BODIES, ids=NAMES)
def test_poison_in_any_place_gets_an_answer_or_a_reason(client: httpx.Client, path: str, body: Any, error: Any) -> None:
    sane = {"candidates": {"item_ids": ["1", "2", "3"]}, "request_time": NOW}
    before = ask(client, sane)["results"]
    headers = {"Content-Type": "application/json"}
    intact = client.post(path, content=json.dumps(body), headers=headers)
    assert intact.status_code in (200, 202), intact.text
    statuses = set()
    for place in places(body):
        for poison in POISONS:
            what = f"{path} {place} {poison[:40]}"
            answer = client.post(path, content=poisoned(body, place, poison), headers=headers)
            unread = path == "/events" and (answer.status_code == 400 or not place)  # whose call it is is not known
            check(answer, Problem if unread and answer.headers["content-type"] == PROBLEM else error, what)
            statuses.add(answer.status_code)
    assert statuses & {200, 202} and statuses & {400, 422}
    assert ask(client, sane)["results"] == before


TEXTS = ["", "\0", "\n", "%", "../../etc/passwd", "a" * 5_000, "\u202e\u05d0", "\U0001f986", "NaN", "-1", "1e400", "{"]
URLS = ["/models/{}", "/models/{}/examples", "/models/{}/items?query=a", "/v2/models/{}", "/v2/models/{}/ready"]
URLS += [f"/models/tiny/items?{name}={{}}" for name in ("ids", "id", "query", "query=a&limit")]


@pytest.mark.parametrize("url", [*URLS, "/users/{}"])
def test_poison_in_a_url_gets_an_answer_or_a_reason(client: httpx.Client, url: str) -> None:
    method = "DELETE" if url.startswith("/users") else "GET"
    encoded = [quote(text, safe="") for text in TEXTS] + ["%ff%fe", "%ed%a0%80", "%"]
    for text in encoded:
        answer = client.request(method, url.format(text))
        shape = OipError if url.startswith("/v2/models/") else Problem
        is_problem = answer.headers.get("content-type") == PROBLEM  # paths that no route has
        check(answer, Problem if is_problem else shape, f"{url} {text[:40]}")


@pytest.mark.parametrize("name", ["X-User-ID", "X-Request-ID", "Authorization", "Content-Type", "Content-Encoding"])
def test_poison_in_a_header_gets_an_answer_or_a_reason(client: httpx.Client, name: str) -> None:
    body = json.dumps({"candidates": {"item_ids": ["1"]}})
    for value in (b"", b"\xff\xfe", b"a\tb", b"x" * 5_000, "\U0001f986".encode(), b"NaN", b"1e400", b'"', b"a, b"):
        headers = {"Content-Type": "application/json"} | {name: value}  # type: ignore[dict-item]
        answer = client.post("/rerank", content=body, headers=headers)
        if answer.status_code == 415:
            assert_problem(answer, 415)
        else:
            check(answer, Problem, f"{name}: {value[:40]!r}")
