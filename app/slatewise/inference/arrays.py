"""Types of the arrays that a model reads and returns, and the numbers of special rows and buckets.

Dtypes: row and bucket numbers are int64, vectors, states and logits float32, probabilities float64.
Shapes: L events of a history, N candidates, K = events encoded + 1 for the start token, d the width of an item vector,
F numeric candidate features, M the width of a meta-embedding.
Rows of the item table: 0 the unknown item, 1 the learned start token, the bundle's items from 2 on. Row 0 of the action
table is the unknown action.

    History        (L,) item rows, action rows and gap buckets: the events that a ranker reads
    Candidates     (N, d) item vectors, (N, F) numeric features, (1, 4) request context
    HistoryState   the encoded history: per block the keys and values of K tokens, and the (1, d) user vector
    PackedState    a HistoryState in int8, for the history cache
    PointScores    probabilities, logits and hidden states of the exit `point`, which the exit `set` reads

All are immutable, so that requests and threads can share them.
Called by: `bundle/`, `ranking/`, `store/`, this folder, and the package slatewise_train. Calls: numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNKNOWN_ITEM = 0  # row of an item that the bundle does not know
START_ITEM = 1  # row of the learned start token
FIRST_ITEM = 2  # row of the bundle's first item
UNKNOWN_ACTION = 0
GAP_MISSING = 0  # this event or the one before it has no time
GAP_FIRST = 1  # the first event that is read
GAP_BUCKETS = 34  # from 2 on: 2 + floor(log2(gap + 1)), clamped; gaps in seconds
WINDOW_STEP = 64  # windows start at multiples of this, so that a sliding history still extends
CONTEXT_SIZE = 4

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class HistoryState:
    """An encoded history. Candidates attend to it, and new events extend it."""

    keys: tuple[Float32, ...]  # per block (1, K, key width)
    values: tuple[Float32, ...]  # per block (1, K, value width)
    user: Float32  # (1, d) hidden state of the newest event; (1, 0) if not known, after `Engine.prefix`

    @property
    def events(self) -> int:
        return int(self.keys[0].shape[1]) - 1

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.keys, *self.values, self.user))

    def unpacked(self) -> HistoryState:
        return self

    def packed(self) -> PackedState:
        return PackedState(pack(self.keys), pack(self.values), self.user)


Packed = tuple[NDArray[np.int8], Float32]  # codes (blocks, K, width), scales (blocks, K, 1)


def pack(arrays: tuple[Float32, ...]) -> Packed:
    """Quantize to symmetric int8 with one scale per token. The error is at most half a scale."""
    rows = np.concatenate(arrays)
    scales = np.maximum(np.abs(rows).max(axis=2, keepdims=True), np.finfo(np.float32).tiny) / np.float32(127)
    return np.rint(rows / scales).astype(np.int8), scales


@dataclass(frozen=True)
class PackedState:
    """A `HistoryState` in about a quarter of the bytes."""

    keys: Packed
    values: Packed
    user: Float32  # (1, d), not packed

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.keys, *self.values, self.user))

    def unpacked(self) -> HistoryState:
        keys, values = (np.multiply(codes, scales, dtype=np.float32) for codes, scales in (self.keys, self.values))
        return HistoryState(tuple(keys[:, None]), tuple(values[:, None]), self.user)

    def packed(self) -> PackedState:
        return self


KeptState = HistoryState | PackedState


@dataclass(frozen=True)
class History:
    """The events that a ranker reads, oldest first; each array is (L,)."""

    items: Int64  # rows of the item table
    actions: Int64  # rows of the action table
    gaps: Int64  # buckets of the time since the event before

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, rows: slice) -> History:
        return History(self.items[rows], self.actions[rows], self.gaps[rows])

    @property
    def nbytes(self) -> int:
        return self.items.nbytes + self.actions.nbytes + self.gaps.nbytes

    def equals(self, other: History) -> bool:
        return len(self) == len(other) == self.common_prefix(other)

    def common_prefix(self, other: History) -> int:
        """Return the length of the longest common prefix, in events."""
        n = min(len(self), len(other))
        same = (
            (self.items[:n] == other.items[:n])
            & (self.actions[:n] == other.actions[:n])
            & (self.gaps[:n] == other.gaps[:n])
        )
        return n if same.all() else int(same.argmin())


@dataclass(frozen=True)
class Candidates:
    """The candidates of a request, and the context of the request."""

    vectors: Float32  # (N, d) rows of the item table
    numeric: Float32  # (N, F); NaN: missing
    context: Float32  # (1, 4) see `features.request_context`

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: Int64 | slice) -> Candidates:
        return Candidates(self.vectors[rows], self.numeric[rows], self.context)


@dataclass(frozen=True)
class PointScores:
    """The result of the exit `point`, and the input of the exit `set`."""

    probabilities: Float64  # (N, heads)
    logits: Float32  # (N, heads)
    hidden: Float32  # (N, d)

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: Int64) -> PointScores:
        return PointScores(self.probabilities[rows], self.logits[rows], self.hidden[rows])


def join(chunks: list[PointScores]) -> PointScores:
    """Concatenate the chunks of one request's candidates."""
    if len(chunks) == 1:
        return chunks[0]
    return PointScores(
        np.concatenate([c.probabilities for c in chunks]),
        np.concatenate([c.logits for c in chunks]),
        np.concatenate([c.hidden for c in chunks]),
    )


def best_rows(scores: Float64, count: int) -> Int64:
    """Return the positions of the `count` highest of (N,) scores, ascending. Of equal scores the first are taken.

    count: 1 to N.
    """
    floor = np.partition(scores, len(scores) - count)[len(scores) - count]
    chosen = scores > floor
    equal = np.flatnonzero(scores == floor)
    chosen[equal[: count - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)
