"""The calls of Cohere and Jina, and of Text Embeddings Inference: forms of documents and queries."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import yaml

from slatewise.errors import Invalid
from slatewise.http.calls.cohere import item_ids
from tests.http.calls.support import FILMS, KEY, MODEL, PAST, USER, native_order
from tests.http.calls.test_dialects import CohereError, TeiError, check_error


def ask(client: httpx.Client, path: str = "/v2/rerank", **members: Any) -> Any:
    answer = client.post(path, json={"query": USER, "documents": FILMS} | members)
    assert answer.status_code == 200, answer.text
    return answer.json()


def order(client: httpx.Client, **members: Any) -> list[str]:
    return [FILMS[row["index"]] for row in ask(client, **members)["results"]]


def refused(client: httpx.Client, **members: Any) -> dict[str, Any]:
    answer = client.post("/v2/rerank", json={"query": USER, "documents": FILMS} | members)
    check_error(answer, CohereError, 422)
    body: dict[str, Any] = answer.json()
    return body


def test_answer_has_the_members_of_cohere(demo: httpx.Client) -> None:
    for path, version in (("/v2/rerank", "2"), ("/v1/rerank", "1")):
        answer = ask(demo, path, model=MODEL, query=json.dumps(PAST))
        assert answer.keys() == {"id", "model", "results", "usage", "meta"} and answer["model"] == MODEL
        assert answer["meta"]["api_version"] == {"version": version} and answer["meta"]["warnings"] == []
        assert answer["usage"]["total_tokens"] == len(FILMS) + len(PAST["history"]["item_ids"])
        assert all(row.keys() == {"index", "relevance_score"} for row in answer["results"])


@pytest.mark.parametrize(
    "documents",
    [
        [{"id": film, "title": {"a": [1]}} for film in FILMS],
        [{"id": int(film)} for film in FILMS],
        [{"text": film} for film in FILMS],
        [int(film) for film in FILMS],
        [yaml.dump({"id": film}) for film in FILMS],
        [yaml.dump({"id": int(film)}) for film in FILMS],
        [yaml.dump({"id": film, "title": "x" * 1000}, sort_keys=False) for film in FILMS],
        [yaml.dump({"id": FILMS[0]}), {"id": FILMS[1]}, *FILMS[2:]],
    ],
    ids=["objects", "integers in objects", "text", "integers", "yaml", "yaml integers", "long yaml", "mixed"],
)
def test_every_form_of_a_document_names_its_item(demo: httpx.Client, documents: list[Any]) -> None:
    plain = native_order(demo)
    assert order(demo, documents=documents) == plain
    answer = ask(demo, "/v1/rerank", documents=documents, return_documents=True)
    for row in answer["results"]:
        sent = documents[row["index"]]
        assert row["document"] == {"text": sent if isinstance(sent, str) else FILMS[row["index"]]}


STRANGE = [
    "it's",
    "'",
    'say "x"',
    "null",
    "true",
    "a: b",
    "# x",
    "- a",
    " lead",
    "1e3",
    "0x1F",
    "ü",
    "~",
    "a\\b",
    "x" * 256,
    "two words",
]


@pytest.mark.parametrize("identifier", [*STRANGE, 595, "595"])
def test_id_in_yaml_is_that_which_was_dumped(identifier: Any) -> None:
    """Both ways: each document for itself, and many short ones at once."""
    dumped = yaml.dump({"id": identifier})
    assert item_ids([dumped]) == [str(identifier)]
    assert item_ids([dumped, "id: '1'\n", dumped]) == [str(identifier), "1", str(identifier)]


@pytest.mark.parametrize(
    "text",
    [
        *("id: ''\n", "id: \n", "id: '" + "x" * 257 + "'\n"),
        *(f'id: "\\{escape}"\n' for escape in ("q", "xZZ", "U00ffffff", "Uffffffff", "ud800")),
    ],
)
def test_yaml_without_a_usable_id_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="/documents/1: its YAML has no `id`"):
        item_ids(["1", text])


def test_document_that_is_refused_is_named(demo: httpx.Client) -> None:
    message = "must be the id of an item, of 1 to 256 characters, or an object with `id`; texts are not ranked"
    for wrong in (1.5, "x" * 257, None, [], {"id": ""}, ""):
        assert refused(demo, documents=["1", wrong])["errors"] == [{"pointer": "/documents/1", "detail": message}]
    assert refused(demo, documents=["1", {"title": "x"}])["message"] == "/documents/1: the object has no `id`"


def test_query_is_a_user_or_json_with_more(demo: httpx.Client) -> None:
    plain, past = native_order(demo), native_order(demo, **PAST)
    assert plain != past
    assert order(demo, query=USER) == order(demo, query=json.dumps({"user": USER})) == plain
    for query in (json.dumps(PAST), " " + json.dumps(PAST), PAST, PAST | {"deadline_ms": None}):
        assert order(demo, query=query) == past
    assert order(demo, query={}) == order(demo, query="{}") == native_order(demo, user=None)
    assert order(demo, query=42) == native_order(demo, user="42")


def test_query_that_is_refused_is_explained(demo: httpx.Client) -> None:
    for wrong in ("", None, True, 1.5, []):
        assert refused(demo, query=wrong)["errors"][0]["pointer"].startswith("/query")
    assert refused(demo, query="{oops")["message"] == "/query: begins with { and is not JSON"
    assert "texts are not ranked" in refused(demo, query="x" * 257)["message"]
    assert refused(demo, query='{"users": "a"}')["errors"][0]["pointer"] == "/query/users", (
        "it is ours, so it is strict"
    )
    late = json.dumps({"user": USER, "history": {"item_ids": ["1"], "timestamps": [1.7e12]}})
    hint = "unix seconds are wanted; these look like milliseconds: divide them by 1,000"
    assert refused(demo, query=late)["errors"] == [{"pointer": "/query/history/timestamps/0", "detail": hint}]
    late = json.dumps({"request_time": 1.7e12})
    assert (
        demo.post("/tei/rerank", json={"query": late, "texts": FILMS}).json()["error"] == f"/query/request_time: {hint}"
    )
    long = json.dumps({"user": USER, "history": {"item_ids": ["1"], "actions": ["like"] * 2}})
    assert refused(demo, query=long)["errors"][0]["pointer"] == "/query/history/actions"


def test_top_n_and_priority_are_translated(demo: httpx.Client) -> None:
    assert order(demo, top_n=2) == native_order(demo)[:2] and len(order(demo, top_n=100)) == len(FILMS)
    assert order(demo, top_n=None, priority=999, model=None) == native_order(demo)
    for wrong in ({"top_n": 0}, {"top_n": "3"}, {"priority": -1}, {"priority": 1000}, {"return_documents": "yes"}):
        assert refused(demo, **wrong)["errors"][0]["pointer"] == "/" + next(iter(wrong))
    answer = demo.post("/v2/rerank", json={"query": USER, "documents": FILMS, "model": "none"})
    check_error(answer, CohereError, 404)


def test_only_json_is_accepted(demo: httpx.Client) -> None:
    body = json.dumps({"query": USER, "documents": FILMS})
    answer = demo.post("/v2/rerank", content=body, headers={"Content-Type": "text/plain"})
    check_error(answer, CohereError, 415)
    head = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(demo.base_url.join("/v2/rerank"), content=body, headers=head, trust_env=False).status_code == 200


def test_tei_has_its_own_shapes(demo: httpx.Client) -> None:
    answer = demo.post(
        "/tei/rerank", json={"query": USER, "texts": FILMS, "return_text": True, "top_n": 1, "model": "x"}
    )
    assert [row["text"] for row in answer.json()] == native_order(demo)
    for wrong, status, kind in (
        ({"texts": []}, 400, "Empty"),
        ({"texts": ["1"] * 5000}, 422, "Validation"),
        ({"query": json.dumps({"deadline_ms": 0.001, "allow_degraded": False})}, 504, "Overloaded"),
    ):
        answer = demo.post("/tei/rerank", json={"query": USER, "texts": FILMS} | wrong)
        check_error(answer, TeiError, status)
        assert answer.json()["error_type"] == kind
