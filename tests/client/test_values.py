"""Columns and scalars of every library become plain JSON values."""

from __future__ import annotations

import json
import math
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from slatewise.client.errors import Invalid
from slatewise.client.values import column, ids, numbers, one_id, scalar

NOON = datetime(2020, 1, 2, 12, 0, 0, 250_000)
SECONDS = NOON.replace(tzinfo=UTC).timestamp()
EAST = timezone(timedelta(hours=2))

TIMES = [
    [NOON],
    [NOON.replace(tzinfo=UTC).astimezone(EAST)],
    [pd.Timestamp(NOON)],
    [pd.Timestamp(NOON, tz="UTC").tz_convert("Asia/Tokyo")],
    [np.datetime64(NOON)],
    [np.datetime64(NOON, "ns")],
    np.array([NOON], "datetime64[ms]"),
    pd.Series([NOON]),
    pd.Series([NOON]).dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo"),
    pd.DatetimeIndex([NOON]),
    pl.Series([NOON]),
    pl.Series([NOON]).dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo"),
]


@pytest.mark.parametrize("times", TIMES, ids=lambda times: type(times).__name__)
def test_times_become_unix_seconds(times: Any) -> None:
    assert column(times, "") == [SECONDS]


@pytest.mark.parametrize(
    "times",
    [
        [NOON, None, pd.NaT, np.datetime64("NaT"), math.nan],
        np.array([NOON, "NaT"], "datetime64[us]"),
        pd.Series([NOON, None]),
        pd.Series([NOON, None]).dt.tz_localize("UTC"),
        pl.Series([NOON, None]),
    ],
)
def test_missing_times_become_null(times: Any) -> None:
    first, *rest = column(times, "")
    assert first == SECONDS and set(rest) == {None}


def test_dates_are_midnight_of_utc() -> None:
    midnight = datetime(2020, 1, 2, tzinfo=UTC).timestamp()
    assert column([date(2020, 1, 2)], "") == column(pl.Series([date(2020, 1, 2)]), "") == [midnight]


@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
def test_nan_becomes_null(kind: str) -> None:
    assert column(np.array([1.5, np.nan], kind), "") == [1.5, None]


@pytest.mark.parametrize(
    "values",
    [
        [1.5, math.nan],
        (1.5, None),
        [np.float32(1.5), np.float64("nan")],
        [Decimal("1.5"), Decimal("nan")],
        [1.5, pd.NA],
        pd.Series([1.5, None]),
        pd.Series([1.5, None], dtype="Float64"),
        pd.Series([1.5, None], dtype=object),
        pl.Series([1.5, None]),
        pl.Series([1.5, math.nan]),
        torch.tensor([1.5, math.nan]),
        (value for value in (1.5, None)),
    ],
)
def test_missing_numbers_become_null(values: Any) -> None:
    assert numbers(values, "") == [1.5, None]


@pytest.mark.parametrize(
    "values",
    [
        [1, 2],
        range(1, 3),
        {1: "a", 2: "b"}.keys(),
        np.array([1, 2], np.uint8),
        [np.int64(1), np.int32(2)],
        pd.Series([1, 2]),
        pd.Series([1, 2], dtype="Int64"),
        pd.Index([1, 2]),
        pl.Series([1, 2]),
        torch.tensor([1, 2]),
        iter([1, 2]),
    ],
)
def test_integer_ids_stay_integers(values: Any) -> None:
    found = ids(values, "")
    assert found == [1, 2] and {*map(type, found)} == {int}


@pytest.mark.parametrize(
    "values",
    [
        ["a", "b"],
        np.array(["a", "b"]),
        np.array(["a", "b"], object),
        pd.Series(["a", "b"]),
        pd.Series(["a", "b"], dtype="category"),
        pl.Series(["a", "b"]),
        pl.Series(["a", "b"], dtype=pl.Categorical),
        [np.str_("a"), "b"],
    ],
)
def test_text_ids_stay_text(values: Any) -> None:
    found = ids(values, "")
    assert found == ["a", "b"] and {*map(type, found)} == {str}


@pytest.mark.parametrize(
    ("values", "place", "reason"),
    [
        ([1, None], "/c/1", "a missing value is no id"),
        (pd.Series([1, None]), "/c/0", "a float is no id"),
        ([True], "/c/0", "not bool"),
        ([b"a"], "/c/0", "not bytes"),
        ([["a"]], "/c/0", "not list"),
        ("595", "/c", "must be a column"),
        (5, "/c", "must be a column"),
        ({"a": 1}, "/c", "must be a column"),
        (np.zeros((2, 2)), "/c", "2 dimensions"),
        (np.array(5), "/c", "0 dimensions"),
        (np.array([b"a"]), "/c", "dtype"),
        (np.array([1j]), "/c", "dtype"),
        (pl.LazyFrame({"a": [1]}), "/c", "collect"),
    ],
)
def test_wrong_ids_are_refused_with_their_place(values: Any, place: str, reason: str) -> None:
    with pytest.raises(Invalid, match=reason) as caught:
        ids(values, "/c")
    assert caught.value.faults[0].pointer == place


@pytest.mark.parametrize("values", [[], (), np.array([]), pd.Series([], dtype=object), pl.Series([]), iter(())])
def test_an_empty_column_stays_empty(values: Any) -> None:
    assert column(values, "") == []


def test_numbers_refuse_infinity_and_take_booleans() -> None:
    assert numbers(np.array([True, False]), "") == [1.0, 0.0]
    with pytest.raises(Invalid, match="/f/1: must be finite"):
        numbers([0.0, math.inf], "/f")


def test_values_of_one_item_become_lists() -> None:
    wanted = [["Drama", "War"], None, "Comedy"]
    assert column([np.array(["Drama", "War"]), None, "Comedy"], "") == wanted
    assert column(pd.Series([["Drama", "War"], None, "Comedy"]), "") == wanted
    assert column(pl.Series([["Drama", "War"], None]), "") == wanted[:2]


def test_scalars_are_plain() -> None:
    for value in (np.int64(3), np.float32(0.5), np.bool_(True), np.str_("a"), pd.Timestamp(NOON), pd.NA, pd.NaT):
        json.dumps(scalar(value))
    assert one_id(np.int64(3), "") == 3
    with pytest.raises(Invalid):
        one_id(None, "/user")


def test_a_plain_list_is_not_copied() -> None:
    listed: list[Any] = ["a"] * 1000
    assert column(listed, "") == listed
