"""Cut sequences into windows, and put windows into batches.

Called by: `train.py`, `epochs.py`, `slates.py`, `shown.py`, `evaluation/cases.py`, `meta/`, `compression/`,
`demo/simulated/`. Calls: `data.py`.

Letters in shapes: B windows, T the longest window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slatewise.bundle.features import gap_buckets, request_context, window_start
from slatewise.inference.arrays import GAP_FIRST, START_ITEM
from slatewise_train.data import Sequences, request_times

Window = tuple[int, int, int]  # user, first event, one past the last event
Windows = np.ndarray | Sequence[Window]  # (B, 3) int64


def served_window_start(length: int, longest: int) -> int:
    """Return the first of a user's `length` events that a request would read.

    It equals `slatewise.bundle.features.window_start` for a history from event 0.
    """
    return window_start(0, length, longest)


def newest_window_start(length: int, longest: int) -> int:
    """Return the first of the newest `longest` events out of `length`.

    Meta-learning reads this window and a request reads `served_window_start`, so the two differ for users with more
    than `longest` events. The windows stay apart because stored meta-embeddings and published numbers depend on them.
    """
    return max(0, length - longest)


@dataclass(frozen=True)
class Batch:
    """A batch of windows, padded on the right. Column 0 is the start token."""

    users: Tensor  # (B,) int64
    firsts: Tensor  # (B,) int64, events of the user before the window
    lengths: Tensor  # (B,) int64, events without the start token
    items: Tensor  # (B, T + 1) int64
    actions: Tensor  # (B, T + 1) int64
    gaps: Tensor  # (B, T + 1) int64
    labels: Tensor  # (B, T + 1, heads) float32, NaN if unknown or padding
    contexts: Tensor  # (B, T + 1, 4) float32, for a request right after this event
    since: Tensor  # (B,) int64, positions before it are read, and no loss is taken at them; 0: all positions count

    def take(self, rows: Tensor) -> Batch:
        return Batch(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))


def make_batch(sequences: Sequences, windows: Windows) -> Batch:
    """Build a batch from windows, at least one: (B, 3), as rows of an array or as a list of tuples.

    A fourth column has the user's first event that is learned from, see `incremental/windows.py`.
    """
    user, first, last, *learned = np.asarray(windows, np.int64).T
    since = np.maximum(learned[0] - first, 0) if learned else np.zeros_like(first)
    lengths = last - first
    starts = sequences.offsets[user] + first
    before = np.cumsum(lengths) - lengths  # events of the windows above
    rows = np.arange(lengths.sum()) + np.repeat(
        starts - before, lengths
    )  # (events,) of the sequences, window by window
    times = sequences.timestamps[rows]
    gaps = gap_buckets(times)
    gaps[before[lengths > 0]] = GAP_FIRST
    longest = int(lengths.max())
    real = np.zeros((len(lengths), longest + 1), bool)
    real[:, 1:] = np.arange(longest) < lengths[:, None]

    def padded(values: np.ndarray, padding: float) -> np.ndarray:
        column = np.full((*real.shape, *values.shape[1:]), padding, values.dtype)
        column[real] = values
        return column

    items = padded(sequences.items[rows], 0)
    items[:, 0] = START_ITEM
    contexts = padded(request_context(request_times(times)).T, 0)
    contexts[:, 0] = contexts[:, min(1, longest)]
    columns = padded(sequences.actions[rows], 0), padded(gaps, 0), padded(sequences.labels[rows], np.nan)
    return Batch(*map(torch.from_numpy, (user.copy(), first.copy(), lengths, items, *columns, contexts, since)))


def packed(sizes: np.ndarray, batch_events: int) -> list[int]:
    """Return the edges of batches of successive windows, from 0 to their number.

    sizes: (n,) positions of the windows. A batch has at most `batch_events` positions, padding included, or one window.
    """
    edges = [0]
    while edges[-1] < len(sizes):
        begin = edges[-1]
        most = batch_events // int(sizes[begin]) + 1  # one window more than the batch can have
        widths = np.maximum.accumulate(sizes[begin : begin + most])
        fitting = int(np.count_nonzero(widths * np.arange(1, len(widths) + 1) <= batch_events))
        edges.append(begin + max(1, fitting))
    return edges


def epoch_windows(
    train_lengths: np.ndarray, longest: int, batch_events: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Split the training events of all users into windows of at most `longest` events, and yield batches of windows.

    train_lengths: (U,) events of each user. A user with more events than a window gets several windows with random
    starts. A batch is an array (B, 3) of windows. It has at most `batch_events` events, padding included, or a single
    window.
    """
    user = np.repeat(np.arange(len(train_lengths)), -(-train_lengths // longest))
    length = train_lengths[user]
    first = np.zeros(len(user), np.int64)
    first[length > longest] = rng.integers(0, length[length > longest] - longest + 1)
    windows = np.stack([user, first, np.minimum(first + longest, length)], axis=1)
    lengths = windows[:, 2] - first
    order = np.argsort(lengths * rng.uniform(0.9, 1.1, len(windows)))
    windows = windows[order]
    edges = packed(lengths[order] + 1, batch_events)  # with the start token
    for k in rng.permutation(len(edges) - 1):
        yield windows[edges[k] : edges[k + 1]]
