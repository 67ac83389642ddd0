"""Looks for numbers of a bundle that are finite by themselves and overflow in use.

The golden request reads few rows. A row of 3e38 loads, and each request with that item fails. So a bundle is refused
for a number above MOST, and each variant scores the extreme rows once: as events, as candidates, with fields, with the
extreme meta-embeddings and features. Scores must be finite. Products grow with the rows, so the largest ones stand for
all; the smallest ones stand for division by a length of nearly 0.

Called by: `loader.py`. Calls: `ranker.py`, `inference/engine.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from slatewise.bundle.features import LARGEST_FEATURE, numeric_matrix, request_context
from slatewise.bundle.manifest import Column, ManifestError
from slatewise.bundle.ranker import Ranker
from slatewise.inference.arrays import (
    GAP_FIRST,
    GAP_MISSING,
    UNKNOWN_ACTION,
    UNKNOWN_ITEM,
    Candidates,
    History,
    Int64,
)
from slatewise.inference.engine import Engine, EngineError
from slatewise.inference.item_table import ItemTable

MOST = 1e12  # trained numbers are near 1; the square of this one, summed over a row, is far below 3e38
EXTREME = 16  # rows with the largest values, as many with the largest length, and as many with the smallest length
BLOCK = 2**12  # rows that are compared at once, so that a large table needs no second one in memory


def check_numbers(name: str, array: NDArray[Any]) -> None:
    """Raise ManifestError unless every number is finite and at most MOST."""
    most = array.dtype.type(min(MOST, float(np.finfo(array.dtype).max)))
    for first in range(0, len(array), BLOCK):
        rows = array[first : first + BLOCK]
        with np.errstate(invalid="ignore"):
            good = np.abs(rows) <= most  # false for NaN
        if not good.all():
            where = np.argwhere(~good)[0]
            number = rows[tuple(where)]
            place = f"row {first + int(where[0])}" if array.ndim > 1 else f"position {first + int(where[0])}"
            reason = f"above {MOST:g}" if np.isfinite(number) else "not finite"
            raise ManifestError(f"{name}: {place} holds {number:g}, a number that is {reason}")


def check_fields(fields: dict[str, Column]) -> int:
    """Return the number of rows of fields.npy. Raises ManifestError unless each row belongs to exactly one column."""
    end = 0
    for name, column in sorted(fields.items(), key=lambda item: item[1].offset):
        if column.offset != end:
            raise ManifestError(f"field {name} begins at row {column.offset} of fields.npy, expected {end}")
        if len(set(column.values)) != len(column.values):
            raise ManifestError(f"field {name} names a value twice")
        end += len(column.values) + 1
    return end


def extreme_rows(array: ItemTable) -> Int64:
    """Return the rows of an (n, d) table with the largest number, the largest length, or the smallest length."""
    peaks, lengths = [], []
    for first in range(0, len(array), BLOCK):
        rows = array.take(np.arange(first, min(first + BLOCK, len(array))), axis=0).astype(np.float64)
        peaks.append(np.abs(rows).max(axis=1, initial=0.0))
        lengths.append(np.einsum("nd,nd->n", rows, rows))
    peak, length = np.concatenate(peaks or [np.zeros(0)]), np.concatenate(lengths or [np.zeros(0)])
    most = min(EXTREME, len(array))
    found = [np.argsort(-peak)[:most], np.argsort(-length)[:most], np.argsort(length)[:most]]
    return np.unique(np.concatenate(found)).astype(np.int64)


def probe(ranker: Ranker, engine: Engine, rows: Int64) -> None:
    """Score the extreme `rows` of the item table with a variant. Raises ManifestError if a score is not finite."""
    rows = np.concatenate([[UNKNOWN_ITEM], rows])
    names = [None, *ranker.vocabulary.actions]
    actions = np.array([k % len(names) for k in range(len(rows))], np.int64)
    gaps = np.full(len(rows), GAP_MISSING, np.int64)
    gaps[0] = GAP_FIRST
    candidates = probe_candidates(ranker, engine, rows)
    metas = [ranker.default_meta, *ranker.embedded_meta[extreme_rows(ranker.embedded_meta)[-3:]]]
    try:
        for history in (History(rows, actions, gaps), History(rows[:1], np.array([UNKNOWN_ACTION]), gaps[:1])):
            for meta in metas:
                for exit in ranker.manifest.exits:
                    engine.score(history, candidates, meta, exit)
    except EngineError as error:
        raise ManifestError(f"a request with the extreme rows of the tables fails: {error}") from error


def probe_candidates(ranker: Ranker, engine: Engine, rows: Int64) -> Candidates:
    """Return the rows as candidates, then unknown items with the extreme values of each field, and of all fields."""
    vectors = [engine.items.take(rows, axis=0)]
    unknown = engine.items.take(np.array([UNKNOWN_ITEM]), axis=0)
    together = unknown.copy()
    for name, column in ranker.manifest.fields.items():
        none = ranker.field_offsets[name]
        values = ranker.field_vectors[none + 1 : none + 1 + len(column.values)]
        if len(values):
            changes = values[extreme_rows(values)] - ranker.field_vectors[none]
            vectors.append(unknown + changes)
            together = together + changes[np.abs(changes).max(axis=1).argmax()]
    vectors.append(together)
    every = np.concatenate(vectors).astype(np.float32)
    numbers = (None, LARGEST_FEATURE, -LARGEST_FEATURE, 0.0)
    columns = {
        feature: [numbers[(k + shift) % len(numbers)] for k in range(len(every))]
        for shift, feature in enumerate(ranker.manifest.features)
    }
    numeric = numeric_matrix(columns, ranker.manifest.features, len(every))
    return Candidates(every, numeric, request_context(0.0)[None])
