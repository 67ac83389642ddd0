"""Rows of JSON from columns."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from slatewise.http.calls.rows import render_rows, with_member

NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, list[Any]]:
    n = draw(st.integers(0, 5))
    names = draw(st.lists(st.text().filter(lambda name: "." not in name), min_size=1, max_size=4, unique=True))
    kinds = [
        draw(st.sampled_from([st.text(), st.sampled_from(['",', '","', "\n", '"', ",", ""]), NUMBERS])) for _ in names
    ]
    return {name: draw(st.lists(kind, min_size=n, max_size=n)) for name, kind in zip(names, kinds)}


@given(tables())
@example({"item": ['",', ",", '"', "\n", ""], "score": [1e-7, 0.0, 1.0, 5, 1e300]})
@example({"item": [",", ",", "a", ",,"]})
@example({"item": ["\\", ",", "\\,"]})
def test_rows_equal_a_dictionary_for_each_row(table: dict[str, list[Any]]) -> None:
    rows = [dict(zip(table, row)) for row in zip(*table.values())]
    assert json.loads(render_rows(table)) == rows


def test_names_with_points_are_members_of_objects() -> None:
    table: dict[str, list[Any]] = {"a.b": [1, 2], "c": ["x", "y"], "d.e.f": [0.5, 1]}
    rows = json.loads(render_rows(table))
    assert rows == [{"a": {"b": b}, "c": c, "d": {"e": {"f": f}}} for b, c, f in zip(*table.values())]
    assert json.loads(render_rows({"c": [1, 2], "a.b": [3, 4]})) == [{"c": 1, "a": {"b": 3}}, {"c": 2, "a": {"b": 4}}]


def test_member_of_json_joins_an_object() -> None:
    assert json.loads(with_member({"b": 1}, "a", b"[2]")) == {"a": [2], "b": 1}
