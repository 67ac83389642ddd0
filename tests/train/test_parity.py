"""What must not change a score does not, and each measure notices the fault that it is there for."""

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
from slatewise_train.evaluation import parity as invariance
from slatewise_train.evaluation.parity import Requests
from slatewise_train.rankers.base import Calibration
from tests.conftest import Tiny

MEASURES = [
    invariance.one_pass,
    invariance.extended,
    invariance.candidate_chunks,
    invariance.permutation,
    invariance.padding,
]


@pytest.fixture
def broken(tiny: Tiny, ranker: Ranker) -> Engine:
    """An engine of its own, to be broken by setting attributes."""
    return Engine(tiny.folder / "variants" / "fp32", ranker.items, ranker.manifest.exits, 1)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("seed", [11, 12])
def test_score_stays(ranker: Ranker, measure: Callable[[Requests], float], seed: int) -> None:
    assert measure(Requests(ranker.engines["fp32"], ranker.manifest, seed)) <= FP32_BOUND


def test_manifest_holds_every_measure_and_what_was_found(ranker: Ranker, tiny: Tiny) -> None:
    found = ranker.manifest.variants["fp32"].invariance
    identity = {exit: [Calibration.identity()] * 2 for exit in ranker.manifest.exits}
    assert (
        found.keys() == invariance.measure(ranker.engines["fp32"], ranker.manifest, tiny.trainer.model, identity).keys()
    )
    assert len(found) == len(MEASURES) + 1 + len(invariance.OPTIONS)
    assert all(0 <= value <= FP32_BOUND for name, value in found.items() if name not in invariance.OPTIONS)
    assert any(value for name, value in found.items() if name not in invariance.OPTIONS), "nothing at all was compared"
    assert 0 < found["int8_history_state"] < 0.01


def test_against_torch_notices_another_calibration(ranker: Ranker, tiny: Tiny) -> None:
    shifted = {exit: [Calibration(1.0, 0.01, np.zeros(0), np.zeros(0))] * 2 for exit in ranker.manifest.exits}
    assert (
        invariance.against_torch(Requests(ranker.engines["fp32"], ranker.manifest, 1), tiny.trainer.model, shifted)
        > FP32_BOUND
    )


