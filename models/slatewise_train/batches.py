"""Cut sequences into windows, and put windows into batches.

Called by: `train.py`, `epochs.py`, `slates.py`, `evaluation/cases.py`, `meta/`, `compression/`. Calls: `data.py`.

Letters in shapes: B windows, T the longest window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slatewise.bundle.features import request_context, window_start
from slatewise.inference.arrays import CONTEXT_SIZE, START_ITEM
from slatewise_train.data import Sequences, request_times

Window = tuple[int, int, int]  # user, first event, one past the last event


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
    lengths: Tensor  # (B,) int64, events without the start token
    items: Tensor  # (B, T + 1) int64
    actions: Tensor  # (B, T + 1) int64
    gaps: Tensor  # (B, T + 1) int64
    labels: Tensor  # (B, T + 1, heads) float32, NaN if unknown or padding
    contexts: Tensor  # (B, T + 1, 4) float32, for a request right after this event

    def take(self, rows: Tensor) -> Batch:
        return Batch(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))


def make_batch(sequences: Sequences, windows: list[Window]) -> Batch:
    """Build a batch from windows, at least one."""
    longest = max(last - first for _, first, last in windows)
    shape = (len(windows), longest + 1)
    items = np.zeros(shape, np.int64)
    actions = np.zeros(shape, np.int64)
    gaps = np.zeros(shape, np.int64)
    labels = np.full((*shape, sequences.labels.shape[1]), np.nan, np.float32)
    contexts = np.zeros((*shape, CONTEXT_SIZE), np.float32)
    items[:, 0] = START_ITEM
    for row, (user, first, last) in enumerate(windows):
        n = last - first
        window = slice(1, n + 1)
        items[row, window], actions[row, window], gaps[row, window], labels[row, window] = sequences.of(
            user, first, last
        )
        times = sequences.timestamps[sequences.offsets[user] + first : sequences.offsets[user] + last]
        contexts[row, 1 : n + 1] = request_context(request_times(times)).T
        contexts[row, 0] = contexts[row, min(1, n)]
    lengths = np.array([last - first for _, first, last in windows], np.int64)
    users = np.array([user for user, _, _ in windows], np.int64)
    return Batch(*map(torch.from_numpy, (users, lengths, items, actions, gaps, labels, contexts)))


def epoch_windows(
    train_lengths: np.ndarray, longest: int, batch_events: int, rng: np.random.Generator
) -> Iterator[list[Window]]:
    """Split the training events of all users into windows of at most `longest` events, and yield batches of windows.

    train_lengths: (U,) events of each user. A user with more events than a window gets several windows with random
    starts. A batch has at most `batch_events` events, padding included, or a single window.
    """
    windows = []
    for user in np.flatnonzero(train_lengths > 0):
        n = int(train_lengths[user])
        pieces = math.ceil(n / longest)
        for _ in range(pieces):
            first = int(rng.integers(0, n - longest + 1)) if n > longest else 0
            windows.append((int(user), first, min(first + longest, n)))
    lengths = np.array([last - first for _, first, last in windows]) * rng.uniform(0.9, 1.1, len(windows))
    batches: list[list[Window]] = [[]]
    width = 0
    for k in np.argsort(lengths):
        size = windows[k][2] - windows[k][1] + 1
        width = max(width, size)
        if width * (len(batches[-1]) + 1) > batch_events and batches[-1]:
            batches.append([])
            width = size
        batches[-1].append(windows[k])
    batches = [batch for batch in batches if batch]
    for k in rng.permutation(len(batches)):
        yield batches[k]
