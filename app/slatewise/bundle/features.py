"""Strings and numbers of a request become arrays here, and only here. Training calls the same functions.

Before: `schemas.py` (lists from the wire) or `models/slatewise_train/data.py` (columns of a table). After: `pipeline.py`, or a batch.
"""

import numpy as np

from slatewise.inference.arrays import GAP_BUCKETS, GAP_FIRST, GAP_MISSING, WINDOW_STEP, Float32, Float64, Int64

GAP_EDGES = np.append(
    2.0 ** np.arange(1, GAP_BUCKETS - 2) - 1, np.inf
)  # seconds from which the buckets 3, 4, ... begin
GAP_OF_EDGES = np.append(
    np.arange(2, GAP_BUCKETS), GAP_MISSING
)  # by how many edges are passed; NaN sorts behind infinity


def gap_buckets(timestamps: Float64) -> Int64:
    """Seconds since the event before, as bucket ids: 2 + floor(log2(gap + 1)), clamped.

    timestamps: (L,) float64 unix seconds, NaN where missing, of the *kept* events, oldest first. Returns (L,) int64.
    The gap is clamped at 0, so a clock that went backwards is a gap of nothing.
    """
    buckets = np.empty(len(timestamps), np.int64)
    buckets[:1] = GAP_FIRST
    buckets[1:] = GAP_OF_EDGES[GAP_EDGES.searchsorted(timestamps[1:] - timestamps[:-1], "right")]
    return buckets


def window_start(offset: int, length: int, longest: int) -> int:
    """Index, within the events sent, of the first one to read.

    The window starts at the smallest multiple of 64, counted over the user's whole history (`offset` is the index of
    the first event sent), from which at most `longest` events remain: a function of the request alone, and the same
    for the next 63 requests of a client that sends a sliding window of 126 events or more. Where that would leave less
    than half of what could be read (a shorter window), multiples of 32 are tried, of 16, and so on.
    """
    first = max(0, length - longest)
    step = WINDOW_STEP
    while True:
        aligned = -(-(offset + first) // step) * step - offset
        if 2 * (length - aligned) >= length - first or step == 1:
            return aligned
        step //= 2


def request_context(request_time: float | Float64) -> Float32:
    """(4,) float32: hour of the day and day of the week (UTC) as points on two circles; (4, n) for n times."""
    day = 2 * np.pi * (request_time / 86_400.0)
    week = 2 * np.pi * (request_time / 604_800.0)
    return np.array([np.sin(day), np.cos(day), np.sin(week), np.cos(week)], dtype=np.float32)
