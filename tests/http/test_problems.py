"""Errors as problem details: bad bodies, unknown paths, and the documented classes."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from slatewise.errors import RankingError
from slatewise.http.problems import PROBLEMS
from tests.http.support import (
    assert_problem,
)

BAD: list[tuple[str, bytes, int]] = [
    ("empty", b"", 400),
    ("not JSON", b"{oops", 400),
    ("not UTF-8", b'{"user": "\xff\xfe"}', 400),
    ("lone surrogate", b'{"candidates": {"item_ids": ["\\ud800"]}}', 400),
    ("NaN", b'{"candidates": {"item_ids": ["1"]}, "request_time": NaN}', 422),
    ("too large for a double", b'{"candidates": {"item_ids": ["1"]}, "request_time": 1e400}', 422),
    ("array", b"[]", 422),
    ("number", b"1", 422),
    ("brackets", b"[" * 100_000, 422),
    ("objects", b'{"a":' * 50_000, 422),
    ("50,000 digits", b'{"candidates": {"item_ids": ["1"]}, "top_n": ' + b"9" * 50_000 + b"}", 400),
    ("no candidates", b'{"candidates": {"item_ids": []}}', 422),
    ("no candidates member", b"{}", 422),
    ("null candidates", b'{"candidates": null}', 422),
    ("boolean id", b'{"candidates": {"item_ids": [true]}}', 422),
    ("float id", b'{"candidates": {"item_ids": [1.5]}}', 422),
    ("null id", b'{"candidates": {"item_ids": [null]}}', 422),
    ("empty id", b'{"candidates": {"item_ids": [""]}}', 422),
    ("long id", b'{"candidates": {"item_ids": ["' + b"x" * 100_000 + b'"]}}', 422),
    ("misspelt", b'{"candidates": {"item_ids": ["1"]}, "candidatez": 1}', 422),
    ("string number", b'{"candidates": {"item_ids": ["1"]}, "top_n": "3"}', 422),
    ("negative top_n", b'{"candidates": {"item_ids": ["1"]}, "top_n": -1}', 422),
    ("top_n 0", b'{"candidates": {"item_ids": ["1"]}, "top_n": 0}', 422),
    ("negative time", b'{"candidates": {"item_ids": ["1"]}, "request_time": -1}', 422),
    ("milliseconds", b'{"candidates": {"item_ids": ["1"]}, "request_time": 1700000000000}', 422),
    ("deadline 0", b'{"candidates": {"item_ids": ["1"]}, "deadline_ms": 0}', 422),
    ("exit", b'{"candidates": {"item_ids": ["1"]}, "exit": "none"}', 422),
    ("text feature", b'{"candidates": {"item_ids": ["1"], "features": {"year": ["x"]}}}', 422),
    ("infinite feature", b'{"candidates": {"item_ids": ["1"], "features": {"year": [1e999]}}}', 422),
    ("control characters in the id", b'{"candidates": {"item_ids": ["1"]}, "id": "a\\r\\nX: 1"}', 422),
    ("no head weights", b'{"candidates": {"item_ids": ["1"]}, "head_weights": {}}', 422),
    (
        "a value a thousand times",
        b'{"candidates": {"item_ids": ["1"], "fields": {"genres": [[' + b'"x",' * 1000 + b'"x"]]}}}',
        422,
    ),
    (
        "numbers for values",
        b'{"candidates": {"item_ids": ["1"], "fields": {"genres": [[' + b"0," * 200_000 + b"0]]}}}",
        422,
    ),
    ("thousands of unknown members", b"{" + b",".join(b'"m%d":0' % k for k in range(50_000)) + b"}", 422),
    (
        "thousands of unknown heads",
        b'{"candidates": {"item_ids": ["1"]}, "head_weights": {'
        + b",".join(b'"m%d":0' % k for k in range(50_000))
        + b"}}",
        422,
    ),
    ("negative offset", b'{"candidates": {"item_ids": ["1"]}, "history": {"offset": -1}}', 422),
]


@pytest.mark.parametrize(("what", "body", "status"), BAD, ids=[what for what, _, _ in BAD])
def test_bad_body_is_refused_with_a_reason(client: httpx.Client, what: str, body: bytes, status: int) -> None:
    for path in ("/rerank", "/score"):
        problem = assert_problem(client.post(path, content=body, headers={"Content-Type": "application/json"}), status)
        assert len(json.dumps(problem)) < 5_000
        if status == 422:
            assert problem["errors"] and all(
                e["pointer"] == "" or e["pointer"].startswith("/") for e in problem["errors"]
            )


def test_fault_has_a_pointer_and_names_the_limit(client: httpx.Client, example: dict[str, Any]) -> None:
    problem = assert_problem(client.post("/score", json=example | {"candidates": {"item_ids": ["1", True]}}), 422)
    assert [e["pointer"] for e in problem["errors"]] == ["/candidates/item_ids/1"]
    problem = assert_problem(client.post("/score", json=example | {"candidates": {"item_ids": ["1"] * 2001}}), 422)
    assert "2001 candidates, limit 2000" in problem["detail"]
    problem = assert_problem(client.post("/score", json=example | {"history": {"item_ids": ["1"] * 1001}}), 422)
    assert "limit 1000" in problem["detail"]


def test_unknown_path_or_method_is_a_problem(client: httpx.Client) -> None:
    assert_problem(client.get("/no-such-path"), 404)
    assert_problem(client.get("/rerank"), 405)
    assert_problem(client.get("/models/none"), 404)
    assert_problem(client.get("/admin/anything"), 404)
    assert_problem(
        client.post("/rerank/", json={}, headers={"Host": "elsewhere.example"}), 404
    )  # no redirect to the host that the client names


def test_every_error_class_is_documented() -> None:
    def classes(error: type[RankingError]) -> list[type[RankingError]]:
        return [error, *(c for sub in error.__subclasses__() for c in classes(sub))]

    found = classes(RankingError)
    assert {c.status for c in found} == set(PROBLEMS)
    assert len({c.title for c in found}) == len(found)
