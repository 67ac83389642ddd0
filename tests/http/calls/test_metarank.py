"""The call of Metarank: fields of items, times, and who the user is."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from slatewise.errors import Invalid
from slatewise.http.calls.metarank import seconds
from tests.http.calls.support import FILMS, MODEL, USER, native_order
from tests.http.support import assert_problem

TIME = 829828006


def ask(client: httpx.Client, items: list[Any], **members: Any) -> Any:
    answer = client.post(f"/rank/{MODEL}?explain=true", json={"user": USER, "items": items} | members)
    assert answer.status_code == 200, answer.text
    return answer.json()


def items(answer: Any) -> list[str]:
    return [row["item"] for row in answer["items"]]


def field(name: Any, value: Any) -> dict[str, Any]:
    return {"name": name, "value": value}


def test_form_of_the_answer_and_of_curl(demo: httpx.Client) -> None:
    body = json.dumps({"event": "ranking", "id": "r 1", "user": USER, "items": [{"id": film} for film in FILMS]})
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = demo.post(f"/rank/{MODEL}", content=body, headers=form).json()
    assert answer.keys() == {"took", "items", "ignored_fields"} and items(answer) == native_order(demo)
    assert demo.post(f"/rank/{MODEL}", content=body.replace("r 1", "r1")).headers["X-Request-ID"] == "r1"


def test_fields_of_items_become_features_and_fields(demo: httpx.Client) -> None:
    years = [1989, 1981.5, None, 1995, True, 1991]
    known = [[field("year", year)] if year is not None else [] for year in years]
    answer = ask(demo, [{"id": film, "fields": fields} for film, fields in zip(FILMS, known)], timestamp=TIME * 1000)
    columns = {"year": [None if year is None else float(year) for year in years]}
    native = demo.post(
        "/rerank", json={"user": USER, "request_time": TIME, "candidates": {"item_ids": FILMS, "features": columns}}
    ).json()["results"]
    assert items(answer) == native["item_ids"] and [r["score"] for r in answer["items"]] == native["scores"]
    assert answer["ignored_fields"] == {}

    genres: list[Any] = ["Drama", ["Comedy", "Crime"], None]
    new = [{"id": f"new-{k}", "fields": [field("genres", g)] if g else None} for k, g in enumerate(genres)]
    native = demo.post(
        "/rerank",
        json={
            "user": USER,
            "request_time": TIME,
            "candidates": {"item_ids": [item["id"] for item in new], "fields": {"genres": genres}},
        },
    ).json()["results"]
    answer = ask(demo, new, timestamp=TIME * 1000)
    assert items(answer) == native["item_ids"] and [r["score"] for r in answer["items"]] == native["scores"]


def test_fields_without_use_are_counted(demo: httpx.Client) -> None:
    fields = [field("year", "1991"), field("genres", 5), field("price", 1.5), field("tags", ["a"]), field("price", 2)]
    answer = ask(demo, [{"id": film, "fields": fields} for film in FILMS[:2]])
    assert answer["ignored_fields"] == {"year": 2, "genres": 2, "price": 4, "tags": 2}
    many = [field(f"name-{k}", k) for k in range(1000)]
    assert len(ask(demo, [{"id": "1", "fields": many}])["ignored_fields"]) == 20


@pytest.mark.parametrize(
    "fields",
    [[1], [{}], [{"name": "year"}], [field([], 1)], [field({}, 1)], "x", 5, {"year": 1}, [field("genres", [1])]],
)
def test_malformed_fields_are_refused(demo: httpx.Client, fields: Any) -> None:
    answer = demo.post(f"/rank/{MODEL}", json={"items": [{"id": "1"}, {"id": "2", "fields": fields}]})
    assert "/items" in assert_problem(answer, 422)["detail"]


def test_huge_numbers_are_refused_or_ranked(demo: httpx.Client) -> None:
    for number, status in (("1e308", 200), ("9" * 30, 200), ("1e400", 422), ("9" * 400, 422), ("NaN", 422)):
        body = f'{{"items": [{{"id": "1", "fields": [{{"name": "year", "value": {number}}}]}}]}}'
        assert demo.post(f"/rank/{MODEL}", content=body).status_code == status, number


def test_malformed_items_are_named(demo: httpx.Client) -> None:
    for wrong in (1, "1", None, [], {}, {"fields": []}):
        problem = assert_problem(demo.post(f"/rank/{MODEL}", json={"items": [{"id": "1"}, wrong]}), 422)
        assert problem["errors"] == [{"pointer": "/items/1", "detail": "must be an object with `id`"}]
    problem = assert_problem(demo.post(f"/rank/{MODEL}", json={"items": [{"id": "1"}, {"id": 1.5}]}), 422)
    assert problem["errors"][0]["pointer"] == "/items/1"
    assert_problem(demo.post("/rank/none", json={"items": [{"id": "1"}]}), 404)


def test_session_stands_for_a_missing_user(demo: httpx.Client) -> None:
    sent = [{"id": film} for film in FILMS]
    by_user = items(ask(demo, sent))
    assert items(ask(demo, sent, session="s1")) == by_user == items(ask(demo, sent, user=None, session=USER))
    assert items(ask(demo, sent, user=None)) == native_order(demo, user=None)


@pytest.mark.parametrize(
    "timestamp",
    [829831606000, "829831606000", "1996-04-18T12:46:46", "1996-04-18T12:46:46Z", "1996-04-18T14:46:46+02:00"],
)
def test_times_are_milliseconds_or_iso_8601(timestamp: Any) -> None:
    assert seconds(timestamp) == 829831606


@pytest.mark.parametrize("timestamp", [-1, "-1", "yesterday", "", 10**15, "٣", "1" * 64, "0001-01-01", "9999-12-31"])
def test_other_times_are_refused(timestamp: Any) -> None:
    with pytest.raises(Invalid, match="/timestamp: must"):
        seconds(timestamp)
