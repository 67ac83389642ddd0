"""A ranking iterates as rows, keeps its columns, and is shown without trusting its texts."""

from __future__ import annotations

import builtins
import dataclasses
from typing import Any

import pytest

from slatewise.client.errors import ServerFault
from slatewise.client.libraries import MissingLibrary
from slatewise.client.results import SHOWN, Ranking, Row

RESPONSE: dict[str, Any] = {
    "id": "r1",
    "ranker": "films",
    "version": 3,
    "variant": "fp32",
    "exit": "set",
    "results": {
        "index": [1, 0],
        "item_ids": ["b", "a"],
        "scores": [0.75, 0.5],
        "heads": {"like": [0.5, 0.25]},
        "fields": {"title": ["B <script>", None], "score": ["x", "y"]},
    },
    "history": {"used": 2, "cache": "hit"},
    "degraded": ["deadline", "exit"],
    "timings_ms": {"total": 1.25},
    "a_member_of_a_newer_server": 1,
}


def without_scores(n: int = 2) -> dict[str, Any]:
    results = {"index": [*range(n)], "item_ids": [f"i{k}" for k in range(n)], "scores": None, "heads": {}}
    return RESPONSE | {"exit": "input_order", "variant": None, "results": results}


def test_rows_and_columns_agree() -> None:
    ranking = Ranking.from_response(RESPONSE)
    assert len(ranking) == 2
    assert list(ranking) == [Row("b", 0.75, 1, 1, {"like": 0.5}), Row("a", 0.5, 2, 0, {"like": 0.25})]
    assert ranking[0] == ranking[:1][0] == ranking[-2] == next(iter(ranking))
    assert (ranking.scores, ranking.index, ranking.heads) == ([0.75, 0.5], [1, 0], {"like": [0.5, 0.25]})
    assert (ranking.degraded, ranking.exit, ranking.version, ranking.id) == (("deadline", "exit"), "set", 3, "r1")
    assert ranking.history["cache"] == "hit" and ranking.timings_ms == {"total": 1.25}
    assert ranking.response["a_member_of_a_newer_server"] == 1
    with pytest.raises(IndexError):
        ranking[2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ranking.exit = "dot"  # type: ignore[misc]


def test_ranks_follow_scores_in_input_order() -> None:
    """The answer of /score; ties keep their order."""
    results = {"index": [0, 1, 2, 3], "item_ids": [*"abcd"], "scores": [0.1, 0.9, 0.1, 0.5], "heads": {}}
    assert Ranking.from_response(RESPONSE | {"results": results}).ranks == [3, 1, 4, 2]


def test_frames_have_one_row_each() -> None:
    ranking = Ranking.from_response(RESPONSE)
    names = ["item_id", "score", "rank", "index", "like", "title", "field_score"]
    for frame in (ranking.to_pandas(), ranking.to_polars()):
        assert [*frame.columns] == names
        assert frame["item_id"].to_list() == ["b", "a"] and frame["rank"].to_list() == [1, 2]


@pytest.mark.parametrize("n", [0, 1])
def test_frames_without_scores_have_missing_ones(n: int) -> None:
    ranking = Ranking.from_response(without_scores(n))
    pandas, polars = ranking.to_pandas(), ranking.to_polars()
    assert str(pandas["score"].dtype) == "float64" and pandas["score"].isna().sum() == n == len(pandas)
    assert str(polars["score"].dtype) == "Float64" and polars["score"].null_count() == n == len(polars)
    assert ranking.summary() in repr(ranking) and ranking._repr_html_()


@pytest.mark.parametrize("name", ["pandas", "polars"])
def test_a_missing_library_names_the_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingLibrary, match=rf"to_{name}\(\) needs {name}; run: pip install {name}"):
        getattr(Ranking.from_response(RESPONSE), f"to_{name}")()
    assert issubclass(MissingLibrary, builtins.ImportError)


def test_html_escapes_every_text() -> None:
    evil = "<img src=x onerror=alert(1)>"
    results = {"index": [0], "item_ids": [evil], "scores": [0.5], "heads": {evil: [0.5]}, "fields": {"title": [[evil]]}}
    html = Ranking.from_response(RESPONSE | {"results": results, "ranker": evil, "degraded": [evil]})._repr_html_()
    assert "<img" not in html and html.count("&lt;img") == 5


def test_html_of_many_rows_is_cut() -> None:
    html = Ranking.from_response(without_scores(SHOWN + 5))._repr_html_()
    assert html.count("<tr>") == SHOWN + 1 and "and 5 more" in html


@pytest.mark.parametrize("response", [None, [], {}, {"results": None}, RESPONSE | {"results": {"item_ids": ["a"]}}])
def test_another_answer_is_a_clear_error(response: Any) -> None:
    with pytest.raises(ServerFault, match="not a ranking"):
        Ranking.from_response(response)


def test_the_text_is_one_short_line() -> None:
    text = repr(Ranking.from_response(RESPONSE))
    assert text == (
        "<Ranking of 2 candidates by films version 3, exit set, 1.25 ms, degraded: deadline, exit: b 0.750, a 0.500>"
    )
