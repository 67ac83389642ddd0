"""The engine: load errors, extension of states, prefixes, padding of a single row."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from slatewise.bundle.ranker import Ranker
from slatewise.inference.engine import Engine, EngineLoadError
from slatewise_train.evaluation.parity import Requests
from tests.conftest import Tiny


@pytest.mark.parametrize("content", [None, b"", b"not a graph"], ids=["missing", "empty", "garbage"])
def test_unreadable_graph_is_a_load_error(tiny: Tiny, ranker: Ranker, content: bytes | None, tmp_path: Path) -> None:
    folder = tmp_path / "fp32"
    shutil.copytree(tiny.folder / "variants" / "fp32", folder)
    (folder / "point.onnx").unlink()
    if content is not None:
        (folder / "point.onnx").write_bytes(content)
    with pytest.raises(EngineLoadError, match="onnxruntime refuses it"):
        Engine(folder, ranker.items, ranker.manifest.exits)


def test_graph_without_fixed_past_widths_is_a_load_error(tiny: Tiny, ranker: Ranker, tmp_path: Path) -> None:
    import onnx

    folder = tmp_path / "fp32"
    shutil.copytree(tiny.folder / "variants" / "fp32", folder)
    graph = onnx.load(folder / "encode.onnx")
    (past,) = (each for each in graph.graph.input if each.name == "past_key_0")
    past.type.tensor_type.shape.dim[-1].dim_param = "width"
    onnx.save(graph, folder / "encode.onnx")
    with pytest.raises(EngineLoadError, match="past_key_0"):
        Engine(folder, ranker.items, ranker.manifest.exits)


def test_packed_state_shares_no_memory_with_its_source(ranker: Ranker) -> None:
    """If memory were shared, the history cache would use more bytes than it counts."""
    engine = ranker.engines["fp32"]
    state = engine.extend(engine.start, Requests(engine, ranker.manifest).history(20))
    packed = state.packed()
    for part in (*packed.keys, *packed.values):
        assert part.base is None and not any(np.shares_memory(array, part) for array in (*state.keys, *state.values))


@pytest.mark.parametrize("events", [1, 40, 128])
def test_extending_a_packed_state_keeps_its_old_rows(ranker: Ranker, events: int) -> None:
    """The user vector differs only as much as the rounding of the old rows explains."""
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


def test_prefix_of_a_state_is_a_view_without_user_vector(ranker: Ranker) -> None:
    engine: Engine = ranker.engines["fp32"]
    state = engine.extend(engine.start, Requests(engine, ranker.manifest).history(20))
    assert engine.prefix(state, 20) is state
    assert engine.prefix(state, 0) is engine.start
    prefix = engine.prefix(state, 7)
    assert (prefix.events, prefix.user.shape) == (7, (1, 0))
    for part, whole in zip((*prefix.keys, *prefix.values), (*state.keys, *state.values), strict=True):
        assert np.shares_memory(part, whole)
        np.testing.assert_array_equal(part, whole[:, :8])


def test_padded_single_row_gives_the_result_of_one_row(ranker: Ranker) -> None:
    """One event or one candidate gives one result, close to the result of the same row in a batch."""
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
        single = engine.point(candidates, meta, fresh, slice(k, k + 1))
        assert len(single.hidden) == len(single.logits) == len(single.probabilities) == 1
        np.testing.assert_allclose(single.hidden[0], whole.hidden[k], atol=2e-6)
