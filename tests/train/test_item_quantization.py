"""int8 item tables: near the float32 ones by half a step, taken a row at a time, and no dearer than their bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from slatewise.inference.item_table import Int8Items, record
from slatewise_train.compression.item_quantization import afm_items, middle_max, min_max, table_formats

TABLES = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 8), st.integers(2, 12)),
    elements=st.floats(-8, 8, width=32, allow_subnormal=False),
)


def taken(records: np.ndarray) -> np.ndarray:
    return Int8Items(records).take(np.arange(len(records)))


@given(TABLES)
def test_each_number_is_within_a_step_of_what_it_was(items: np.ndarray) -> None:
    """Half a step, and what float16 rounds of scale and middle."""
    step = (items.max(axis=1, keepdims=True).astype(np.float64) - items.min(axis=1, keepdims=True)) / 255
    slack = np.abs(items).max(axis=1, keepdims=True) * 2.0**-10 + 128 * step * 2.0**-10 + 1e-4
    for found in (taken(middle_max(items)), min_max(items)):
        assert found.dtype == np.float32 and (np.abs(found - items) <= 0.5 * step + slack).all()


def test_middle_max_is_the_formula_of_the_paper() -> None:
    items = np.float32([[-1.0, 0.25, 3.0, 2.0]])
    records = middle_max(items)
    scale = 4.0 / 255
    middle = (3.0 * 128 + -1.0 * 127) / 255
    assert records["scale"][0] == np.float16(scale) and records["middle"][0] == np.float16(middle)
    assert records["codes"][0, 0] == -128 and records["codes"][0, 2] == 127, "the least and the largest are at the ends"


def test_middle_max_is_nearer_than_min_max_for_rows_like_those_of_a_trained_table() -> None:
    """Both have the same steps; a scale that float16 rounds counts 128 times at most about the middle, 255 times above the least value."""
    items = np.random.default_rng(0).normal(0, 0.1, (500, 64)).astype(np.float32)
    errors = [np.linalg.norm(found - items) for found in (taken(middle_max(items)), min_max(items))]
    assert errors[0] < errors[1]


def test_a_row_of_one_value_comes_back() -> None:
    np.testing.assert_allclose(taken(middle_max(np.full((2, 8), 0.5, np.float32))), 0.5, atol=1e-3)
    np.testing.assert_array_equal(taken(middle_max(np.zeros((2, 8), np.float32))), 0)


def test_rows_are_taken_as_of_a_float32_table(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_no_other_table_of_that_rank_is_nearer(rank: int) -> None:
    rng = np.random.default_rng(1)
    items = (rng.normal(size=(200, 16)) @ rng.normal(size=(16, 16)) + 3).astype(np.float64)
    rows, directions, mean = afm_items(items, rank)
    assert rows.shape == (200, rank) and directions.shape == (rank, 16)
    error = np.linalg.norm(rows @ directions + mean - items)
    for seed in range(5):
        other, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(16, rank)))
        assert error <= np.linalg.norm((items - mean) @ other @ other.T + mean - items) + 1e-9
    assert rank < 16 or error < 1e-9


def test_what_a_table_costs_is_what_it_takes_on_disk() -> None:
    items = np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)
    found = table_formats(items)
    assert found["float32"][0] == 100 * 64 * 4 and found["int8, middle-max"][0] == 100 * record(64).itemsize == 100 * 68
    assert found["AFM, rank 16"][0] == (100 * 16 + 16 * 64 + 64) * 4
