"""A loaded ranker: manifest, tables and engines. Converts requests to arrays.

Called by: `loader.py`, which builds it, `ranking/`, `store/`, and the package slatewise_train. Calls: `features.py`,
`adapted_items.py`, `titles.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np

from slatewise.bundle.adapted_items import AdaptedItems
from slatewise.bundle.features import (
    field_change,
    make_candidates,
    make_history,
    numeric_matrix,
    rows_of,
    time_order,
    window_start,
)
from slatewise.bundle.manifest import Manifest
from slatewise.bundle.titles import Titles
from slatewise.inference.arrays import UNKNOWN_ACTION, UNKNOWN_ITEM, Candidates, Float32, Float64, History, Int64
from slatewise.inference.engine import Engine
from slatewise.inference.item_table import ItemTable
from slatewise.schemas import RankRequest

T = TypeVar("T")


@dataclass(frozen=True)
class Vocabulary:
    """Maps the strings of requests to rows of tables."""

    items: dict[str, int]
    actions: dict[str, int]
    fields: dict[str, dict[str, int]]  # column -> value -> row of `field_vectors`; row 0 of a column is "none"


@dataclass(frozen=True)
class Unknown:
    """The parts of a request's candidates that the ranker does not know."""

    positions: Int64  # (P,) of the candidates whose id is unknown
    field_values: dict[str, int]  # column -> number of unknown values that describe these candidates, if above 0
    adapted: Int64  # (A,) those of the positions that have a vector of their own, adapted to the item's first events


class ReadHistory(NamedTuple):
    """The events of a request that the model reads, and what the request got wrong."""

    events: History  # oldest first
    reordered: int  # number of events, of all that were sent, behind a later one
    unknown_actions: int  # number of events read whose action the ranker does not know; a null action does not count


