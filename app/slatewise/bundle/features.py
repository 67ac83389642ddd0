"""Converts the ids and numbers of a request to arrays. Training and evaluation call the same functions.

The functions take plain columns: lists of a request, or arrays of a table. The steps for a history:

    time_order -> window_start -> rows_of (items, actions) -> gap_buckets -> History

Called by: `ranker.py`, `ranking/pipeline.py`, and the package slatewise_train. Calls: `inference/arrays.py` for the
array types and the special rows.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np

from slatewise.inference.arrays import (
    GAP_BUCKETS,
    GAP_FIRST,
    GAP_MISSING,
    WINDOW_STEP,
    Candidates,
    Float32,
    Float64,
    History,
    Int64,
)
from slatewise.inference.item_table import ItemTable

GAP_EDGES = np.append(2.0 ** np.arange(1, GAP_BUCKETS - 2) - 1, np.inf)  # seconds at which buckets 3, 4, ... begin
GAP_OF_EDGES = np.append(np.arange(2, GAP_BUCKETS), GAP_MISSING)  # by number of edges passed; NaN sorts behind infinity
LARGEST_FEATURE = 3e38  # just below the maximum of float32
VALUE_SEPARATOR = "|"  # between the values of one categorical cell, in tables as in requests
WORD = re.compile(r"\w+")


def rows_of(vocabulary: dict[str, int], names: Sequence[Any]) -> Int64:
    """Return the (n,) rows of the names: 0, the unknown row, for a name that is not in the vocabulary. Loops in C."""
    return np.fromiter(map(vocabulary.get, names, repeat(0)), np.int64, len(names))


def unknown_positions(vocabulary: dict[str, int], names: Sequence[str]) -> list[int]:
    """Return the positions of names that are not in the vocabulary, without an array: for requests without scores."""
    return [position for position, name in enumerate(names) if name not in vocabulary]


def window_start(offset: int, length: int, longest: int) -> int:
    """Return the index, among the `length` events sent, of the first event to read. At most `longest` events are read.

    `offset` is the index of the first event sent in the user's whole history. The window starts at a multiple of 64 in
    the whole history. So its start depends on the request alone. If a client sends a sliding window of 126 events or
    more, the start stays the same for 64 requests, and the cached state of the history can be extended. If a multiple
    of 64 would leave less than half of the readable events, multiples of 32, 16, and so on are tried.
    """
    first = max(0, length - longest)
    step = WINDOW_STEP
    while True:
        aligned = -(-(offset + first) // step) * step - offset
        if 2 * (length - aligned) >= length - first or step == 1:
            return aligned
        step //= 2


def time_order(timestamps: Float64) -> tuple[Int64 | None, int]:
    """Return the order in which events are read, and the number of events that were sent behind a later one.

    timestamps: (L,) float64 unix seconds as sent; NaN if missing. The order is `None` for events that are oldest first
    already. A list that is newest first throughout is reversed, so that events of equal times are reversed too. Any
    other list is sorted as training sorts its events: events of equal times stay in the order sent. An event without a
    time stays behind the event before it.
    """
    late = timestamps < np.fmax.accumulate(timestamps)  # a comparison with NaN is false
    count = int(np.count_nonzero(late))
    if not count:
        return None, 0
    missing = np.isnan(timestamps)
    known = timestamps[~missing]
    if (known[1:] <= known[:-1]).all():
        return np.arange(len(timestamps))[::-1], count
    before = np.maximum.accumulate(np.where(missing, -1, np.arange(len(timestamps))))
    times = np.where(before < 0, -np.inf, timestamps[before])
    return times.argsort(kind="stable"), count


def gap_buckets(timestamps: Float64) -> Int64:
    """Return the (L,) int64 buckets of the seconds since the previous event: 2 + floor(log2(gap + 1)), clamped.

    timestamps: (L,) float64 unix seconds of the events that are *read*, oldest first; NaN if missing. The first event
    has bucket 1, and a gap with a missing time has bucket 0. A negative gap counts as 0.
    """
    buckets = np.empty(len(timestamps), np.int64)
    buckets[:1] = GAP_FIRST
    buckets[1:] = GAP_OF_EDGES[GAP_EDGES.searchsorted(timestamps[1:] - timestamps[:-1], "right")]
    return buckets


def make_history(items: Int64, actions: Int64, timestamps: Float64) -> History:
    """Build a history from item rows, action rows and unix seconds (NaN if missing), (L,) each, oldest first."""
    return History(items, actions, gap_buckets(timestamps))


def request_context(request_time: float | Float64) -> Float32:
    """Return (4,) float32: time of day and time of week (UTC) as points on two circles; (4, n) for n times."""
    day = 2 * np.pi * (request_time / 86_400.0)
    week = 2 * np.pi * (request_time / 604_800.0)
    return np.array([np.sin(day), np.cos(day), np.sin(week), np.cos(week)], dtype=np.float32)


def numeric_matrix(columns: dict[str, list[float | None]], names: Sequence[str], n: int) -> Float32:
    """Return the (n, len(names)) float32 features in the order of `names`; NaN for a missing value or column."""
    missing = [None] * n
    matrix = np.array([columns.get(name, missing) for name in names], np.float64).reshape(-1, n)
    return np.clip(matrix, -LARGEST_FEATURE, LARGEST_FEATURE).T.astype(np.float32, order="C")


def make_candidates(items: ItemTable, rows: Int64, numeric: Float32, request_time: float) -> Candidates:
    """Build candidates from their rows in an item table, numeric features (N, F), and the time of the request."""
    return Candidates(items.take(rows, axis=0), numeric, request_context(request_time)[None])


def field_change(
    column: Sequence[Any],
    positions: Int64,
    values: dict[str, int],
    vectors: Float32,
    none_row: int,
    text: bool = False,
) -> tuple[Float32, int]:
    """Return the (P, d) vectors to add to the unknown row for one metadata column of the candidates at `positions`.

    For every column, the unknown row already contains row `none_row` of `vectors`, which stands for "no value". So the
    vector to add is the mean of the vectors of the candidate's known values, as in training, minus row `none_row`, or 0
    without known values. Equal values are computed once. The second result is the number of unknown values.

    column: for each candidate a value, a list of values or `None`. values: value -> row of `vectors`, from 1 on. text:
    the values of a cell are its words, and unknown words are not counted: every text has some.
    """
    numbers: dict[Any, int] = {}
    given = [tuple(v) if isinstance(v, list) else (v,) for v in map(column.__getitem__, positions.tolist())]
    if text:
        given = list(map(words_of, given))
    number_of = np.array([numbers.setdefault(v, len(numbers)) for v in given], np.int64)
    cells: list[Sequence[str | None]] = list(numbers)
    flat = list(chain.from_iterable(cells))
    texts = list(filter(None, flat))
    if VALUE_SEPARATOR in "".join(texts) or texts != list(map(str.strip, texts)):
        cells = [split_values(cell, values) for cell in cells]
        flat = list(chain.from_iterable(cells))
    cell_of = np.repeat(np.arange(len(cells)), list(map(len, cells)))  # (F,) the cell of each single value
    rows = rows_of(values, flat)
    known = rows > 0
    given_values = np.fromiter(map(bool, flat), bool, len(flat))
    unknown = np.bincount(cell_of[given_values & ~known], minlength=len(cells))
    means = np.zeros((len(cells), vectors.shape[1]), np.float32)
    described, starts, counts = np.unique(cell_of[known], return_index=True, return_counts=True)
    if len(described):
        sums = np.add.reduceat(vectors[rows[known]], starts, axis=0)
        means[described] = sums / counts[:, None].astype(np.float32) - vectors[none_row]
    change: Float32 = means[number_of]
    return change, 0 if text else int(unknown[number_of].sum())


def words_of(cell: Sequence[str | None]) -> tuple[str, ...]:
    """Return the distinct words of the texts of one candidate, in order: the values of a text column."""
    return tuple(dict.fromkeys(WORD.findall(" ".join(filter(None, cell)).casefold())))


def split_values(given: Sequence[str | None], known: Container[str]) -> list[str]:
    """Return the single values of one candidate. A text such as `Drama | Comedy` is split, unless it is a known value.

    White space around a value is removed, as in a table of items.
    """
    result: list[str] = []
    for value in filter(None, given):
        if value in known:
            result.append(value)
        else:
            parts = value.split(VALUE_SEPARATOR)
            result += filter(None, (part if part in known else part.strip() for part in parts))
    return result
