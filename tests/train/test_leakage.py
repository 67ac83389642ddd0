"""Each check of the data finds its leak, counts it, and is silent on clean data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from slatewise_train.data import Data
from slatewise_train.evaluation.leakage import check_leakage
from tests.train.test_offline import make_data

CLEAN = {"u": ["a", "b", "c"], "v": ["b", "c", "d"], "w": ["c", "e"]}


def found(data: Data) -> dict[str, int]:
    return {check.name: check.found for check in check_leakage(data)}


def at_times(data: Data, times: list[float], **split: Any) -> Data:
    sequences = replace(data.sequences, timestamps=np.array(times))
    return replace(data, sequences=sequences, config=replace(data.config, **split))


def test_clean_data_has_no_leak() -> None:
    data = make_data(CLEAN, list("abcde"))
    data = at_times(data, [1, 2, 9, 1, 3, 9, 2, 9])
    assert set(found(data).values()) == {0}
    assert {check.line for check in check_leakage(data)} == {check.fact for check in check_leakage(data)}


def test_repeated_targets_are_counted() -> None:
    data = make_data({"u": ["a", "b", "a"], "v": ["a", "b", "c"], "w": ["b", "b"], "one": ["a"]}, list("abc"))
    (check,) = [check for check in check_leakage(data) if check.name == "repeated_targets"]
    assert check.found == 2
    assert (
        check.line.startswith("repeated targets: the item of 2 of 3 (66.7%) test events")
        and "no item of the history is removed" in check.line
    )


def test_equal_times_are_counted() -> None:
    data = at_times(make_data(CLEAN, []), [1, 2, 2, 1, 1, 3, 5, 5])
    assert found(data)["equal_times"] == 2


def test_time_travel_is_counted() -> None:
    """Reading sorts the events, so the order is broken here by hand."""
    data = at_times(make_data(CLEAN, []), [1, 7, 3, 1, 2, 3, 5, 6])
    assert found(data)["time_travel"] == 1


@pytest.mark.parametrize(("kind", "expected"), [("leave-one-out", 1), ("time", 2)])
def test_training_events_of_the_future_are_counted(kind: str, expected: int) -> None:
    """Test events at 3, 9 and 9.5; training events at 1, 2, 1, 9.2 and 5."""
    data = at_times(make_data(CLEAN, []), [1, 2, 3, 1, 9.2, 9.5, 5, 9], kind=kind, test_from=5.0)
    assert found(data)["future_events"] == expected


def test_users_with_the_events_of_another_are_counted() -> None:
    data = make_data(
        {
            "u": list("abc"),
            "copy": list("abc"),
            "again": list("abc"),
            "v": list("acb"),
            "s": ["a", "b"],
            "t": ["a", "b"],
            "long": list("abcd"),
        },
        [],
    )
    assert found(data)["duplicate_users"] == 2, "s and t are too short to count"
    times = data.sequences.timestamps.copy()
    times[4] += 1
    assert found(replace(data, sequences=replace(data.sequences, timestamps=times)))["duplicate_users"] == 1


def test_repeated_rows_are_counted() -> None:
    data = at_times(make_data({"u": ["a", "b", "a", "a"], "v": ["a", "b"]}, []), [1, 1, 1, 2, 1, 1])
    assert found(data)["duplicate_rows"] == 1


def test_checks_name_no_user() -> None:
    data = make_data({"secret-1": list("abc"), "secret-2": list("abc")}, [])
    assert not any("secret" in check.line for check in check_leakage(data))


def test_checks_of_data_without_test_events_are_empty() -> None:
    assert set(found(make_data({"u": ["a"], "v": ["b"]}, [])).values()) == {0}


def test_tables_without_times_have_no_leak_in_time() -> None:
    data = at_times(make_data(CLEAN, list("abcde")), [float("nan")] * 8)
    assert set(found(data).values()) == {0}