@dataclass(frozen=True)
class Ranker:
    """One version of a ranker, ready to serve. Shapes: d is the width of item vectors, M of meta-embeddings."""

    manifest: Manifest
    vocabulary: Vocabulary
    items: ItemTable  # (rows, d); row 0 is the unknown item; float32 if a served variant reads float32
    field_vectors: Float32  # (rows of all columns, d)
    field_offsets: dict[str, int]  # column -> its row "none"
    default_meta: Float32  # (M,)
    embedded_meta: Float32  # (users, M), vectors of the embedded store
    embedded_users: dict[str, int]
    engines: dict[str, Engine]  # by variant
    refused: dict[str, str]  # variant -> reason
    report: dict[str, Any]
    warmup: list[RankRequest]
    titles: Titles
    examples: list[dict[str, Any]]  # requests of demo users; the first is the manifest's example
    digest: str = ""  # SHA-256 of the manifest, which has those of all files: what was loaded

    @property
    def name(self) -> str:
        return self.manifest.ranker

    @property
    def identity(self) -> tuple[str, int, str]:
        """Return (name, version, digest). Two rankers with the same identity give the same scores."""
        return self.name, self.manifest.version, self.digest

    @cached_property
    def default_variant(self) -> str:
        """The manifest's default variant; if it is not served, the fastest one, within the quality gate if possible."""
        rows = self.manifest.variants
        return min(
            self.engines,
            key=lambda name: (
                name != self.manifest.default_variant,
                rows[name].within_gate is False,
                rows[name].milliseconds,
            ),
        )

    @property
    def explores(self) -> bool:
        """Whether requests may have `explore`: every variant that is served has a posterior."""
        return all(engine.posterior is not None for engine in self.engines.values())

    def window_start(self, request: RankRequest) -> int:
        """Return the number of the oldest events sent, which the model skips."""
        sent = request.history
        return window_start(sent.offset, len(sent.item_ids), self.manifest.limits.history_used)

    def history(self, request: RankRequest) -> History:
        """Return the events that the model reads, oldest first."""
        return self.read_history(request).events

    def read_history(self, request: RankRequest) -> ReadHistory:
        sent = request.history
        first = self.window_start(request)
        times = (
            np.full(len(sent.item_ids), np.nan) if sent.timestamps is None else np.array(sent.timestamps, np.float64)
        )
        order, late = time_order(times)
        items = rows_of(self.vocabulary.items, events_read(sent.item_ids, first, order))
        unknown = 0
        if sent.actions is None:
            actions = np.full(len(items), UNKNOWN_ACTION, np.int64)
        else:
            names = events_read(sent.actions, first, order)
            actions = rows_of(self.vocabulary.actions, names)
            if unknown := int(np.count_nonzero(actions == UNKNOWN_ACTION)):
                unknown -= names.count(None)
        events = make_history(items, actions, times[first:] if order is None else times[order[first:]])
        return ReadHistory(events, late, unknown)

    def candidates(
        self,
        request: RankRequest,
        request_time: float,
        items: ItemTable | None = None,
        adapted: AdaptedItems | None = None,
    ) -> tuple[Candidates, Unknown]:
        """Return the candidates, and the unknown parts of them.

        items: a variant's table; default: the ranker's. adapted: the vectors of items that are newer than the ranker.
        An unknown candidate without one has the vector of its fields.
        """
        sent = request.candidates
        rows = rows_of(self.vocabulary.items, sent.item_ids)
        numeric = numeric_matrix(sent.features, self.manifest.features, len(rows))
        result = make_candidates(self.items if items is None else items, rows, numeric, request_time)
        positions = np.flatnonzero(rows == UNKNOWN_ITEM)
        found = np.zeros(0, np.int64) if adapted is None else adapted.find([sent.item_ids[k] for k in positions])
        unknown = Unknown(positions, {}, positions[found >= 0])
        if len(positions):
            for name, column in sent.fields.items():
                change, count = field_change(
                    column,
                    unknown.positions,
                    self.vocabulary.fields[name],
                    self.field_vectors,
                    self.field_offsets[name],
                    self.manifest.fields[name].text,
                )
                result.vectors[unknown.positions] += change
                if count:
                    unknown.field_values[name] = count
        if adapted is not None and len(unknown.adapted):
            result.vectors[unknown.adapted] = adapted.vectors[found[found >= 0]]
        return result, unknown

    def score_weights(self, head_weights: dict[str, float] | None) -> Float64:
        """Return the (heads,) weights: the given ones (0 for heads without one), or with `None` the manifest's."""
        names = self.manifest.heads
        return np.array([names[h] if head_weights is None else head_weights.get(h, 0.0) for h in names])

    def embedded_meta_of(self, user: str | None) -> Float32:
        """Return the (M,) vector of a user in the embedded store, or the default vector."""
        row = self.embedded_users.get(user or "")
        return self.default_meta if row is None else self.embedded_meta[row]


def weight_shares(weights: Float64) -> Float64:
    """Return the (heads,) weights over the sum of their absolute values: differences of scores are linear in them."""
    total = sum(map(abs, weights.tolist()))
    # of a single head: exactly 1, so its probabilities are the scores, without rounding
    return weights / total if total else weights


def weighted_mean(probabilities: Float64, weights: Float64) -> Float64:
    """Return the (N,) scores in [0, 1]: the mean of the heads' probabilities, weighted.

    probabilities: (N, heads). weights: (heads,), of any sign and sum.

    A negative weight counts its head's complement, 1 - p, so the score falls as p rises: the order is that of the
    weighted sum. If all weights are 0, all scores are 0.
    """
    shares = weight_shares(weights)
    scores: Float64 = probabilities @ shares
    if weights.min() < 0:
        scores = np.maximum(scores - shares[shares < 0].sum(), 0.0)
    return np.minimum(scores, 1.0)  # 1.0000000000000002, after rounding, is no probability


def events_read(column: list[T], first: int, order: Int64 | None) -> list[T]:
    """Return a column of the events from `first` on, in the given order; `None`: the order sent."""
    return column[first:] if order is None else list(map(column.__getitem__, order[first:].tolist()))
