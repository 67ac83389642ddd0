"""Gap buckets, windows and request context, each compared with a slow reference; matrices of requests and tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slatewise.bundle.features import (
    LARGEST_FEATURE,
    field_change,
    gap_buckets,
    make_candidates,
    make_history,
    numeric_matrix,
    request_context,
    rows_of,
    time_order,
    unknown_positions,
    window_start,
)
from slatewise.inference.arrays import CONTEXT_SIZE, GAP_BUCKETS, GAP_FIRST, GAP_MISSING, Float32

# quarters of a second, which floats hold exactly, so the reference can use integers
quarters = st.integers(0, 4 * 99_999_999_999)
times = st.lists(st.none() | quarters, max_size=80)


def buckets_of(timestamps: Sequence[float | None]) -> list[int]:
    result = gap_buckets(np.array(timestamps, np.float64))
    assert result.dtype == np.int64
    return result.tolist()


def slow_bucket(gap: int) -> int:
    """Count in integers how often gap + 1 can be halved; the gap is in quarters of a second."""
    left = gap + 4
    halvings = 0
    while left >= 8:
        left = left // 2
        halvings = halvings + 1
    return min(2 + halvings, GAP_BUCKETS - 1)


def slow_buckets(timestamps: list[int | None]) -> list[int]:
    result = []
    for k, now in enumerate(timestamps):
        before = timestamps[k - 1] if k else None
        if k == 0:
            result.append(GAP_FIRST)
        elif now is None or before is None:
            result.append(GAP_MISSING)
        else:
            result.append(slow_bucket(max(0, now - before)))
    return result


@given(times)
def test_gap_buckets_of_random_times_equal_the_reference(timestamps: list[int | None]) -> None:
    assert buckets_of([None if t is None else t / 4 for t in timestamps]) == slow_buckets(timestamps)


@given(st.integers(0, 40), st.integers(-2, 2))
def test_gap_buckets_near_powers_of_two_equal_the_reference(power: int, aside: int) -> None:
    gap = max(0, 4 * 2**power + aside - 4)
    assert buckets_of([0.0, gap / 4])[1] == slow_bucket(gap)


def formula(timestamps: list[float]) -> list[int]:
    """2 + floor(log2(gap + 1)), clamped, in exact fractions; NaN is a missing time."""
    result = [GAP_FIRST][: len(timestamps)]
    for before, now in itertools.pairwise(timestamps):
        if math.isnan(before) or math.isnan(now):
            result.append(GAP_MISSING)
            continue
        left = Fraction(max(0.0, now - before)) + 1
        power = 0
        while left >= 2 ** (power + 1):
            power += 1
        result.append(min(2 + power, GAP_BUCKETS - 1))
    return result


near_powers = st.builds(  # the edges of the buckets, and the next floats on both sides
    lambda power, aside: float(np.nextafter(2.0**power - 1, aside)),
    st.integers(0, 40),
    st.sampled_from([-math.inf, math.inf]),
) | st.integers(0, 40).map(lambda power: 2.0**power - 1)
gap_sizes = near_powers | near_powers.map(lambda gap: gap + 1) | st.floats(0, 1e10) | st.just(0.0)


@given(st.lists(st.just(math.nan) | st.floats(-1e11, 1e11), max_size=60))
def test_gap_buckets_of_random_times_equal_the_formula(timestamps: list[float]) -> None:
    assert buckets_of(timestamps) == formula(timestamps)


@given(st.lists(st.tuples(st.sampled_from(["gap", "gap", "gap", "back", "missing"]), gap_sizes), max_size=60))
def test_gap_buckets_at_bucket_edges_equal_the_formula(steps: list[tuple[str, float]]) -> None:
    """Each gap starts at time 0, so that the difference of the times is exact."""
    timestamps = [0.0]
    for kind, gap in steps:
        timestamps += {"gap": [gap, 0.0], "back": [-gap, 0.0], "missing": [math.nan, gap, 0.0]}[kind]
    assert buckets_of(timestamps) == formula(timestamps)


@pytest.mark.parametrize("power", range(1, 33))
def test_bucket_begins_exactly_at_a_power_of_two_minus_one(power: int) -> None:
    """Also for a gap + 1 that floating-point numbers would round up to the power of two."""
    edge = 2.0**power - 1
    assert buckets_of([0.0, edge, 0.0, float(np.nextafter(edge, 0))])[1::2] == [
        min(2 + power, GAP_BUCKETS - 1),
        min(1 + power, GAP_BUCKETS - 1),
    ]


@pytest.mark.parametrize(
    ("gap", "bucket"),
    [(0, 2), (0.5, 2), (1, 3), (2, 3), (3, 4), (59, 7), (3_600, 13), (86_400, 18), (2**31 - 2, 32), (2**31 - 1, 33)],
)
def test_gap_buckets_of_known_gaps_are_as_documented(gap: float, bucket: int) -> None:
    assert buckets_of([1_000.0, 1_000.0 + gap]) == [GAP_FIRST, bucket]


def test_gap_buckets_of_zero_and_one_event() -> None:
    assert buckets_of([]) == []
    assert buckets_of([5.0]) == buckets_of([None]) == [GAP_FIRST]


def test_missing_time_makes_both_adjacent_gaps_missing() -> None:
    assert buckets_of([0.0, None, 1.0, 2.0]) == [GAP_FIRST, GAP_MISSING, GAP_MISSING, 3]


def test_negative_gap_counts_as_zero() -> None:
    assert buckets_of([100.0, 40.0]) == buckets_of([100.0, 100.0])


@pytest.mark.parametrize("gap", [1e10, 1e15, 1e300])
def test_huge_gap_is_in_the_last_bucket(gap: float) -> None:
    assert buckets_of([0.0, gap])[1] == GAP_BUCKETS - 1


@given(times)
def test_gap_buckets_stay_inside_the_table(timestamps: list[int | None]) -> None:
    assert all(0 <= b < GAP_BUCKETS for b in buckets_of([None if t is None else t / 4 for t in timestamps]))


@given(times, st.integers(0, 10**9))
def test_shifted_times_have_equal_gap_buckets(timestamps: list[int | None], shift: int) -> None:
    moved = [None if t is None else (t + 4 * shift) / 4 for t in timestamps]
    assert buckets_of(moved) == buckets_of([None if t is None else t / 4 for t in timestamps])


def slow_window_start(offset: int, length: int, longest: int) -> int:
    """Event by event: the first readable multiple of 64 that leaves half of the events; otherwise of 32, 16, ..."""
    readable = [k for k in range(length) if length - k <= longest]
    for step in (64, 32, 16, 8, 4, 2, 1):
        for k in readable:
            if (offset + k) % step == 0 and 2 * (length - k) >= len(readable):
                return k
    return 0


offsets = st.integers(0, 1_000) | st.integers(0, 2**31)
lengths = st.integers(0, 700)
longests = st.integers(1, 600)


@given(offsets, lengths, longests)
def test_window_start_equals_the_reference(offset: int, length: int, longest: int) -> None:
    assert window_start(offset, length, longest) == slow_window_start(offset, length, longest)


@given(offsets, st.integers(1, 700), longests)
def test_window_has_at_least_half_of_the_readable_events(offset: int, length: int, longest: int) -> None:
    start = window_start(offset, length, longest)
    assert 0 <= start < length
    assert 1 <= length - start <= longest
    assert 2 * (length - start) >= min(length, longest)


def test_window_of_an_empty_history_starts_at_zero() -> None:
    assert window_start(0, 0, 1) == window_start(7, 0, 128) == 0


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128])
def test_history_within_the_limit_is_read_whole(length: int) -> None:
    assert window_start(0, length, 128) == 0


@given(st.integers(126, 400), st.integers(126, 600), st.integers(0, 5_000))
def test_long_sliding_window_moves_in_steps_of_64(longest: int, length: int, begin: int) -> None:
    starts = [
        begin + k + window_start(begin + k, length, longest) for k in range(200)
    ]  # each request has one more event
    moves = [after - before for before, after in itertools.pairwise(starts) if after != before]
    assert set(moves) == {64}
    assert len(moves) in (3, 4)  # in 199 steps, 64 apart


@given(st.integers(8, 125), st.integers(0, 5_000))
def test_short_sliding_window_moves_by_a_quarter_or_more(length: int, begin: int) -> None:
    starts = [begin + k + window_start(begin + k, length, 256) for k in range(300)]
    assert len(set(starts)) <= 300 / (length / 4) + 2


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 1_000))
def test_window_does_not_depend_on_older_events_sent(longest: int, beyond: int, dropped: int) -> None:
    length = longest + beyond
    assert dropped + window_start(dropped, length, longest) == window_start(0, dropped + length, longest)


@given(st.floats(0, 99_999_999_999))
def test_request_context_encodes_day_and_week_as_circle_points(moment: float) -> None:
    context = request_context(moment)
    assert (context.shape, context.dtype) == ((CONTEXT_SIZE,), np.float32)
    day = math.fmod(moment, 86_400) / 86_400
    week = math.fmod(moment, 604_800) / 604_800
    expected = [f(2 * math.pi * turn) for turn in (day, week) for f in (math.sin, math.cos)]
    np.testing.assert_allclose(context, expected, atol=1e-5)


def test_request_context_differs_for_all_hours_of_a_week() -> None:
    moments = np.array([request_context(3_600.0 * hour) for hour in range(168)])
    distances = np.abs(moments[:, None] - moments[None]).max(axis=2) + np.eye(168)
    assert distances.min() > 0.01


# Requests and tables as arrays


def test_make_history_equals_its_columns_with_gap_buckets() -> None:
    items = np.array([2, 0, 5])
    times = np.array([10.0, np.nan, 12.0])
    history = make_history(items, np.array([1, 0, 2]), times)
    assert (history.items.tolist(), history.actions.tolist()) == ([2, 0, 5], [1, 0, 2])
    np.testing.assert_array_equal(history.gaps, gap_buckets(times))


@given(st.lists(st.sampled_from(["a", "b", "c", "d", ""]), max_size=20))
def test_unknown_positions_equal_the_rows_that_are_0(names: list[str]) -> None:
    vocabulary = {"a": 2, "c": 3}
    assert unknown_positions(vocabulary, names) == np.flatnonzero(rows_of(vocabulary, names) == 0).tolist()


@given(st.integers(1, 5), st.data())
def test_numeric_matrix_equals_the_reference(n: int, data: st.DataObject) -> None:
    values = st.none() | st.floats(-1e308, 1e308)
    names = ["first", "second", "third"]
    sent = data.draw(st.dictionaries(st.sampled_from(names), st.lists(values, min_size=n, max_size=n)))
    matrix = numeric_matrix(sent, names, n)
    assert (matrix.shape, matrix.dtype, matrix.flags.c_contiguous) == ((n, 3), np.float32, True)
    for k, name in enumerate(names):
        for row, value in enumerate(sent.get(name, [None] * n)):
            if value is None:
                assert np.isnan(matrix[row, k])
            else:
                assert matrix[row, k] == np.float32(max(-LARGEST_FEATURE, min(LARGEST_FEATURE, value)))


def test_numeric_matrix_without_features_has_no_columns() -> None:
    assert numeric_matrix({}, [], 4).shape == (4, 0)


def test_make_candidates_takes_rows_of_the_item_table() -> None:
    items = np.arange(12, dtype=np.float32).reshape(4, 3)
    numeric = np.zeros((2, 0), np.float32)
    candidates = make_candidates(items, np.array([3, 0]), numeric, 7_000.0)
    np.testing.assert_array_equal(candidates.vectors, items[[3, 0]])
    np.testing.assert_array_equal(candidates.context, request_context(7_000.0)[None])
    assert candidates.numeric is numeric and len(candidates) == 2


def test_field_change_averages_known_values_and_replaces_none() -> None:
    vectors = np.array([[1, 1], [5, 1], [3, 7]], np.float32)  # "none", "x", "y"
    values = {"x": 1, "y": 2}
    column = ["x", None, ["x", "y"], ["x", "unknown"], "unknown", []]
    change, unknown = field_change(column, np.array([0, 1, 2, 3, 5]), values, vectors, 0)
    np.testing.assert_array_equal(change, [[4, 0], [0, 0], [3, 3], [4, 0], [0, 0]])
    assert unknown == 1, "the candidate at position 4 is not described"


def test_field_text_is_split_as_a_cell_of_a_table_is() -> None:
    """Unless the whole text is a value that training has seen, which a list column of Parquet may hold."""
    vectors = np.array([[1, 1], [5, 1], [3, 7], [9, 9]], np.float32)
    values = {"x": 1, "y": 2, "x|z": 3}
    column = ["x|y", ["x|y"], "x|z", "|x||y|", "|", "x|?|y|?", ["z", "z|z"]]
    change, unknown = field_change(column, np.arange(7), values, vectors, 0)
    np.testing.assert_array_equal(change, [[3, 3], [3, 3], [8, 8], [3, 3], [0, 0], [3, 3], [0, 0]])
    assert unknown == 5


def slow_field_change(
    column: list[Any], positions: list[int], values: dict[str, int], vectors: Float32
) -> tuple[list[Float32], int]:
    """One candidate after the other: the mean of the known values, less the row of no value."""
    changes, unknown = [], 0
    for position in positions:
        cell = column[position] if isinstance(column[position], list) else [column[position]]
        parts: list[str] = []
        for text in filter(None, cell):
            parts += [text] if text in values else [p if p in values else p.strip() for p in text.split("|")]
        known = [vectors[values[p]] for p in parts if p in values]
        unknown += sum(bool(p) and p not in values for p in parts)
        changes.append(np.mean(known, axis=0) - vectors[0] if known else np.zeros_like(vectors[0]))
    return changes, unknown


CELL = st.one_of(st.none(), st.sampled_from(["", "x", " x", "y|x", "x|z", "?", "|", "y | ?|"]))


@given(st.lists(st.one_of(CELL, st.lists(CELL, max_size=4)), min_size=1, max_size=8), st.data())
def test_field_change_equals_that_of_each_candidate(column: list[Any], data: st.DataObject) -> None:
    vectors = np.array([[1, 1], [5, 1], [3, 7], [9, 8]], np.float32)
    values = {"x": 1, "y": 2, "x|z": 3}
    positions = data.draw(st.lists(st.integers(0, len(column) - 1), min_size=1, max_size=8))
    changes, unknown = slow_field_change(column, positions, values, vectors)
    found = field_change(column, np.array(positions), values, vectors, 0)
    np.testing.assert_allclose(found[0], changes, rtol=1e-6, atol=1e-6)
    assert found[1] == unknown


def test_equal_unknown_values_are_counted_for_each_candidate() -> None:
    change, unknown = field_change(["?", None, "?"], np.arange(3), {"x": 1}, np.eye(2, dtype=np.float32), 0)
    assert unknown == 2 and not change.any()


def slow_order(timestamps: Sequence[float | None]) -> tuple[list[int], int]:
    """Insert each event behind the last event that is not later. An event without a time follows the event before."""
    times: list[float] = []
    late = 0
    for time in timestamps:
        late += time is not None and any(time < before for before in times)
        times.append(time if time is not None else times[-1] if times else -math.inf)
    known = [time for time in timestamps if time is not None]
    if late and known == sorted(known, reverse=True):
        return list(range(len(times)))[::-1], late
    order: list[int] = []
    for k, time in enumerate(times):
        place = len(order)
        while place and times[order[place - 1]] > time:
            place -= 1
        order.insert(place, k)
    return order, late


@given(st.lists(st.none() | st.integers(0, 9), max_size=20))
def test_time_order_of_random_times_equals_the_reference(timestamps: list[float | None]) -> None:
    order, late = time_order(np.array(timestamps, np.float64))
    expected, expected_late = slow_order(timestamps)
    assert late == expected_late
    assert (list(range(len(timestamps))) if order is None else order.tolist()) == expected
    assert (order is None) == (late == 0)


def test_newest_first_is_reversed_with_its_ties() -> None:
    order, late = time_order(np.array([9.0, 9.0, 5.0, np.nan, 5.0, 1.0]))
    assert order is not None and order.tolist() == [5, 4, 3, 2, 1, 0] and late == 3
