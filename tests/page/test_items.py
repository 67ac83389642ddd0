"""Titles by id, by search and with a ranking; the requests of demo users."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from slatewise.bundle import titles as titles_module
from slatewise.bundle.loader import load_bundle
from slatewise.bundle.manifest import ManifestError
from slatewise.bundle.titles import Titles, read_titles
from slatewise.http.items import MOST_FOUND, MOST_ITEMS
from slatewise.schemas import MAX_ID, RankRequest
from slatewise.settings import Settings
from tests.http.support import assert_problem
from tests.page.support import BUNDLE, ask, write_bundle
from tests.support.application import serve

DISPLAY = json.loads((BUNDLE / "display.json").read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The demo, and the same ranker without titles."""
    root = tmp_path_factory.mktemp("bundles")
    write_bundle(root, "movies", DISPLAY, json.loads((BUNDLE / "examples.json").read_text()))
    write_bundle(root, "plain", None)
    with serve(Settings(bundles=root)) as client:
        yield client


def items(client: httpx.Client, ranker: str = "movies", **query: Any) -> dict[str, Any]:
    answer = client.get(f"/models/{ranker}/items", params=query)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def test_items_by_id_are_columns(demo: httpx.Client) -> None:
    found = items(demo, ids="1, 2028,no-such-film")
    assert found["item_ids"] == ["1", "2028", "no-such-film"] and found["known"] == [True, True, False]
    for name, column in found["fields"].items():
        assert column == [DISPLAY["1"][name], DISPLAY["2028"][name], None]
    assert list(found["fields"]) == ["title", "genres", "decade"]


def test_items_without_any_id_are_empty_columns(demo: httpx.Client) -> None:
    assert items(demo, ids="") == {"item_ids": [], "known": [], "fields": {"title": [], "genres": [], "decade": []}}


def test_an_id_with_a_comma_is_asked_for_whole(demo: httpx.Client) -> None:
    assert items(demo, id=["a,b", "1"])["item_ids"] == ["a,b", "1"]


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("toy st", ["1", "3114"]),
        ("TOY  STORY", ["1", "3114"]),
        ("2028", ["2028"]),
        ("miserables", ["73", "1873"]),
        ("zzzz", []),
    ],
)
def test_search_finds_titles_and_ids(demo: httpx.Client, query: str, first: list[str]) -> None:
    assert items(demo, query=query, limit=5)["item_ids"] == first


def test_search_is_bounded_and_puts_beginnings_first(demo: httpx.Client) -> None:
    found = items(demo, query="the", limit=MOST_FOUND)
    titles = [title.lower() for title in found["fields"]["title"]]
    assert len(titles) == MOST_FOUND and len(set(found["item_ids"])) == MOST_FOUND
    begins = [title.startswith("the") for title in titles]
    assert any(begins) and begins == sorted(begins, reverse=True)
    assert len(items(demo, query="the")["item_ids"]) == 20
    assert items(demo, query="", limit=2)["item_ids"] == ["1", "2"]


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ({}, "needed"),
        ({"ids": "1", "query": "a"}, "exclude"),
        ({"query": "a", "limit": 0}, "from 1 to 100"),
        ({"query": "a", "limit": MOST_FOUND + 1}, "from 1 to 100"),
        ({"query": "a", "limit": "9" * 5000}, "from 1 to 100"),
        ({"query": "a", "limit": "0000000019"}, "from 1 to 100"),
        ({"query": "a", "limit": "two"}, "from 1 to 100"),
        ({"query": "a" * (MAX_ID + 1)}, "limit 256"),
        ({"ids": ",".join(["1"] * (MOST_ITEMS + 1))}, "501 ids, limit 500"),
    ],
)
def test_wrong_question_names_the_limit(demo: httpx.Client, query: dict[str, Any], detail: str) -> None:
    answer = demo.get("/models/movies/items", params=query)
    assert detail in assert_problem(answer, 422)["detail"]


def test_unknown_ranker_is_404(demo: httpx.Client) -> None:
    for path in ("items?ids=1", "examples"):
        assert_problem(demo.get(f"/models/other/{path}"), 404)


def test_bundle_without_titles_is_searched_by_id(demo: httpx.Client) -> None:
    found = items(demo, "plain", query="2028")
    assert found["item_ids"] == ["2028"] and found["fields"] == {}
    assert demo.get("/models/plain").json()["return_fields"] == []


def test_return_fields_follow_the_order_of_the_results(demo: httpx.Client) -> None:
    body = {"ranker": "movies", "candidates": {"item_ids": ["595", "no-such-film", "1", "595"]}, "top_n": 3}
    plain = ask(demo, body)
    assert "fields" not in plain["results"]
    answer = ask(demo, body | {"return_fields": ["genres", "title"]})
    assert answer["results"]["item_ids"] == plain["results"]["item_ids"]
    shown = [DISPLAY.get(item, {}) for item in answer["results"]["item_ids"]]
    assert answer["results"]["fields"] == {name: [row.get(name) for row in shown] for name in ("genres", "title")}
    assert ask(demo, body | {"return_fields": []})["results"]["fields"] == {}


