"""The item table of a variant: float32 rows, or codes that are decoded when they are read.

- `Int8Items`: a byte a number, with a scale and a middle of each item.
- `PackedItems`: about four bits a number, with coordinates that all items share.

`slatewise compress` writes the codes as .npy files.
Called by: `bundle/`, `engine.py`, and the package slatewise_train. Calls: numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from slatewise.inference.arrays import Float32, Int64


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


MOST_BITS = 8  # of a packed code
ALONE = 2**18  # multiplications of a matrix product up to which OpenBLAS uses the calling thread alone


def packed_record(rows: int, width: int, size: int) -> np.dtype[Any]:
    """Return the dtype of a whole table of packed codes, which is one record.

    An item is base + codes @ steps. It has `size` bytes, in which its codes follow one another. Code k has `bits[k]`
    bits, 0 to MOST_BITS, and the first bit of a byte is its highest.
    """
    columns: list[tuple[str, DTypeLike, tuple[int, ...]]] = [
        ("base", "<f4", (width,)),
        ("steps", "<f2", (width, width)),
        ("bits", "u1", (width,)),
        ("codes", "u1", (rows, size)),
    ]
    return np.dtype(columns)


class PackedItems:
    """A (rows, d) table of packed codes with the same part of an array's interface as `Int8Items`."""

    def __init__(self, record: NDArray[Any]) -> None:
        """record: () of `packed_record`, whose codes are not copied. Raises ValueError if they do not hold the bits."""
        self.codes = record["codes"]  # (rows, size)
        bits = record["bits"].astype(np.int64)
        ends = bits.cumsum()
        size = self.codes.shape[1]
        if not size or bits.max() > MOST_BITS or ends[-1] > 8 * size:
            raise ValueError(f"codes of {bits.tolist()} bits in {size} bytes")
        self.shape = (len(self.codes), len(bits))
        self.base: Float32 = record["base"]
        self.steps: Float32 = record["steps"].astype(np.float32)
        starts = ends - bits
        self.first = np.minimum(starts // 8, size - 1)  # the byte in which a code begins; it ends in this or the next
        self.second = np.minimum(self.first + 1, size - 1)
        self.shift = (16 - starts % 8 - bits).astype(np.uint16)
        self.mask = ((1 << bits) - 1).astype(np.uint16)

    def __len__(self) -> int:
        return len(self.codes)

    def unpack(self, rows: Int64) -> Float32:
        """Return the (*rows.shape, d) codes of the rows."""
        packed = self.codes.take(rows, axis=0)
        both = packed.take(self.first, axis=-1).astype(np.uint16) << 8
        both |= packed.take(self.second, axis=-1)
        both >>= self.shift
        both &= self.mask
        codes: Float32 = both.astype(np.float32)
        return codes

    def take(self, rows: Int64, axis: Literal[0] = 0) -> Float32:
        """Return the (*rows.shape, d) float32 vectors of the rows."""
        codes = self.unpack(rows.ravel())
        result = np.empty_like(codes)
        block = max(1, ALONE // self.steps.size)
        for first in range(0, len(codes), block):
            part = slice(first, first + block)
            np.matmul(codes[part], self.steps, out=result[part])
        result += self.base
        return result.reshape(*rows.shape, len(self.base))


ItemTable = Float32 | Int8Items | PackedItems


def read_item_table(path: Path) -> ItemTable:
    """Read the item table of an .npy file into memory, in the form that the dtype of the file names."""
    found: NDArray[Any] = np.load(path, allow_pickle=False)
    if not found.dtype.names:
        return found
    return Int8Items(found) if "scale" in found.dtype.names else PackedItems(found)