def test_one_pass_notices_candidates_that_see_each_other(
    ranker: Ranker, broken: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = broken.run

    def crowded(graph: str, feeds: dict[str, Any], multi_threaded: bool = False) -> dict[str, Any]:
        return run(
            graph,
            feeds
            | (
                {"candidates": feeds["candidates"] + 0.1 * feeds["candidates"].mean(1, keepdims=True)}
                if graph == "point"
                else {}
            ),
            multi_threaded,
        )

    monkeypatch.setattr(broken, "run", crowded)
    draw = Requests(broken, ranker.manifest, 2)
    assert invariance.one_pass(draw) > FP32_BOUND
    assert invariance.candidate_chunks(draw) > FP32_BOUND
    assert invariance.permutation(draw) <= FP32_BOUND, "the mean has no order"


def test_extended_notices_gaps_that_start_anew_in_every_step(
    ranker: Ranker, broken: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    extend = broken.extend
    monkeypatch.setattr(
        broken, "extend", lambda state, events: extend(state, replace(events, gaps=np.r_[GAP_FIRST, events.gaps[1:]]))
    )
    assert invariance.extended(Requests(broken, ranker.manifest, 3)) > FP32_BOUND


def test_extended_notices_a_past_whose_positions_are_shifted(
    ranker: Ranker, broken: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    extend = broken.extend

    def shifted(state: HistoryState, events: Any) -> HistoryState:
        return extend(replace(state, keys=tuple(np.roll(k, 1, axis=1) for k in state.keys)), events)

    monkeypatch.setattr(broken, "extend", shifted)
    assert invariance.extended(Requests(broken, ranker.manifest, 3)) > FP32_BOUND


def test_extended_notices_a_prefix_that_keeps_the_wrong_end(
    ranker: Ranker, broken: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tail(state: HistoryState, events: int) -> HistoryState:
        return HistoryState(
            tuple(k[:, -events - 1 :] for k in state.keys), tuple(v[:, -events - 1 :] for v in state.values), state.user
        )

    monkeypatch.setattr(broken, "prefix", tail)
    assert invariance.extended(Requests(broken, ranker.manifest, 3)) > FP32_BOUND


def test_permutation_notices_an_order_in_the_set(
    ranker: Ranker, broken: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_set = broken.set

    def ordered(point: PointScores, multi_threaded: bool = False) -> np.ndarray:
        return score_set(
            replace(
                point,
                hidden=point.hidden + 0.1 * np.arange(len(point.hidden), dtype=np.float32)[:, None] * point.hidden,
            ),
            multi_threaded,
        )

    monkeypatch.setattr(broken, "set", ordered)
    assert invariance.permutation(Requests(broken, ranker.manifest, 5)) > FP32_BOUND


def test_chunks_notice_a_set_that_depends_on_more_than_its_candidates(
    ranker: Ranker, broken: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = broken.point

    def chunked(candidates: Any, meta: Any, state: Any, rows: slice = slice(None)) -> PointScores:
        found = point(candidates, meta, state, rows)
        return replace(
            found, hidden=found.hidden * (1 + 0.01 * np.arange(len(found.hidden), dtype=np.float32)[:, None])
        )

    monkeypatch.setattr(broken, "point", chunked)
    assert invariance.candidate_chunks(Requests(broken, ranker.manifest, 4)) > FP32_BOUND


@pytest.mark.parametrize("length", ["length", "history_length", "set_length"])
def test_padding_notices_a_length_that_counts_the_padding(
    ranker: Ranker, broken: Engine, monkeypatch: pytest.MonkeyPatch, length: str
) -> None:
    run = broken.run

    def padded(graph: str, feeds: dict[str, Any], multi_threaded: bool = False) -> dict[str, Any]:
        return run(
            graph,
            feeds | ({length: np.full_like(feeds[length], feeds[length].max())} if length in feeds else {}),
            multi_threaded,
        )

    monkeypatch.setattr(broken, "run", padded)
    assert invariance.padding(Requests(broken, ranker.manifest, 6)) > FP32_BOUND


@pytest.mark.parametrize("seed", [11, 12])
def test_a_history_kept_as_int8_moves_a_score_by_what_its_rounding_explains(ranker: Ranker, seed: int) -> None:
    """Near what the manifest says of it, which is of other draws; and more than nothing."""
    said = ranker.manifest.variants["fp32"].invariance["int8_history_state"]
    assert (
        said / 5 <= invariance.int8_history_state(Requests(ranker.engines["fp32"], ranker.manifest, seed)) <= 5 * said
    )


def test_int8_notices_scales_that_are_of_another_row(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert invariance.int8_history_state(Requests(ranker.engines["fp32"], ranker.manifest, 7)) > 5 * said


def test_a_wide_call_gives_the_scores_of_a_narrow_one(ranker: Ranker, tiny: Tiny) -> None:
    """All threads on one call: another order of adding up at most."""
    engine = Engine(tiny.folder / "variants" / "fp32", ranker.items, ranker.manifest.exits, 2)
    assert set(engine.multi_threaded) == {"encode", "point", "set"}
    draw = Requests(engine, ranker.manifest, 8)
    for events, n in ((1, 1), (128, 600), (40, 37)):
        history = draw.history(events)
        candidates = draw.candidates(n)
        meta = draw.meta()
        states = [engine.extend(engine.start, history, multi_threaded) for multi_threaded in (False, True)]
        points = [
            engine.point(candidates, meta, state, multi_threaded=multi_threaded)
            for state, multi_threaded in zip(states, (False, True), strict=True)
        ]
        sets = [engine.set(point, multi_threaded) for point, multi_threaded in zip(points, (False, True), strict=True)]
        for one, other in (
            (points[0].probabilities, points[1].probabilities),
            sets,
            *zip(states[0].keys, states[1].keys, strict=True),
        ):
            np.testing.assert_allclose(one, other, rtol=0, atol=FP32_BOUND)
