"""States and histories as arrays: the error and the size of packed states, parts of a history."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slatewise.inference.arrays import History, HistoryState

sizes = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e30, -1e30, 1e-30, 1e-45])


@st.composite
def states(draw: st.DrawFn) -> HistoryState:
    blocks = draw(st.integers(1, 3))
    tokens = draw(st.integers(1, 5))
    width = draw(st.integers(1, 6))
    shape = (2 * blocks, tokens, width)
    rows = np.array(
        draw(st.lists(sizes, min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))), np.float32
    ).reshape(shape)
    rows[draw(st.integers(0, 2 * blocks - 1)), draw(st.integers(0, tokens - 1))] *= draw(
        st.sampled_from([0, 1])
    )  # sometimes a row of zeros
    arrays = [rows[i : i + 1] for i in range(2 * blocks)]
    user = np.array([draw(st.lists(sizes, min_size=width, max_size=width))], np.float32)
    return HistoryState(tuple(arrays[:blocks]), tuple(arrays[blocks:]), user)


@given(states())
def test_unpacking_restores_numbers_within_half_a_step(state: HistoryState) -> None:
    packed = state.packed()
    found = packed.unpacked()
    assert found.events == state.events
    np.testing.assert_array_equal(found.user, state.user)
    for before, after in zip((*state.keys, *state.values), (*found.keys, *found.values), strict=True):
        assert after.shape == before.shape and after.dtype == np.float32
        largest = np.abs(before.astype(np.float64)).max(axis=2, keepdims=True)
        step = np.maximum(largest, np.finfo(np.float32).tiny) / 127
        error = np.abs(after.astype(np.float64) - before)
        assert (error <= step * (0.5 + 1e-4)).all(), "more than half a step, and the rounding of the scale"
        assert (after[np.broadcast_to(largest == 0, after.shape)] == 0).all(), "a row of zeros stays one"
        np.testing.assert_allclose(
            np.abs(after).max(axis=2, keepdims=True), largest, rtol=1e-6, atol=1e-37
        )  # the largest number of a row is exact


@given(states())
def test_packing_an_unpacked_state_changes_nothing(state: HistoryState) -> None:
    """So the error does not grow when a state is extended many times: each row is rounded once."""
    packed = state.packed()
    assert packed.packed() is packed
    assert state.unpacked() is state
    again = packed.unpacked().packed()
    for (codes, scales), (first_codes, first_scales) in ((again.keys, packed.keys), (again.values, packed.values)):
        np.testing.assert_array_equal(codes, first_codes)
        np.testing.assert_allclose(scales, first_scales, rtol=1e-6)


@given(states())
def test_packed_rows_are_symmetric_int8_of_full_range(state: HistoryState) -> None:
    packed = state.packed()
    for (codes, scales), arrays in ((packed.keys, state.keys), (packed.values, state.values)):
        assert (codes.shape, codes.dtype) == ((len(arrays), *arrays[0].shape[1:]), np.int8)
        assert (scales.shape, scales.dtype) == ((len(arrays), state.events + 1, 1), np.float32)
        assert codes.min() >= -127
        for k, array in enumerate(arrays):
            assert (np.sign(codes[k]) * np.sign(array[0]) >= 0).all()
            largest = np.abs(array[0]).max(axis=1)
            found = np.abs(codes[k]).max(axis=1)
            assert (found[largest >= np.finfo(np.float32).tiny] == 127).all(), "the full range is used"
            assert (found[largest == 0] == 0).all()


@pytest.mark.parametrize(
    ("blocks", "tokens", "width", "key_width"), [(4, 2049, 128, 128), (2, 129, 64, 32), (1, 1, 128, 64)]
)
def test_packed_state_takes_about_a_quarter_of_the_bytes(blocks: int, tokens: int, width: int, key_width: int) -> None:
    rng = np.random.default_rng(0)
    keys, values = (
        tuple(rng.normal(size=(1, tokens, size)).astype(np.float32) for _ in range(blocks))
        for size in (key_width, width)
    )
    state = HistoryState(keys, values, np.zeros((1, 0), np.float32))
    packed = state.packed()
    assert state.nbytes == blocks * tokens * (width + key_width) * 4
    assert packed.nbytes == blocks * tokens * (width + key_width + 8)
    assert 0.25 < packed.nbytes / state.nbytes <= 0.275
    assert [array.shape for array in packed.unpacked().keys] == [array.shape for array in keys]
    assert HistoryState(keys, values, np.ones((1, width), np.float32)).packed().nbytes == packed.nbytes + 4 * width, (
        "the user vector is not packed"
    )


@given(st.integers(0, 12), st.integers(0, 14), st.integers(0, 14))
def test_slice_of_a_history_slices_its_columns(length: int, first: int, last: int) -> None:
    history = History(np.arange(length), np.arange(length) * 10, np.arange(length) * 100)
    cut: dict[str, Any] = {name: getattr(history[first:last], name).tolist() for name in ("items", "actions", "gaps")}
    assert cut == {name: getattr(history, name).tolist()[first:last] for name in ("items", "actions", "gaps")}
    assert len(history[first:last]) == len(cut["items"])
