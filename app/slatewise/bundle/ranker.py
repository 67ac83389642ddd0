"""A ranker in memory, and the arrays of a request for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any

import numpy as np

from slatewise.bundle.features import gap_buckets, request_context, window_start
from slatewise.bundle.manifest import Manifest
from slatewise.inference.arrays import (
    UNKNOWN_ACTION,
    UNKNOWN_ITEM,
    Candidates,
    Float32,
    Float64,
    History,
    Int64,
)
from slatewise.inference.engine import Engine
from slatewise.inference.item_table import ItemTable
from slatewise.schemas import RankRequest

LARGEST = 3e38  # of a numeric feature: float32 has no more


@dataclass(frozen=True)
class Vocabulary:
    """Strings to rows."""

    items: dict[str, int]
    actions: dict[str, int]
    fields: dict[str, dict[str, int]]  # column -> value -> row of `field_vectors`; "none" has the column's first row


@dataclass(frozen=True)
class Ranker:
    manifest: Manifest
    vocabulary: Vocabulary
    items: Float32  # (rows, d), row 0 the unknown item
    field_vectors: Float32
    field_offsets: dict[str, int]
    default_meta: Float32  # (M,)
    embedded_meta: Float32  # (U, M), the embedded store's vectors
    embedded_users: dict[str, int]
    engines: dict[str, Engine]
    refused: dict[str, str]  # variant -> reason
    report: dict[str, Any]
    warmup: list[RankRequest]

    @property
    def name(self) -> str:
        return self.manifest.ranker

    @cached_property
    def default_variant(self) -> str:
        """The manifest's, or where that one is not served the fastest that is, within the gate if any is."""
        rows = self.manifest.variants
        return min(
            self.engines,
            key=lambda name: (
                name != self.manifest.default_variant,
                rows[name].within_gate is False,
                rows[name].milliseconds,
            ),
        )

    def history(self, request: RankRequest) -> tuple[History, int]:
        """The events to read, as rows, and how many of the oldest are passed over."""
        sent = request.history
        first = window_start(sent.offset, len(sent.item_ids), self.manifest.limits.history_used)
        items = rows_of(self.vocabulary.items, sent.item_ids[first:])
        actions = (
            np.full(len(items), UNKNOWN_ACTION, np.int64)
            if sent.actions is None
            else rows_of(self.vocabulary.actions, sent.actions[first:])
        )
        times = (
            np.full(len(items), np.nan) if sent.timestamps is None else np.array(sent.timestamps[first:], np.float64)
        )
        return History(items, actions, gap_buckets(times)), first

    def candidates(
        self, request: RankRequest, request_time: float, items: ItemTable | None = None
    ) -> tuple[Candidates, Int64]:
        """The candidates as arrays, and the positions of those the bundle does not know; `items` is a variant's table, else float32."""
        sent = request.candidates
        n = len(request.candidates.item_ids)
        rows = rows_of(self.vocabulary.items, sent.item_ids)
        vectors = (self.items if items is None else items).take(rows, axis=0)
        unknown = np.flatnonzero(rows == UNKNOWN_ITEM)
        if sent.fields and len(unknown):
            vectors[unknown] += self.field_change(sent.fields, unknown)
        missing = [None] * n
        columns = np.array([sent.features.get(name, missing) for name in self.manifest.features], np.float64).reshape(
            -1, n
        )
        numeric = np.clip(columns, -LARGEST, LARGEST).T.astype(np.float32, order="C")
        return Candidates(vectors, numeric, request_context(request_time)[None]), unknown

    def field_change(self, fields: dict[str, Any], positions: Int64) -> Float32:
        """(P, d): what the fields of unknown items add to the unknown row, which itself holds "none" in every column.

        The mean over the known values of a column, as in training; worked out once for equal values.
        """
        change = np.zeros((len(positions), self.items.shape[1]), np.float32)
        for name, column in fields.items():
            values = self.vocabulary.fields[name]
            none = self.field_vectors[self.field_offsets[name]]
            numbers: dict[Any, int] = {}
            given = [tuple(v) if isinstance(v, list) else (v,) for v in map(column.__getitem__, positions.tolist())]
            of = [numbers.setdefault(v, len(numbers)) for v in given]
            rows = [[values[v] for v in distinct if v in values] for distinct in numbers]
            means = np.stack([self.field_vectors[r].mean(axis=0) - none if r else np.zeros_like(none) for r in rows])
            change += means[of]
        return change

    def score_weights(self, head_weights: dict[str, float] | None) -> Float64:
        """(heads,) weights of the score: the request's, 0 where it names none, else the manifest's."""
        names = self.manifest.heads
        return np.array([names[h] if head_weights is None else head_weights.get(h, 0.0) for h in names])

    def embedded_meta_of(self, user: str | None) -> Float32:
        row = self.embedded_users.get(user or "")
        return self.default_meta if row is None else self.embedded_meta[row]


def rows_of(vocabulary: dict[str, int], names: list[Any]) -> Int64:
    """(n,) rows of names, 0 (unknown) for those that the vocabulary lacks: one loop, in C."""
    return np.fromiter(map(vocabulary.get, names, repeat(0)), np.int64, len(names))
