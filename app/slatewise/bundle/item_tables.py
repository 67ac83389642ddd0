"""Reads the item tables of a bundle, and checks that their numbers can be used.

A ranker keeps the tables that its served variants read, each once. Float32 rows that no variant reads are not kept.

Called by: `loader.py`. Calls: `files.py`, `probe.py`, `inference/item_table.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from slatewise.bundle.files import Files, array_of
from slatewise.bundle.manifest import ManifestError
from slatewise.bundle.probe import check_numbers
from slatewise.inference.item_table import Int8Items, ItemTable, PackedItems, packed_record, record

FLOAT32 = "items.npy"
INT8 = "items8.npy"
PACKED = "items4.npy"
OF_VARIANTS = (INT8, PACKED)  # that a bundle has only for the variants that name them


def shared_table(tables: set[str]) -> str:
    """Return the table that a ranker itself reads, of those of its variants: float32 rows if a variant reads them."""
    return FLOAT32 if FLOAT32 in tables else min(tables, default=FLOAT32)


def load_items(files: Files, name: str, shape: tuple[int, ...]) -> ItemTable:
    """Load an item table, without a copy of its rows. Raises ManifestError for another shape or a bad number."""
    place = f"{files.folder}: {name}"
    content = files.read(name)
    try:
        array = array_of(content)
    except (ValueError, EOFError) as error:
        raise ManifestError(f"{place}: {error}") from error
    if name == INT8:
        return int8_items(place, array, shape)
    if name == PACKED:
        return packed_items(place, array, shape)
    check_array(place, array, shape)
    return array


def check_array(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raise ManifestError unless the array is float32, has this shape, and its numbers are finite and not huge."""
    if array.dtype != np.float32 or array.shape != shape:
        raise ManifestError(f"{name} is {array.dtype} {array.shape}, expected float32 {shape}")
    check_numbers(name, array)


def int8_items(name: str, records: NDArray[Any], shape: tuple[int, ...]) -> Int8Items:
    if records.dtype != record(shape[1]) or records.shape != shape[:1]:
        raise ManifestError(
            f"{name} is {records.dtype} {records.shape}, expected {shape[0]} records of {record(shape[1])}"
        )
    for column in ("scale", "middle"):
        check_numbers(f"{name}: {column}", records[column])
    return Int8Items(records)


def packed_items(name: str, found: NDArray[Any], shape: tuple[int, ...]) -> PackedItems:
    names = found.dtype.names or ()
    size = found["codes"].shape[-1] if "codes" in names else 1
    expected = packed_record(shape[0], shape[1], size)
    if found.dtype != expected or found.shape != ():
        raise ManifestError(f"{name} is {found.dtype} {found.shape}, expected one record of {expected}")
    for column in ("base", "steps"):
        check_numbers(f"{name}: {column}", found[column])
    try:
        return PackedItems(found)
    except ValueError as error:
        raise ManifestError(f"{name}: {error}") from error
