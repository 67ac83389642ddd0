"""The item table of a variant: float32 rows, or int8 rows that are dequantized when they are read.

`slatewise compress` writes the int8 table as an .npy file.
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


ItemTable = Float32 | Int8Items


def read_item_table(path: Path) -> ItemTable:
    """Read the item table of an .npy file into memory: float32 rows or int8 records, by the dtype of the file."""
    rows = np.load(path, allow_pickle=False)
    return Int8Items(rows) if rows.dtype.names else rows
