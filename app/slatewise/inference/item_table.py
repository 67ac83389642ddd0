"""The item table of a variant: float32 rows, or rows of int8 or of codes, which become float32 when they are read.

`slatewise compress` writes the table of int8 or of codes as one .npy file.
Called by: `bundle/`, `engine.py`, and the package slatewise_train. Calls: numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from slatewise.inference.arrays import Float32, Int64

MOST_BITS = 8  # of a code


def record(width: int) -> np.dtype[Any]:
    """Return the dtype of an int8 item: x = middle + scale * code (middle-max of LiRank, arXiv 2402.06859)."""
    columns: list[tuple[str, DTypeLike] | tuple[str, DTypeLike, tuple[int]]] = [
        ("scale", "<f2"),
        ("middle", "<f2"),
        ("codes", "i1", (width,)),
    ]
    return np.dtype(columns)


class Int8Items:
    """A (rows, d) int8 table with a part of the interface of a float32 array: `shape`, `len` and `take`."""

    def __init__(self, records: NDArray[Any]) -> None:
        self.records = records  # (rows,) of `record(d)`
        self.shape = (len(records), records.dtype["codes"].shape[0])

    def __len__(self) -> int:
        return len(self.records)

    def take(self, rows: Int64, axis: Literal[0] = 0) -> Float32:
        """Return the (*rows.shape, d) float32 vectors of the rows."""
        taken = self.records.take(rows, axis=axis)
        scale, middle = (taken[name].astype(np.float32)[..., None] for name in ("scale", "middle"))
        result: Float32 = np.multiply(taken["codes"], scale, dtype=np.float32)
        result += middle
        return result


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


ItemTable = Float32 | Int8Items | CodedItems


def read_item_table(path: Path) -> ItemTable:
    """Read the item table of an .npy file into memory: float32, int8 or codes, by the dtype of the file."""
    rows = np.load(path, allow_pickle=False)
    if not rows.dtype.names:
        return rows
    return CodedItems(rows) if "codes" in rows.dtype.names and rows.shape == () else Int8Items(rows)
