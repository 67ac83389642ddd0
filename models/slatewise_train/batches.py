"""Cut sequences into windows, put windows into batches, and draw slates of candidates at positions of a batch.

Called by: `train.py`, `epochs.py`, `evaluation/offline.py`, `meta/`, `compression/`. Calls: `data.py`, and the ranker
that scores a slate.

Letters in shapes: B windows, T the longest window, S positions of a window, C candidates, K negatives, d width.
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
from slatewise.inference.arrays import CONTEXT_SIZE, FIRST_ITEM, START_ITEM, UNKNOWN_ITEM
from slatewise_train.config import TrainConfig
from slatewise_train.data import Sequences
from slatewise_train.rankers.base import EncodedHistory, RankerModel

Window = tuple[int, int, int]  # user, first event, one past the last event
MISSING_NUMERIC = 0.3  # share of training slates without numeric features


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
        contexts[row, 1 : n + 1] = request_context(times).T
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


@torch.no_grad()
def draw_negatives(users: Tensor, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw negatives with replacement: half of them uniformly, half in proportion to the softmax of the exit `dot`.

    users: (B, S, d) user vectors; vectors: (n, d) of the items to draw from. Returns rows of vectors (B, S, count) and
    the log of the expected number of draws of each (B, S, count), for `losses.sampling_offset`.
    """
    share = torch.softmax(users @ vectors.T, dim=-1)
    share = 0.5 * share + 0.5 / share.shape[-1]
    drawn = torch.multinomial(share.flatten(0, 1), count, replacement=True).view(*share.shape[:2], count)
    return drawn, torch.log(count * share.gather(2, drawn))


@dataclass(frozen=True)
class Slates:
    """Candidates at S positions of each of B sequences: the items of the next events (the slate), then K negatives."""

    read: Tensor  # (B, S) int64, number of events that have happened
    candidates: Tensor  # (B, S, C) int64, item rows; C = slate + K
    numeric: Tensor  # (B, S, C, F) float32, NaN is missing
    context: Tensor  # (B, S, 4) float32
    exists: Tensor  # (B, S, slate) bool, False for events after the end of the sequence
    labels: Tensor  # (B, S, slate, heads) float32, NaN if unknown
    log_rate: Tensor  # (B, S, K) float32, of `draw_negatives`


def draw_slates(
    batch: Batch, users: Tensor, table: Tensor, numeric: Tensor, slate_size: int, config: TrainConfig
) -> Slates:
    """Choose random positions of the windows, and build a slate at each.

    A slate has the items of the next `slate_size` events and drawn negatives.

    users: (B, T + 1, d) user vectors; table: (items, d); numeric: (items, F).
    """
    b = len(batch.users)
    s = config.cascade_positions
    rows = torch.arange(b)[:, None]
    read = (torch.rand(b, s) * batch.lengths[:, None]).long()
    drawn, log_rate = draw_negatives(users[rows, read], table[FIRST_ITEM:], config.cascade_negatives)
    ahead = read[..., None] + 1 + torch.arange(slate_size)  # (B, S, slate) columns of the next events
    exists = ahead <= batch.lengths[:, None, None]
    ahead = ahead.clamp(max=batch.items.shape[1] - 1)
    upcoming = batch.items[rows[..., None], ahead].masked_fill(~exists, UNKNOWN_ITEM)
    labels = batch.labels[rows[..., None], ahead].masked_fill(~exists[..., None], torch.nan)
    candidates = torch.cat([upcoming, drawn + FIRST_ITEM], dim=2)
    features = numeric[candidates].masked_fill(torch.rand(b, s, 1, 1) < MISSING_NUMERIC, torch.nan)
    return Slates(read, candidates, features, batch.contexts[rows, read], exists, labels, log_rate)


def read_slates(
    model: RankerModel, slates: Slates, history: EncodedHistory, users: Tensor, vectors: Tensor, meta: Tensor
) -> tuple[Tensor, Tensor]:
    """Return logits of the exit `dot` (B * S, C, heads) and hidden states (B * S, C, d) of the candidates.

    history and users (B, T + 1, d): the encoded sequences; vectors: (B, S, C, d) of the candidates; meta: (B, S, M).
    A candidate attends to the `slates.read` first events of its sequence.
    """
    b, s, c = slates.candidates.shape
    fused = model.fuse(slates.numeric, meta[:, :, None], slates.context[:, :, None])
    positions = (slates.read + 1).repeat_interleave(c, dim=1)  # (B, S * C)
    mask = torch.arange(users.shape[1]) <= slates.read.repeat_interleave(c, dim=1)[..., None]  # (B, S * C, T + 1)
    hidden = model.hidden(vectors.flatten(1, 2), history, positions, mask[:, None], fused.flatten(1, 2))
    now = users[torch.arange(b)[:, None], slates.read].view(b * s, 1, -1)
    return model.dot_logits(now, vectors.view(b * s, c, -1)), hidden.view(b * s, c, -1)
