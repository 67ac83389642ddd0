"""int8 item tables: their error is at most half a step, and rows are taken as from a float32 table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from slatewise.inference.item_table import Int8Items, read_item_table
from slatewise_train.compression.item_quantization import middle_max

TABLES = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 8), st.integers(2, 12)),
    elements=st.floats(-8, 8, width=32, allow_subnormal=False),
)


def taken(records: np.ndarray) -> np.ndarray:
    return Int8Items(records).take(np.arange(len(records)))


@given(TABLES)
def test_middle_max_error_is_at_most_half_a_step(items: np.ndarray) -> None:
    """Half a step, and the rounding of scale and middle to float16."""
    step = (items.max(axis=1, keepdims=True).astype(np.float64) - items.min(axis=1, keepdims=True)) / 255
    slack = np.abs(items).max(axis=1, keepdims=True) * 2.0**-10 + 128 * step * 2.0**-10 + 1e-4
    found = taken(middle_max(items))
    assert found.dtype == np.float32 and (np.abs(found - items) <= 0.5 * step + slack).all()


def test_middle_max_follows_the_formula_of_the_paper() -> None:
    items = np.float32([[-1.0, 0.25, 3.0, 2.0]])
    records = middle_max(items)
    scale = 4.0 / 255
    middle = (3.0 * 128 + -1.0 * 127) / 255
    assert records["scale"][0] == np.float16(scale) and records["middle"][0] == np.float16(middle)
    assert records["codes"][0, 0] == -128 and records["codes"][0, 2] == 127, "the extremes have the outermost codes"


def test_middle_max_of_constant_row_returns_its_value() -> None:
    np.testing.assert_allclose(taken(middle_max(np.full((2, 8), 0.5, np.float32))), 0.5, atol=1e-3)
    np.testing.assert_array_equal(taken(middle_max(np.zeros((2, 8), np.float32))), 0)


def test_take_of_int8_items_returns_float32_rows(tmp_path: Path) -> None:
    items = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
    np.save(tmp_path / "items8.npy", middle_max(items))
    table = Int8Items(np.load(tmp_path / "items8.npy", mmap_mode="r", allow_pickle=False))
    assert (
        len(table) == 50
        and table.shape == items.shape
        and (tmp_path / "items8.npy").stat().st_size < 0.4 * items.nbytes
    )
    for rows in ([3], [4, 4, 0], [], [[1, 2], [3, 4]]):
        index = np.array(rows, np.int64)
        found = table.take(index, axis=0)
        assert found.shape == items.take(index, axis=0).shape and found.dtype == np.float32 and found.flags.writeable
        np.testing.assert_allclose(found, items.take(index, axis=0), atol=0.02)


def test_middle_max_of_numbers_beyond_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond float16"):
        middle_max(np.full((1, 4), 4e4, np.float32))


def test_read_item_table_recognises_float32_and_int8(tmp_path: Path) -> None:
    items = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    np.save(tmp_path / "items.npy", items)
    np.save(tmp_path / "items8.npy", middle_max(items))
    np.testing.assert_array_equal(read_item_table(tmp_path / "items.npy"), items)
    assert isinstance(read_item_table(tmp_path / "items8.npy"), Int8Items)
