"""States of a history: what packing them costs and saves, and what a prefix shares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slatewise.bundle.ranker import Ranker
from slatewise.inference.arrays import History, HistoryState
from slatewise.inference.engine import Engine
from slatewise_train.evaluation.parity import Requests

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
    )  # a row of nothing, at times
    arrays = [rows[i : i + 1] for i in range(2 * blocks)]
    user = np.array([draw(st.lists(sizes, min_size=width, max_size=width))], np.float32)
    return HistoryState(tuple(arrays[:blocks]), tuple(arrays[blocks:]), user)


@given(states())
def test_a_packed_state_comes_back_with_each_number_within_half_a_step_of_its_row(state: HistoryState) -> None:
    packed = state.packed()
    found = packed.unpacked()
    assert found.events == state.events
    np.testing.assert_array_equal(found.user, state.user)
    for before, after in zip((*state.keys, *state.values), (*found.keys, *found.values), strict=True):
        assert after.shape == before.shape and after.dtype == np.float32
        largest = np.abs(before.astype(np.float64)).max(axis=2, keepdims=True)
        step = np.maximum(largest, np.finfo(np.float32).tiny) / 127
        error = np.abs(after.astype(np.float64) - before)
        assert (error <= step * (0.5 + 1e-4)).all(), "beyond half a step, but for the rounding of the scale itself"
        assert (after[np.broadcast_to(largest == 0, after.shape)] == 0).all(), "a row of nothing stays one"
        np.testing.assert_allclose(
            np.abs(after).max(axis=2, keepdims=True), largest, rtol=1e-6, atol=1e-37
        )  # the largest is kept


@given(states())
def test_packing_again_changes_nothing(state: HistoryState) -> None:
    """So a state that is extended many times does not drift: its old rows are rounded once."""
    packed = state.packed()
    assert packed.packed() is packed
    assert state.unpacked() is state
    again = packed.unpacked().packed()
    for (codes, scales), (first_codes, first_scales) in ((again.keys, packed.keys), (again.values, packed.values)):
        np.testing.assert_array_equal(codes, first_codes)
        np.testing.assert_allclose(scales, first_scales, rtol=1e-6)


@given(states())
def test_packed_rows_are_symmetric_int8(state: HistoryState) -> None:
    packed = state.packed()
    for (codes, scales), arrays in ((packed.keys, state.keys), (packed.values, state.values)):
        assert (codes.shape, codes.dtype) == ((len(arrays), *arrays[0].shape[1:]), np.int8)
        assert (scales.shape, scales.dtype) == ((len(arrays), state.events + 1, 1), np.float32)
        assert codes.min() >= -127
        for k, array in enumerate(arrays):
            assert (np.sign(codes[k]) * np.sign(array[0]) >= 0).all()
            largest = np.abs(array[0]).max(axis=1)
            found = np.abs(codes[k]).max(axis=1)
            assert (found[largest >= np.finfo(np.float32).tiny] == 127).all(), "the whole range is used"
            assert (found[largest == 0] == 0).all()


@pytest.mark.parametrize(
    ("blocks", "tokens", "width", "key_width"), [(4, 2049, 128, 128), (2, 129, 64, 32), (1, 1, 128, 64)]
)
def test_a_packed_state_takes_about_a_quarter_of_the_bytes(
    blocks: int, tokens: int, width: int, key_width: int
) -> None:
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
        "the user vector is kept as it is"
    )


def test_a_packed_state_shares_no_memory_with_what_it_was_made_of(ranker: Ranker) -> None:
    """Else the bytes that the cache counts would not be those it holds."""
    engine = ranker.engines["fp32"]
    state = engine.extend(engine.start, Requests(engine, ranker.manifest).history(20))
    packed = state.packed()
    for part in (*packed.keys, *packed.values):
        assert part.base is None and not any(np.shares_memory(array, part) for array in (*state.keys, *state.values))


@pytest.mark.parametrize("events", [1, 40, 128])
def test_a_packed_state_is_extended_as_the_whole_one(ranker: Ranker, events: int) -> None:
    """By the events that are new: the user vector moves by what the old ones' rounding explains, the old rows not at all."""
    engine = ranker.engines["fp32"]
    draw = Requests(engine, ranker.manifest, 5)
    history = draw.history(events + 7)
    old = engine.extend(engine.start, history[:events]).packed()
    extended = engine.extend(old.unpacked(), history[events:])
    fresh = engine.extend(engine.start, history)
    assert extended.events == fresh.events == events + 7
    for kept, whole, half in zip(
        (*extended.keys, *extended.values),
        (*fresh.keys, *fresh.values),
        (*old.unpacked().keys, *old.unpacked().values),
        strict=True,
    ):
        np.testing.assert_array_equal(kept[:, : events + 1], half)
        np.testing.assert_allclose(kept, whole, rtol=0, atol=0.05 * np.abs(whole).max())
    assert 0 < np.abs(extended.user - fresh.user).max() < 0.05 * np.abs(fresh.user).max()
    repacked = extended.packed()
    np.testing.assert_array_equal(repacked.keys[0][:, : events + 1], old.keys[0])
    np.testing.assert_array_equal(repacked.values[0][:, : events + 1], old.values[0])


def test_a_prefix_shares_the_keys_and_values_and_has_no_user_vector(ranker: Ranker) -> None:
    engine: Engine = ranker.engines["fp32"]
    state = engine.extend(engine.start, Requests(engine, ranker.manifest).history(20))
    assert engine.prefix(state, 20) is state
    assert engine.prefix(state, 0) is engine.start
    prefix = engine.prefix(state, 7)
    assert (prefix.events, prefix.user.shape) == (7, (1, 0))
    for part, whole in zip((*prefix.keys, *prefix.values), (*state.keys, *state.values), strict=True):
        assert np.shares_memory(part, whole)
        np.testing.assert_array_equal(part, whole[:, :8])


@given(st.integers(0, 12), st.integers(0, 14), st.integers(0, 14))
def test_rows_of_a_history_are_cut_as_those_of_its_columns(length: int, first: int, last: int) -> None:
    history = History(np.arange(length), np.arange(length) * 10, np.arange(length) * 100)
    cut: dict[str, Any] = {name: getattr(history[first:last], name).tolist() for name in ("items", "actions", "gaps")}
    assert cut == {name: getattr(history, name).tolist()[first:last] for name in ("items", "actions", "gaps")}
    assert len(history[first:last]) == len(cut["items"])


def test_a_row_alone_goes_in_company_and_comes_back_alone(ranker: Ranker) -> None:
    """One event and one candidate have the results of one, equal to those among others within far less than the bound."""
    engine = ranker.engines["fp32"]
    draw = Requests(ranker.engines["fp32"], ranker.manifest, 5)
    history = draw.history(20)
    candidates = draw.candidates(9)
    meta = draw.meta()
    fresh = engine.extend(engine.start, history)
    grown = engine.start
    for k in range(20):
        grown = engine.extend(grown, history[k : k + 1])
        assert grown.events == k + 1 and grown.keys[0].shape == grown.values[-1].shape == (
            1,
            k + 2,
            ranker.manifest.width,
        )
    for one, other in zip(
        (*grown.keys, *grown.values, grown.user), (*fresh.keys, *fresh.values, fresh.user), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=2e-6)
    whole = engine.point(candidates, meta, fresh)
    for k in range(9):
        alone = engine.point(candidates, meta, fresh, slice(k, k + 1))
        assert len(alone.hidden) == len(alone.logits) == len(alone.probabilities) == 1
        np.testing.assert_allclose(alone.hidden[0], whole.hidden[k], atol=2e-6)
