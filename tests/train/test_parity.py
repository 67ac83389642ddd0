"""The parity measures: small on a trained bundle, and above the bound for the fault that each one should detect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from slatewise.bundle.ranker import Ranker
from slatewise.inference.arrays import GAP_FIRST, HistoryState, PackedState, PointScores
from slatewise.inference.engine import Engine
from slatewise_train.bundle_writer import FP32_BOUND
from slatewise_train.evaluation import parity
from slatewise_train.evaluation.parity import Requests
from slatewise_train.rankers.base import Calibration
from tests.conftest import Tiny

MEASURES = [
    parity.one_pass,
    parity.extended,
    parity.candidate_chunks,
    parity.permutation,
    parity.padding,
]


@pytest.fixture
def broken(tiny: Tiny, ranker: Ranker) -> Engine:
    """A separate engine, in which tests replace methods."""
    return Engine(tiny.folder / "variants" / "fp32", ranker.items, ranker.manifest.exits)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("seed", [11, 12])
def test_measure_of_trained_bundle_is_within_bound(
    ranker: Ranker, measure: Callable[[Requests], float], seed: int
) -> None:
    assert measure(Requests(ranker.engines["fp32"], ranker.manifest, seed)) <= FP32_BOUND


def test_manifest_has_every_measure_within_bound(ranker: Ranker, tiny: Tiny) -> None:
    found = ranker.manifest.variants["fp32"].invariance
    identity = {exit: [Calibration.identity()] * 2 for exit in ranker.manifest.exits}
    assert (
        found.keys()
        == parity.measure_parity(ranker.engines["fp32"], ranker.manifest, tiny.trainer.model, identity).keys()
    )
    assert len(found) == len(MEASURES) + 1 + len(parity.OPTIONS)
    assert all(0 <= value <= FP32_BOUND for name, value in found.items() if name not in parity.OPTIONS)
    assert any(value for name, value in found.items() if name not in parity.OPTIONS), "some difference is above 0"
    assert 0 < found["int8_history_state"] < 0.01


def test_against_torch_detects_another_calibration(ranker: Ranker, tiny: Tiny) -> None:
    shifted = {exit: [Calibration(1.0, 0.01, np.zeros(0), np.zeros(0))] * 2 for exit in ranker.manifest.exits}
    assert (
        parity.against_torch(Requests(ranker.engines["fp32"], ranker.manifest, 1), tiny.trainer.model, shifted)
        > FP32_BOUND
    )


def test_one_pass_detects_mixed_candidates(ranker: Ranker, broken: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    run = broken.run

    def crowded(graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
        return run(
            graph,
            feeds
            | (
                {"candidates": feeds["candidates"] + 0.1 * feeds["candidates"].mean(1, keepdims=True)}
                if graph == "point"
                else {}
            ),
        )

    monkeypatch.setattr(broken, "run", crowded)
    draw = Requests(broken, ranker.manifest, 2)
    assert parity.one_pass(draw) > FP32_BOUND
    assert parity.candidate_chunks(draw) > FP32_BOUND
    assert parity.permutation(draw) <= FP32_BOUND, "a mean does not depend on the order"


def test_extended_detects_gaps_that_restart_per_step(
    ranker: Ranker, broken: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    extend = broken.extend
    monkeypatch.setattr(
        broken, "extend", lambda state, events: extend(state, replace(events, gaps=np.r_[GAP_FIRST, events.gaps[1:]]))
    )
    assert parity.extended(Requests(broken, ranker.manifest, 3)) > FP32_BOUND


def test_extended_detects_shifted_positions(ranker: Ranker, broken: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    extend = broken.extend

    def shifted(state: HistoryState, events: Any) -> HistoryState:
        return extend(replace(state, keys=tuple(np.roll(k, 1, axis=1) for k in state.keys)), events)

    monkeypatch.setattr(broken, "extend", shifted)
    assert parity.extended(Requests(broken, ranker.manifest, 3)) > FP32_BOUND


def test_extended_detects_a_prefix_of_the_wrong_end(
    ranker: Ranker, broken: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tail(state: HistoryState, events: int) -> HistoryState:
        return HistoryState(
            tuple(k[:, -events - 1 :] for k in state.keys), tuple(v[:, -events - 1 :] for v in state.values), state.user
        )

    monkeypatch.setattr(broken, "prefix", tail)
    assert parity.extended(Requests(broken, ranker.manifest, 3)) > FP32_BOUND


def test_permutation_detects_scores_that_depend_on_order(
    ranker: Ranker, broken: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_set = broken.set

    def ordered(point: PointScores) -> np.ndarray:
        return score_set(
            replace(
                point,
                hidden=point.hidden + 0.1 * np.arange(len(point.hidden), dtype=np.float32)[:, None] * point.hidden,
            ),
        )

    monkeypatch.setattr(broken, "set", ordered)
    assert parity.permutation(Requests(broken, ranker.manifest, 5)) > FP32_BOUND


def test_chunks_detect_states_that_depend_on_position(
    ranker: Ranker, broken: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = broken.point

    def chunked(candidates: Any, meta: Any, state: Any, rows: slice = slice(None)) -> PointScores:
        found = point(candidates, meta, state, rows)
        return replace(
            found, hidden=found.hidden * (1 + 0.01 * np.arange(len(found.hidden), dtype=np.float32)[:, None])
        )

    monkeypatch.setattr(broken, "point", chunked)
    assert parity.candidate_chunks(Requests(broken, ranker.manifest, 4)) > FP32_BOUND


@pytest.mark.parametrize("length", ["length", "history_length", "set_length"])
def test_padding_detects_a_length_that_counts_padding(
    ranker: Ranker, broken: Engine, monkeypatch: pytest.MonkeyPatch, length: str
) -> None:
    run = broken.run

    def padded(graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
        return run(
            graph,
            feeds | ({length: np.full_like(feeds[length], feeds[length].max())} if length in feeds else {}),
        )

    monkeypatch.setattr(broken, "run", padded)
    assert parity.padding(Requests(broken, ranker.manifest, 6)) > FP32_BOUND


@pytest.mark.parametrize("seed", [11, 12])
def test_int8_history_state_is_near_manifest_value(ranker: Ranker, seed: int) -> None:
    """Random requests other than those of the manifest give a similar difference."""
    said = ranker.manifest.variants["fp32"].invariance["int8_history_state"]
    assert said / 5 <= parity.int8_history_state(Requests(ranker.engines["fp32"], ranker.manifest, seed)) <= 5 * said


def test_int8_history_state_detects_scales_of_another_row(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = HistoryState.packed

    def shifted(state: HistoryState) -> PackedState:
        whole = packed(state)
        return replace(
            whole,
            **{
                name: (codes, np.roll(scales, 1, axis=1))
                for name, (codes, scales) in (("keys", whole.keys), ("values", whole.values))
            },
        )

    monkeypatch.setattr(HistoryState, "packed", shifted)
    said = ranker.manifest.variants["fp32"].invariance["int8_history_state"]
    assert parity.int8_history_state(Requests(ranker.engines["fp32"], ranker.manifest, 7)) > 5 * said
