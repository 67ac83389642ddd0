"""Item tables of packed codes: their size, their error, their training, and rows that are those of a slow decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slatewise.inference import item_table
from slatewise.inference.item_table import PackedItems, packed_record, read_item_table
from slatewise_train.compression.item_codes import (
    LEAST_BITS,
    SHARE,
    LearnedCodes,
    allot,
    code_items,
    fit_steps,
    metric_roots,
    pack,
)


def drawn(rows: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return items (rows, width) and users (50, width) whose columns have different sizes."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(3.0, 0.1, width)
    items = (rng.normal(size=(rows, width)) * sizes + rng.normal(size=width)).astype(np.float32)
    return items, (rng.normal(size=(50, width)) * sizes[::-1]).astype(np.float32)


def slow_row(record: np.ndarray, row: int) -> np.ndarray:
    """Decode a row bit by bit."""
    text = "".join(f"{byte:08b}" for byte in record["codes"][row])
    values = record["base"].astype(np.float64)
    for bits, step in zip(record["bits"], record["steps"].astype(np.float64), strict=True):
        values = values + int(text[:bits] or "0", 2) * step
        text = text[bits:]
    return values


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 5))
def test_rows_are_those_of_a_slow_decoder(rows: int, width: int, seed: int) -> None:
    record = code_items(*drawn(rows, width, seed))
    table = PackedItems(record)
    assert table.shape == (rows, width) and len(table) == rows
    found = table.take(np.arange(rows))
    assert found.dtype == np.float32 and found.shape == (rows, width)
    np.testing.assert_allclose(found, [slow_row(record, row) for row in range(rows)], rtol=1e-5, atol=1e-4)
    assert table.take(np.zeros((2, 3), np.int64)).shape == (2, 3, width)
    assert table.take(np.zeros(0, np.int64)).shape == (0, width)


def test_many_rows_are_those_of_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are multiplied in blocks."""
    table = PackedItems(code_items(*drawn(100, 16)))
    whole = table.take(np.arange(100))
    monkeypatch.setattr(item_table, "ALONE", 7 * 16**2)
    np.testing.assert_allclose(table.take(np.arange(100)), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table.take(np.array([41])), whole[[41]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", range(9))
def test_codes_are_packed_at_every_place_of_a_byte(bits: int) -> None:
    record = np.zeros((), packed_record(300, 16, 22))
    record["bits"] = [bits, 3] * 8
    codes = np.random.default_rng(bits).integers(0, 2 ** record["bits"].astype(int), (300, 16))
    record["codes"] = pack(codes + 0.3, record)
    np.testing.assert_array_equal(PackedItems(record).unpack(np.arange(300)), codes)


def test_places_beyond_the_codes_have_the_outermost_ones() -> None:
    record = np.zeros((), packed_record(2, 2, 1))
    record["bits"] = 3
    record["codes"] = pack(np.array([[-5.0, 90.0], [2.4, 7.2]]), record)
    np.testing.assert_array_equal(PackedItems(record).unpack(np.arange(2)), [[0, 7], [2, 7]])


def test_file_has_at_most_an_eighth_of_the_bytes(tmp_path: Path) -> None:
    items, users = drawn(4_000, 32)
    np.save(tmp_path / "items4.npy", code_items(items, users))
    assert 0.115 * items.nbytes < (tmp_path / "items4.npy").stat().st_size <= SHARE * items.nbytes
    table = read_item_table(tmp_path / "items4.npy")
    assert isinstance(table, PackedItems)
    error = np.linalg.norm(table.take(np.arange(4_000)) - items) / np.linalg.norm(items - items.mean(axis=0))
    assert error < 0.15


def test_small_table_keeps_the_least_bits() -> None:
    assert code_items(*drawn(20, 16))["codes"].shape == (20, LEAST_BITS * 16 // 8)


def test_the_metric_of_users_lowers_the_error_of_their_products() -> None:
    items, users = drawn(3_000, 32)
    plain = PackedItems(code_items(items, np.zeros_like(users))).take(np.arange(3_000)) - items
    fitted = PackedItems(code_items(items, users)).take(np.arange(3_000)) - items
    assert np.square(fitted @ users.T).mean() < 0.7 * np.square(plain @ users.T).mean()


def test_roots_of_the_metric_are_inverse() -> None:
    root, inverse = metric_roots(drawn(1, 8)[1])
    np.testing.assert_allclose(root @ inverse, np.eye(8), atol=1e-9)
    root, _ = metric_roots(np.zeros((0, 8), np.float32))
    np.testing.assert_allclose(root / root[0, 0], np.eye(8), atol=1e-9)


def test_more_bits_never_raise_the_error() -> None:
    steps = fit_steps(np.random.default_rng(0).normal(size=500))
    errors = [one.error for one in steps]
    assert errors == sorted(errors, reverse=True) and errors[8] < 1e-4 * errors[0]
    assert allot([steps, steps], 100).tolist() == [8, 8] and allot([steps, steps], 6).tolist() == [3, 3]


def test_equal_items_are_kept() -> None:
    items = np.full((10, 8), 0.5, np.float32)
    found = PackedItems(code_items(items, np.ones((3, 8), np.float32))).take(np.arange(10))
    np.testing.assert_allclose(found, 0.5, atol=1e-4)


def test_numbers_beyond_float16_are_refused() -> None:
    with pytest.raises(ValueError, match="beyond float16"):
        code_items(np.full((3, 4), 1e5, np.float32), np.ones((1, 4), np.float32))


def test_bits_that_the_codes_do_not_hold_are_refused() -> None:
    record = code_items(*drawn(20, 16))
    for bits in (9, 8):
        record["bits"] = bits
        with pytest.raises(ValueError, match="codes of"):
            PackedItems(record)


def test_learned_codes_start_at_the_nearest_and_follow_a_loss() -> None:
    items, users = drawn(200, 16)
    learned = LearnedCodes(items, users)
    everything = np.arange(200)
    nearest = PackedItems(code_items(items, users)).take(everything)
    np.testing.assert_allclose(learned().detach(), nearest, rtol=1e-5, atol=1e-5)
    weights = torch.from_numpy(np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32))
    wanted = torch.from_numpy(items) @ weights

    def loss() -> torch.Tensor:
        return (learned() @ weights - wanted).square().mean()

    before = loss().item()
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.8 * before
    trained = PackedItems(learned.record()).take(everything)
    np.testing.assert_allclose(learned().detach(), trained, rtol=1e-5, atol=1e-5)
