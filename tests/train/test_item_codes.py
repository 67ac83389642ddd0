"""Item tables of packed codes: their size, their error, their training, and rows that are those of a slow decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slatewise.inference.item_table import PackedItems, packed_record, read_item_table
from slatewise_train.compression.item_codes import (
    LEAST_BITS,
    SHARE,
    LearnedCodes,
    allot,
    code_items,
    fit_steps,
    pack,
)


def drawn(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Return items (rows, width) whose columns have different sizes."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(3.0, 0.1, width)
    return (rng.normal(size=(rows, width)) * sizes + rng.normal(size=width)).astype(np.float32)


def slow_row(record: np.ndarray, row: int) -> list[float]:
    """Decode a row bit by bit."""
    text = "".join(f"{byte:08b}" for byte in record["codes"][row])
    values = []
    for bits, low, step in zip(record["bits"], record["low"], record["step"], strict=True):
        values.append(low + step * int(text[:bits] or "0", 2))
        text = text[bits:]
    return values


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 5))
def test_rows_are_those_of_a_slow_decoder(rows: int, width: int, seed: int) -> None:
    record = code_items(drawn(rows, width, seed))
    table = PackedItems(record)
    assert table.shape == (rows, width) and len(table) == rows
    found = table.take(np.arange(rows))
    assert found.dtype == np.float32 and found.shape == (rows, width)
    np.testing.assert_allclose(found, [slow_row(record, row) for row in range(rows)], rtol=1e-5, atol=1e-5)
    assert table.take(np.zeros((2, 3), np.int64)).shape == (2, 3, width)
    assert table.take(np.zeros(0, np.int64)).shape == (0, width)


@pytest.mark.parametrize("bits", range(9))
def test_codes_are_packed_at_every_place_of_a_byte(bits: int) -> None:
    items = drawn(30, 16)
    record = np.zeros((), packed_record(30, 16, 22))
    record["bits"] = [bits, 3] * 8
    steps = [fit_steps(column)[k] for column, k in zip(items.T.astype(np.float64), record["bits"], strict=True)]
    record["low"], record["step"] = [one.low for one in steps], [one.step for one in steps]
    pack(items, record)
    found = PackedItems(record).take(np.arange(30))
    np.testing.assert_allclose(found, [slow_row(record, row) for row in range(30)], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(((found - items) ** 2).sum(axis=0), [one.error for one in steps], rtol=1e-2, atol=1e-4)


def test_file_has_at_most_an_eighth_of_the_bytes(tmp_path: Path) -> None:
    items = drawn(4_000, 32)
    np.save(tmp_path / "items4.npy", code_items(items))
    assert 0.115 * items.nbytes < (tmp_path / "items4.npy").stat().st_size <= SHARE * items.nbytes
    table = read_item_table(tmp_path / "items4.npy")
    assert isinstance(table, PackedItems)
    error = np.linalg.norm(table.take(np.arange(4_000)) - items) / np.linalg.norm(items - items.mean(axis=0))
    assert error < 0.15


def test_small_table_keeps_the_least_bits() -> None:
    assert code_items(drawn(20, 16))["codes"].shape == (20, LEAST_BITS * 16 // 8)


def test_more_bits_never_raise_the_error() -> None:
    steps = fit_steps(np.random.default_rng(0).normal(size=500))
    errors = [one.error for one in steps]
    assert errors == sorted(errors, reverse=True) and errors[8] < 1e-4 * errors[0]
    assert allot([steps, steps], 100).tolist() == [8, 8] and allot([steps, steps], 6).tolist() == [3, 3]


def test_equal_items_are_kept() -> None:
    items = np.full((10, 8), 0.5, np.float32)
    np.testing.assert_allclose(PackedItems(code_items(items)).take(np.arange(10)), 0.5, atol=1e-5)


def test_bits_that_the_codes_do_not_hold_are_refused() -> None:
    record = code_items(drawn(20, 16))
    for bits in (9, 8):
        record["bits"] = bits
        with pytest.raises(ValueError, match="codes of"):
            PackedItems(record)


def test_learned_codes_start_at_the_nearest_and_follow_a_loss() -> None:
    items = drawn(200, 16)
    learned = LearnedCodes(items)
    everything = np.arange(200)
    np.testing.assert_allclose(learned().detach(), PackedItems(code_items(items)).take(everything), atol=1e-5)
    weights = torch.from_numpy(np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32))
    wanted = torch.from_numpy(items) @ weights

    def loss() -> torch.Tensor:
        return (learned() @ weights - wanted).square().mean()

    before = loss().item()
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.8 * before
    np.testing.assert_allclose(learned().detach(), PackedItems(learned.record()).take(everything), atol=1e-5)
