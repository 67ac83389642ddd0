"""The forms of candidates and histories, and the requests that they become."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

from slatewise.client.body import rank_body, to_json
from slatewise.client.errors import Invalid
from slatewise.schemas import RankRequest

ITEMS = {"item_id": [1, 2], "popularity": [2.5, math.nan], "new": [True, False], "genres": ["Drama", None]}
WANTED = {
    "item_ids": [1, 2],
    "features": {"popularity": [2.5, None], "new": [1.0, 0.0]},
    "fields": {"genres": ["Drama", None]},
}


@pytest.mark.parametrize("frame", [pd.DataFrame(ITEMS), pl.DataFrame(ITEMS, strict=False).fill_nan(None)])
def test_a_frame_is_split_into_features_and_fields(frame: Any) -> None:
    body = rank_body({"candidates": frame})
    assert body == {"candidates": WANTED}
    RankRequest.model_validate_json(to_json(body))


@pytest.mark.parametrize("candidates", [[1, 2], np.array([1, 2]), (k for k in (1, 2)), {"item_ids": pd.Series([1, 2])}])
def test_ids_alone_are_candidates(candidates: Any) -> None:
    assert rank_body({"candidates": candidates}) == {"candidates": {"item_ids": [1, 2]}}


EVENTS = {"item_id": ["a", "b"], "action": ["like", None], "timestamp": [5.0, None]}
HISTORIES = [
    {"item_ids": ["a", "b"], "actions": ["like", None], "timestamps": [5.0, None]},
    EVENTS,
    [("a", "like", 5.0), ("b", None, None)],
    [["a", "like", 5.0], ("b",)],
    [{"item_id": "a", "action": "like", "timestamp": 5.0}, {"item_id": "b"}],
    iter([("a", "like", 5.0), ("b",)]),
    pd.DataFrame(EVENTS),
    pd.DataFrame(EVENTS | {"user": ["u", "u"]}),
    pl.DataFrame(EVENTS),
]


@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: type(history).__name__)
def test_every_form_of_a_history_is_the_same_request(history: Any) -> None:
    body = rank_body({"candidates": ["a"], "history": history})
    assert body["history"] == {"item_ids": ["a", "b"], "actions": ["like", None], "timestamps": [5.0, None]}


@pytest.mark.parametrize("history", [["a", "b"], np.array(["a", "b"]), pl.Series(["a", "b"]), {"item_id": ["a", "b"]}])
def test_a_history_of_ids_has_no_other_column(history: Any) -> None:
    assert rank_body({"candidates": ["a"], "history": history})["history"] == {"item_ids": ["a", "b"]}


@pytest.mark.parametrize("history", [[], {}, pd.DataFrame({"item_id": []}), ()])
def test_an_empty_history_is_sent(history: Any) -> None:
    assert rank_body({"candidates": ["a"], "history": history})["history"] == {"item_ids": []}


@pytest.mark.parametrize(
    ("members", "pointer"),
    [
        ({}, "/candidates"),
        ({"candidates": None}, "/candidates"),
        ({"candidates": {"ids": [1]}}, "/candidates/item_ids"),
        ({"candidates": pd.DataFrame({"a": [1]})}, "/candidates"),
        ({"candidates": {"item_ids": [1], "features": [1]}}, "/candidates/features"),
        ({"candidates": [1], "history": "595"}, "/history"),
        ({"candidates": [1], "history": 5}, "/history"),
        ({"candidates": [1], "history": [("a", "b", 1, 2)]}, "/history/0"),
        ({"candidates": [1], "history": ["a", ("b",)]}, "/history/0"),
        ({"candidates": [1], "history": {"item_id": ["a"], "rating": [5]}}, "/history/rating"),
        ({"candidates": [1], "history": {"item_id": ["a"], "item_ids": ["a"]}}, "/history/item_ids"),
        ({"candidates": [1], "user": 1.5}, "/user"),
        ({"candidates": [1], "user": True}, "/user"),
    ],
)
def test_wrong_members_are_refused_with_a_pointer(members: dict[str, Any], pointer: str) -> None:
    with pytest.raises(Invalid) as caught:
        rank_body(members)
    assert [fault.pointer for fault in caught.value.faults] == [pointer]


def test_scalars_are_converted_and_none_is_left_out() -> None:
    body = rank_body(
        {
            "candidates": [1],
            "user": np.int64(7),
            "top_n": np.int32(3),
            "request_time": pd.Timestamp(10, unit="s"),
            "head_weights": {"like": np.float32(0.5)},
            "prune": {"point": np.int64(500), "set": None},
            "deadline_ms": None,
            "return_fields": np.array(["title"]),
        }
    )
    assert json.loads(to_json(body)) == {
        "candidates": {"item_ids": [1]},
        "user": 7,
        "top_n": 3,
        "request_time": 10.0,
        "head_weights": {"like": 0.5},
        "prune": {"point": 500, "set": None},
        "return_fields": ["title"],
    }


@pytest.mark.parametrize("value", [math.inf, object(), "\ud800"])
def test_json_refuses_other_values_clearly(value: Any) -> None:
    with pytest.raises(Invalid, match="cannot be written as JSON"):
        to_json({"a": value})
