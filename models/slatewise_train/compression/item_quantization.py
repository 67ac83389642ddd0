"""Quantize an item table to int8.

Each item is stored as int8 codes, with one scale and one middle value for the item (middle-max quantization of LiRank,
arXiv 2402.06859).

Called by: `compress.py`, which writes items8.npy. The server reads this file with `inference/item_table.py`.
"""

from __future__ import annotations

import numpy as np

from slatewise.inference.item_table import record


def middle_max(items: np.ndarray) -> np.ndarray:
    """Quantize items (rows, d) float32 to (rows,) records of `record(d)`.

    Codes are computed from scale and middle as stored, in float16. Raises ValueError when a number is too large for
    float16.
    """
    records = np.zeros(len(items), record(items.shape[1]))
    least = items.min(axis=1).astype(np.float64)
    largest = items.max(axis=1).astype(np.float64)
    if not np.abs(items).max(initial=0.0) < np.finfo(np.float16).max / 2:
        raise ValueError("tables8 is not possible: an item's numbers are beyond float16")
    records["middle"] = (128 * largest + 127 * least) / 255
    records["scale"] = np.maximum((largest - least) / 255, np.finfo(np.float16).smallest_subnormal)
    scale, middle = (records[name].astype(np.float64)[:, None] for name in ("scale", "middle"))
    records["codes"] = np.clip(np.rint((items - middle) / scale), -128, 127)
    return records