def test_unknown_return_field_names_the_known_ones(demo: httpx.Client) -> None:
    body = {"ranker": "movies", "candidates": {"item_ids": ["1"]}, "return_fields": ["title", "titel"]}
    problem = assert_problem(demo.post("/rerank", json=body), 422)
    assert problem["errors"] == [
        {"pointer": "/return_fields/1", "detail": "unknown field; known: title, genres, decade"}
    ]
    problem = assert_problem(demo.post("/rerank", json=body | {"ranker": "plain"}), 422)
    assert "has no titles" in problem["detail"]


def test_examples_work_as_they_stand(demo: httpx.Client) -> None:
    examples = demo.get("/models/movies/examples").json()["examples"]
    assert examples[0] == demo.get("/models/movies").json()["example"]
    users = [example["user"] for example in examples]
    assert len(users) == len(set(users)) > 5 and "small:99" in users
    for example in examples:
        answer = ask(demo, example)
        assert answer["meta_embedding"]["status"] == "hit" and answer["history"]["unknown"] == 0
    plain = demo.get("/models/plain/examples").json()["examples"]
    assert plain == [demo.get("/models/plain").json()["example"]]


def test_routes_are_documented(demo: httpx.Client) -> None:
    document = demo.get("/openapi.json").json()
    operation = document["paths"]["/models/{ranker}/items"]["get"]
    assert {parameter["name"] for parameter in operation["parameters"]} == {"ranker", "ids", "id", "query", "limit"}
    assert {"200", "401", "404", "422"} <= operation["responses"].keys()
    assert "return_fields" in document["components"]["schemas"]["RankRequest"]["properties"]
    assert "/models/{ranker}/examples" in document["paths"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("display.json", []),
        ("display.json", {"1": "Toy Story"}),
        ("display.json", {"1": {"title": {}}}),
        ("display.json", {"1": {"genres": [1]}}),
        ("examples.json", {}),
        ("examples.json", [{"candidates": {}}]),
        ("examples.json", [{}] * 65),
    ],
)
def test_content_of_another_shape_is_refused(tmp_path: Path, file: str, content: Any) -> None:
    given = {"titles": content, "examples": None} if file == "display.json" else {"titles": None, "examples": content}
    with pytest.raises(ManifestError):
        load_bundle(write_bundle(tmp_path, "bad", **given))


def test_large_file_of_titles_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "display.json"
    path.write_text(json.dumps({"a": {"title": "A"}}))
    assert read_titles(path.read_bytes(), {"a": 2}).names == ["title"]
    monkeypatch.setattr(titles_module, "MOST_BYTES", 10)
    assert read_titles(path.read_bytes(), {"a": 2}).names == []


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_members_are_those_of_the_whole_object(indent: int | None) -> None:
    for content in ({}, {"a": 1}, {"a": {"b": [1, "}"]}, "": None, '\u00fc"': [], "c": "x"}):
        text = f" {json.dumps(content, indent=indent)}\n"
        assert list(titles_module.members(text)) == list(json.loads(text).items())


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a"}', '{"a": 1', '{"a": 1,}', '{"a": 1} {}', "{1: 2}", '{"a": 1 "b": 2}', "null"]
)
def test_broken_object_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        list(titles_module.members(text))


def slow_search(titles: Titles, texts: dict[str, str], query: str, limit: int) -> list[str]:
    """The slow reference: three passes over all items."""
    lines = {item: (item.lower(), texts.get(item, "").lower()) for item in titles.items}
    exact = [item for item in lines if item == query]
    begin = [item for item, (name, _) in lines.items() if name.startswith(query)]
    begin += [item for item, (_, text) in lines.items() if text.startswith(query)]
    within = [item for item, (name, text) in lines.items() if query in name or query in text]
    return list(dict.fromkeys(exact + begin + within))[:limit]


@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_search_equals_the_slow_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(titles_module, "BLOCK", block)
    rng = np.random.default_rng(block)
    for n in (0, 1, 2, 30):
        ids = [f"{''.join(rng.choice(list('ab1'), 2))}{k}" for k in range(n)]
        texts = {item: "".join(rng.choice(list("ab "), 5)).strip() or "b" for item in ids if rng.random() < 0.8}
        texts = {item: " ".join(text.split()) for item, text in texts.items()}
        path = tmp_path / "display.json"
        path.write_text(json.dumps({item: {"title": text} for item, text in texts.items()}))
        titles = read_titles(path.read_bytes(), {item: row for row, item in enumerate(ids, 2)})
        for query in ("a", "b", "ab", "b1", "aab", *ids[:3]):
            for limit in (1, 3, 100):
                *steps, found = titles.search(query, limit)
                assert set(steps) <= {None}
                assert found == slow_search(titles, texts, query, limit)


def test_example_requests_of_the_bundle_are_valid() -> None:
    for body in json.loads((BUNDLE / "examples.json").read_text()):
        RankRequest.model_validate(body)
