"""Forms of a trained item table in fewer bytes, without training.

Called by: `study.py`. Calls: `compression/` of slatewise_train.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from slatewise.inference.item_table import Int8Items, PackedItems
from slatewise_train.compression.item_codes import code_items
from slatewise_train.compression.item_quantization import middle_max

CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6)  # shares of a row's range that codes of few bits may cover
HALF = 2  # bytes of float16
CODES = 256  # of a piece or a stage: one byte
ROUNDS = 25  # of k-means


class Form(NamedTuple):
    name: str
    bytes: int
    table: np.ndarray  # (rows, d) float32, as the form gives it


def few_bits(items: np.ndarray, bits: int) -> Form:
    """Codes of few bits with a scale and a middle a row, in float16; the range with the least error of `CLIPS`."""
    least, largest = items.min(axis=1, keepdims=True), items.max(axis=1, keepdims=True)
    middle = ((least + largest) / 2).astype(np.float16).astype(np.float32)
    most = 2**bits - 1
    best = items
    least_error = np.full((len(items), 1), np.inf)
    for clip in CLIPS:
        scale = np.maximum(clip * (largest - least) / most, 1e-6).astype(np.float16).astype(np.float32)
        codes = np.clip(np.rint((items - middle) / scale + most / 2), 0, most)
        table = (codes - most / 2) * scale + middle
        error = ((table - items) ** 2).sum(axis=1, keepdims=True)
        best = np.where(error < least_error, table, best)
        least_error = np.minimum(error, least_error)
    return Form(f"{bits} bits, a scale a row", len(items) * (-(-items.shape[1] * bits // 8) + 2 * HALF), best)


def low_rank(items: np.ndarray, size: int) -> Form:
    """Principal components in float16, as many as `size` bytes hold."""
    mean = items.mean(axis=0)
    left, values, right = np.linalg.svd(items - mean, full_matrices=False)
    rank = (size // HALF - items.shape[1]) // (len(items) + items.shape[1])
    table = (left[:, :rank] * values[:rank]) @ right[:rank] + mean
    return Form(f"low rank {rank}, float16", HALF * (rank * sum(items.shape) + items.shape[1]), table)


def semantic_ids(items: np.ndarray, size: int) -> Form:
    """Residual quantization: an item is the sum of one of 256 vectors of each stage, as many as `size` bytes hold."""
    stages = size // (len(items) + CODES * items.shape[1] * HALF)
    rng = np.random.default_rng(0)
    rest = items.copy()
    for _ in range(stages):
        centres = fit_centres(rest, rng).astype(np.float16).astype(np.float32)
        rest -= centres[nearest(rest, centres)]
    return Form(f"semantic ids of {stages} codes", stages * (len(items) + CODES * items.shape[1] * HALF), items - rest)


def pieces(items: np.ndarray, length: int) -> Form:
    """Product quantization: each piece of a few numbers is one of 256 vectors."""
    rng = np.random.default_rng(0)
    table = np.zeros_like(items)
    size = 0
    for first in range(0, items.shape[1], length):
        piece = items[:, first : first + length]
        centres = fit_centres(piece, rng).astype(np.float16).astype(np.float32)
        table[:, first : first + length] = centres[nearest(piece, centres)]
        size += len(items) + CODES * piece.shape[1] * HALF
    return Form(f"product quantization, pieces of {length}", size, table)


def nearest(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the number of the nearest centre of each row: (n,). rows: (n, w), centres: (CODES, w)."""
    found: np.ndarray = (rows @ centres.T - 0.5 * (centres**2).sum(axis=1)).argmax(axis=1)
    return found


def fit_centres(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return CODES centres of the rows (n, w) by k-means: (CODES, w). A centre without rows becomes a random row."""
    centres = rows[rng.choice(len(rows), CODES, replace=len(rows) < CODES)].copy()
    for _ in range(ROUNDS):
        codes = nearest(rows, centres)
        counts = np.bincount(codes, minlength=CODES)
        for column in range(rows.shape[1]):
            centres[:, column] = np.bincount(codes, rows[:, column], CODES) / np.maximum(counts, 1)
        empty = np.flatnonzero(counts == 0)
        centres[empty] = rows[rng.integers(0, len(rows), len(empty))]
    return centres


def transform_codes(items: np.ndarray, users: np.ndarray, name: str) -> Form:
    packed = code_items(items, users)
    return Form(name, packed.nbytes, PackedItems(packed).take(np.arange(len(items))))


def forms(items: np.ndarray, users: np.ndarray) -> Iterator[Form]:
    """Yield the table (rows, d) float32 itself, then its forms. users: (n, d) vectors that the exit `dot` reads."""
    eighth = items.nbytes // 8
    yield Form("float32", items.nbytes, items)
    records = middle_max(items)
    yield Form("int8, a scale a row", records.nbytes, Int8Items(records).take(np.arange(len(items))))
    yield transform_codes(items, users, "transform codes")
    yield transform_codes(items, np.zeros_like(users), "transform codes without the users' metric")
    yield few_bits(items, 4)
    yield few_bits(items, 3)
    for length in (2, 3, 4):
        yield pieces(items, length)
    yield semantic_ids(items, eighth)
    yield low_rank(items, eighth)
