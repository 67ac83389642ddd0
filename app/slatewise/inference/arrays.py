"""The arrays that the model reads and returns, and the numbers of special rows and buckets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNKNOWN_ITEM = 0  # row of an item that the bundle does not know


START_ITEM = 1  # row of the learned start token


FIRST_ITEM = 2  # row of the first real item


UNKNOWN_ACTION = 0


GAP_MISSING = 0  # this event or the one before it has no time


GAP_FIRST = 1  # the first event that is kept


GAP_BUCKETS = 34  # then 2 + floor(log2(gap + 1)), clamped


WINDOW_STEP = 64  # windows start at multiples of this, so that a sliding history still extends


CONTEXT_SIZE = 4


Int64 = NDArray[np.int64]


Float32 = NDArray[np.float32]


Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class HistoryState:
    """An encoded history: what candidates read, and what new events extend. Immutable, shared between requests."""

    keys: tuple[Float32, ...]  # per block (1, K, key width), K = events + 1 for the start token
    values: tuple[Float32, ...]  # per block (1, K, value width)
    user: Float32  # (1, d) the newest event's hidden state; (1, 0) where it is not known, of a `prefix`

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
    rows = np.concatenate(arrays)
    scales = np.maximum(np.abs(rows).max(axis=2, keepdims=True), np.finfo(np.float32).tiny) / np.float32(127)
    return np.rint(rows / scales).astype(np.int8), scales


@dataclass(frozen=True)
class PackedState:
    """The same in about a quarter of the bytes: int8 with a scale for each token, symmetric."""

    keys: Packed
    values: Packed
    user: Float32

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
    """The events a ranker reads, as rows: (L,) each."""

    items: Int64
    actions: Int64
    gaps: Int64

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
        """How many first events two histories share."""
        n = min(len(self), len(other))
        same = (
            (self.items[:n] == other.items[:n])
            & (self.actions[:n] == other.actions[:n])
            & (self.gaps[:n] == other.gaps[:n])
        )
        return n if same.all() else int(same.argmin())


@dataclass(frozen=True)
class Candidates:
    """The candidates of a request, and what joins late: (N, d) vectors, (N, F) numeric features with NaN for missing."""

    vectors: Float32
    numeric: Float32
    context: Float32  # (1, 4)

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True)
class PointScores:
    """Result of the exit `point`, and what the exit `set` goes on from."""

    probabilities: Float64  # (N, heads)
    logits: Float32  # (N, heads)
    hidden: Float32  # (N, d)


def join(chunks: list[PointScores]) -> PointScores:
    """Chunks of one request, end to end."""
    if len(chunks) == 1:
        return chunks[0]
    return PointScores(
        np.concatenate([c.probabilities for c in chunks]),
        np.concatenate([c.logits for c in chunks]),
        np.concatenate([c.hidden for c in chunks]),
    )
