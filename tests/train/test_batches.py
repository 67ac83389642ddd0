"""Windows and batches against slow versions with a loop for each user and each window."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slatewise.bundle.features import request_context
from slatewise.inference.arrays import CONTEXT_SIZE, START_ITEM
from slatewise_train.batches import Batch, Window, epoch_windows, make_batch
from slatewise_train.data import Sequences, request_times


def slow_batch(sequences: Sequences, windows: list[Window]) -> Batch:
    longest = max(last - first for _, first, last in windows)
    shape = (len(windows), longest + 1)
    items = np.zeros(shape, np.int64)
    actions = np.zeros(shape, np.int64)
    gaps = np.zeros(shape, np.int64)
    labels = np.full((*shape, sequences.labels.shape[1]), np.nan, np.float32)
    contexts = np.zeros((*shape, CONTEXT_SIZE), np.float32)
    items[:, 0] = START_ITEM
    starts = [sequences.offsets[user] for user, _, _ in windows]
    spans = zip(starts, windows, strict=True)
    times = np.concatenate([sequences.timestamps[start + first : start + last] for start, (_, first, last) in spans])
    times = request_times(times)  # missing times of a batch get times of their own
    for row, (user, first, last) in enumerate(windows):
        n = last - first
        window = slice(1, n + 1)
        items[row, window], actions[row, window], gaps[row, window], labels[row, window] = sequences.of(
            user, first, last
        )
        contexts[row, 1 : n + 1] = request_context(times[:n]).T
        times = times[n:]
        contexts[row, 0] = contexts[row, min(1, n)]
    lengths = np.array([last - first for _, first, last in windows], np.int64)
    users = np.array([user for user, _, _ in windows], np.int64)
    firsts = np.array([first for _, first, _ in windows], np.int64)
    since = np.zeros_like(lengths)
    return Batch(*map(torch.from_numpy, (users, firsts, lengths, items, actions, gaps, labels, contexts, since)))


def slow_windows(
    train_lengths: np.ndarray, longest: int, batch_events: int, rng: np.random.Generator
) -> list[list[Window]]:
    windows = []
    for user in np.flatnonzero(train_lengths > 0):
        n = int(train_lengths[user])
        for _ in range(math.ceil(n / longest)):
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
    return [batches[k] for k in rng.permutation(len(batches))]


def make_sequences(lengths: list[int], seed: int) -> Sequences:
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    times = rng.uniform(0, 2e9, n).round()
    times[rng.uniform(size=n) < 0.2] = np.nan
    labels = rng.choice([0.0, 1.0, np.nan], (n, 2)).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items, actions = rng.integers(0, 50, (2, n))
    return Sequences([str(k) for k in range(len(lengths))], offsets, items, actions, times, labels)


@given(data=st.data(), lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_batch_equals_the_slow_batch_bit_for_bit(data: st.DataObject, lengths: list[int], seed: int) -> None:
    sequences = make_sequences(lengths, seed)
    windows = []
    for _ in range(data.draw(st.integers(1, 6))):
        user = data.draw(st.integers(0, len(lengths) - 1))
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, lengths[user])] * 2)))
        windows.append((user, first, last))
    expected = slow_batch(sequences, windows)
    for found in (make_batch(sequences, windows), make_batch(sequences, np.array(windows))):
        for name, value in vars(expected).items():
            column = getattr(found, name)
            assert column.dtype == value.dtype and column.shape == value.shape, name
            assert column.numpy().tobytes() == value.numpy().tobytes(), name


@given(
    lengths=st.lists(st.integers(0, 3000), max_size=40),
    longest=st.integers(1, 300),
    batch_events=st.integers(1, 2000),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_windows_equal_the_slow_windows_with_the_same_draws(
    lengths: list[int], longest: int, batch_events: int, seed: int
) -> None:
    one, other = np.random.default_rng(seed), np.random.default_rng(seed)
    train_lengths = np.array(lengths, np.int64)
    expected = slow_windows(train_lengths, longest, batch_events, one)
    found = list(epoch_windows(train_lengths, longest, batch_events, other))
    assert [[tuple(window) for window in batch.tolist()] for batch in found] == expected
    assert one.bit_generator.state == other.bit_generator.state


def test_windows_of_many_users_take_little_time() -> None:
    """A million users, as many windows: about a second, and no Python object for each of them."""
    lengths = np.full(1_000_000, 5)
    batches = list(epoch_windows(lengths, 64, 8192, np.random.default_rng(0)))
    assert sum(len(batch) for batch in batches) == 1_000_000
    assert max(len(batch) for batch in batches) == 8192 // 6
