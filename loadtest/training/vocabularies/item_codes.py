"""Quantize an item table to codes of few bits, an eighth of float32's bytes together.

The exit `dot` and its order depend on products u . e with the vectors u of users. An error x of an item changes them by
x' C x on average, with C the mean of u u'. So items are written in coordinates in which this error is a plain sum of
squares and which are not correlated: the principal components of C^(1/2) (e - mean). This is transform coding
(Goyal, IEEE Signal Processing Magazine 2001) with the metric of atomic feature mimicking, applied to the users. Each
coordinate has as many bits as lower the error most, within the bytes of an item.

Candidates and events also pass through the blocks, which read other directions. So C is mixed with a share of the
identity.

It misses the bar of the study (models/LOG.md), so neither `compress` nor the server has it.

Called by: `forms.py`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from slatewise.inference.arrays import Float32, Int64

MOST_BITS = 8  # of a code
SHARE = 1 / 8  # of float32's bytes, the whole file
HEADER = 512  # bytes of an .npy file, at most
LEAST_BITS = 2  # a number, on average: a table of few items is larger than the share
IDENTITY = 0.1  # share of the identity in the metric
SAMPLE = 2**14  # rows that the ranges of the codes are fitted to, at most
CLIPS = np.linspace(0.3, 1.0, 15)  # shares of the range that codes may cover
BLOCK = 2**14  # rows that are packed at once


def coded_record(rows: int, width: int, size: int) -> np.dtype[Any]:
    """Return the dtype of a whole table of codes, with `size` bytes an item. It is one record.

    An item is mean + z basis, with z = low + step * code for each coordinate. The codes of an item have `bits` bits
    each, 0 to 8, and follow one another; the first bit of a byte is its highest.
    """
    columns: list[tuple[str, DTypeLike, tuple[int, ...]]] = [
        ("mean", "<f4", (width,)),
        ("basis", "<f2", (width, width)),
        ("low", "<f4", (width,)),
        ("step", "<f4", (width,)),
        ("bits", "u1", (width,)),
        ("codes", "u1", (rows, size)),
    ]
    return np.dtype(columns)


class CodedItems:
    """A (rows, d) table of codes, with the same part of an array's interface as `Int8Items`.

    record: () of `coded_record`, whose codes are not copied. Raises ValueError for bits that the codes do not hold.
    """

    def __init__(self, record: NDArray[Any]) -> None:
        self.codes = record["codes"]  # (rows, size)
        bits = record["bits"].astype(np.int64)
        ends = bits.cumsum()
        size = self.codes.shape[1]
        if bits.max() > MOST_BITS or ends[-1] > 8 * size:
            raise ValueError(f"codes of {bits.tolist()} bits in {size} bytes")
        self.shape = (len(self.codes), len(bits))
        basis = record["basis"].astype(np.float32)
        self.steps: Float32 = record["step"][:, None] * basis
        self.base: Float32 = record["mean"] + record["low"] @ basis
        starts = ends - bits
        self.first = np.minimum(starts // 8, size - 1)  # the byte in which a code begins; it ends in this or the next
        self.second = np.minimum(self.first + 1, size - 1)
        self.shift = (16 - starts % 8 - bits).astype(np.uint16)
        self.mask = ((1 << bits) - 1).astype(np.uint16)

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: Int64, axis: Literal[0] = 0) -> Float32:
        """Return the (*rows.shape, d) float32 vectors of the rows."""
        packed = self.codes.take(rows, axis=axis)
        both = packed[..., self.first].astype(np.uint16) << 8 | packed[..., self.second]
        numbers = (both >> self.shift & self.mask).astype(np.float32)
        result: Float32 = numbers @ self.steps
        result += self.base
        return result


class Steps(NamedTuple):
    """Uniform codes of one coordinate."""

    error: float  # sum of squares
    low: float  # the value of code 0
    step: float


def bytes_of_item(rows: int, width: int) -> int:
    """Return the bytes of an item's codes, so that the file has at most `SHARE` of the bytes of float32 rows."""
    overhead = HEADER + coded_record(0, width, 1).itemsize
    return max(int((SHARE * 4 * rows * width - overhead) // rows), -(-LEAST_BITS * width // 8))


def metric_roots(users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return C^(1/2) and C^(-1/2), (d, d) each, for user vectors (n, d), n may be 0."""
    width = users.shape[1]
    second = users.T.astype(np.float64) @ users
    scale = np.trace(second) / width
    mixed = second / (scale or 1.0) + IDENTITY * np.eye(width)
    values, directions = np.linalg.eigh(mixed)
    roots = np.sqrt(values)
    return (directions * roots) @ directions.T, (directions / roots) @ directions.T


def coded(values: np.ndarray, low: float, step: float, bits: int) -> np.ndarray:
    """Return the codes (n,) of values (n,), of which the nearest is taken."""
    return np.clip(np.rint((values - low) / step), 0, 2**bits - 1)


def fit_steps(values: np.ndarray) -> list[Steps]:
    """Return the codes of 0 to MOST_BITS bits with the least error on values (n,), of mean 0."""
    found = [Steps(float((values**2).sum()), 0.0, 0.0)]
    largest = max(float(np.abs(values).max(initial=0.0)), 1e-6)
    for bits in range(1, MOST_BITS + 1):
        tried = []
        for clip in CLIPS * largest:
            step = float(np.float32(2 * clip / 2**bits))
            low = float(np.float32(step / 2 - clip))
            error = ((coded(values, low, step, bits) * step + low - values) ** 2).sum()
            tried.append(Steps(float(error), low, step))
        found.append(min(tried))
    return found


def allot(steps: list[list[Steps]], total: int) -> np.ndarray:
    """Return the bits of each coordinate: one after the other to the coordinate whose error it lowers most."""
    bits = np.zeros(len(steps), np.int64)
    for _ in range(min(total, MOST_BITS * len(steps))):
        gains = [
            -1.0 if have == MOST_BITS else one[have].error - one[have + 1].error
            for one, have in zip(steps, bits.tolist(), strict=True)
        ]
        bits[int(np.argmax(gains))] += 1
    return bits


def code_items(items: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Quantize items (rows, d) float32 to one record () of `coded_record`.

    users: (n, d) vectors of users, for the metric. Raises ValueError when a number is too large for float16.
    """
    if not np.abs(items).max(initial=0.0) < np.finfo(np.float16).max:
        raise ValueError("codes are not possible: an item's numbers are beyond float16")
    rows, width = items.shape
    size = bytes_of_item(rows, width)
    record = np.zeros((), coded_record(rows, width, size))
    root, inverse = metric_roots(users)
    mean = items.mean(axis=0, dtype=np.float64)
    chosen = np.sort(np.random.default_rng(0).permutation(rows)[:SAMPLE])
    sample = (items[chosen] - mean) @ root
    directions = np.linalg.eigh(sample.T @ sample)[1][:, ::-1]
    record["mean"] = mean
    record["basis"] = directions.T @ inverse
    forward = np.linalg.inv(record["basis"].astype(np.float64))  # of the basis as it is stored
    steps = [fit_steps(column) for column in ((items[chosen] - mean) @ forward).T]
    bits = allot(steps, 8 * size)
    record["bits"] = bits
    record["low"] = [one[count].low for one, count in zip(steps, bits, strict=True)]
    record["step"] = [one[count].step for one, count in zip(steps, bits, strict=True)]
    for first in range(0, rows, BLOCK):
        some = slice(first, first + BLOCK)
        record["codes"][some] = pack((items[some] - mean) @ forward, record, size)
    return record


def pack(values: np.ndarray, record: np.ndarray, size: int) -> np.ndarray:
    """Return the packed codes (n, size) uint8 of coordinates (n, d)."""
    columns = []
    for column, low, step, bits in zip(values.T, record["low"], record["step"], record["bits"], strict=True):
        if bits:
            codes = coded(column, low, step, int(bits)).astype(np.uint8)
            columns.append(np.unpackbits(codes[:, None], axis=1)[:, MOST_BITS - bits :])
    packed = np.packbits(np.concatenate(columns, axis=1), axis=1)
    return np.pad(packed, ((0, 0), (0, size - packed.shape[1])))
