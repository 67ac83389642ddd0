"""The id of a request: the client's, or one that the server makes; the same in answer, header, error and log."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

from slatewise.http.problems import new_request_id
from slatewise.http.request_headers import with_headers
from slatewise.schemas import REQUEST_ID, RankRequest
from slatewise.settings import Settings
from tests.conftest import Tiny
from tests.http.support import assert_problem
from tests.support.application import serve

BODY = {"candidates": {"item_ids": ["1", "2"]}}


def test_made_ids_are_valid_short_and_unique() -> None:
    ids = {new_request_id() for _ in range(100_000)}
    assert len(ids) == 100_000
    assert all(re.fullmatch(REQUEST_ID, one) and len(one) == 20 for one in ids)


@pytest.mark.parametrize("more", [{}, {"id": None}])
def test_answer_has_an_id_where_none_was_sent(client: httpx.Client, more: dict[str, Any]) -> None:
    seen = set()
    for path in ("/rerank", "/score", "/rerank"):
        answer = client.post(path, json=BODY | more)
        seen.add(answer.json()["id"])
        assert answer.headers["X-Request-ID"] == answer.json()["id"]
    assert len(seen) == 3 and None not in seen and all(map(re.compile(REQUEST_ID).fullmatch, seen))


def test_id_of_the_client_is_kept() -> None:
    given, unnamed = (RankRequest.model_validate(BODY | more) for more in ({"id": "mine"}, {}))
    assert with_headers(given, Headers({})).id == "mine"
    assert with_headers(given, Headers({"X-Request-ID": "other"})).id == "mine"
    assert with_headers(unnamed, Headers({"X-Request-ID": "other", "X-User-ID": "u"})).id == "other"
    assert with_headers(unnamed, Headers({"X-User-ID": "u"})).id


def test_every_problem_has_an_id(client: httpx.Client, tiny: Tiny) -> None:
    with serve(Settings(bundles=tiny.root, api_keys="key")) as closed:  # type: ignore[arg-type]
        answers = [
            client.post("/rerank", content=b"{"),
            client.post("/score", json={}),
            client.post("/score", json=BODY | {"ranker": "none"}),
            client.post("/rerank", data={"a": "b"}),
            client.post("/rerank", json=BODY, headers={"X-Request-ID": "with space"}),
            client.get("/models/none"),
            client.get("/no-such-path"),
            client.get("/rerank"),
            closed.get("/models"),
        ]
    ids = [assert_problem(answer, answer.status_code)["request_id"] for answer in answers]
    assert ids == [answer.headers["X-Request-ID"] for answer in answers]
    assert len(set(ids)) == len(ids) and all(len(one) == 20 for one in ids)
    assert {answer.status_code for answer in answers} == {400, 401, 404, 405, 415, 422}


def test_log_line_has_the_id_of_the_answer(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Settings(bundles=tiny.root, slow_ms=1e-6, log_format="json")) as client:
        ids = [
            client.post("/rerank", json=BODY).headers["X-Request-ID"],
            client.post("/rerank", content=b"{").headers["X-Request-ID"],
            client.post("/score", json={}).json()["request_id"],
        ]
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [line["id"] for line in lines] == ids
