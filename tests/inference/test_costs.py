"""Predicted times of graphs: the fit, what each call teaches, and the sizes of calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slatewise.bundle.ranker import Ranker
from slatewise.inference.costs import LEAST_WEIGHT, STEP, GraphCosts, Work, work_of
from slatewise.inference.engine import Engine
from slatewise.inference.timed_calls import time_calls
from tests.ranking.support import draw_request

SIZES = [Work(1, 16, 256), Work(1, 64, 20_000), Work(1, 256, 20_000), Work(1, 256, 130_000)]


def fitted(seconds: list[float]) -> GraphCosts:
    costs = GraphCosts()
    costs.begin()
    for work, taken in zip(SIZES, seconds, strict=True):
        costs.learn(work, 3 * taken)
        costs.learn(work, taken)  # the shorter one counts
    costs.fit()
    return costs


@given(st.tuples(*[st.sampled_from([0.0, 1e-4, 1e-3])] * 3).filter(any))
def test_fit_finds_the_weights_that_made_the_times(weights: tuple[float, float, float]) -> None:
    a, b, c = weights
    costs = fitted([a * w.calls + b * w.rows / 100 + c * w.products / 10_000 for w in SIZES])
    assert costs.weights == pytest.approx([max(w, LEAST_WEIGHT) for w in weights], rel=1e-6, abs=1e-8)


@given(st.lists(st.floats(1e-5, 1.0), min_size=4, max_size=4))
def test_fit_to_any_times_has_no_negative_weight(seconds: list[float]) -> None:
    costs = fitted(seconds)
    assert min(costs.weights) >= LEAST_WEIGHT
    assert costs.seconds(Work(1, 0, 0)) <= costs.seconds(Work(1, 100, 0)) <= costs.seconds(Work(2, 100, 1_000))


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_prediction_follows_a_machine_of_another_speed(factor: float) -> None:
    true = (1e-4, 2e-4, 3e-4)
    costs = GraphCosts()
    costs.weights = true
    for k in range(400):
        work = SIZES[k % len(SIZES)]
        costs.learn(work, factor * sum(w * s for w, s in zip(true, (1, work.rows / 100, work.products / 1e4))))
    for work in SIZES:
        expected = factor * sum(w * s for w, s in zip(true, (1, work.rows / 100, work.products / 1e4)))
        assert costs.seconds(work) == pytest.approx(expected, rel=0.15)


def test_engine_that_becomes_much_slower_is_predicted_soon() -> None:
    costs = GraphCosts()
    seconds = 50 * costs.seconds(SIZES[2])
    for _ in range(10):
        costs.learn(SIZES[2], seconds)
    assert costs.seconds(SIZES[2]) == pytest.approx(seconds, rel=0.6)


@given(st.floats(1e-9, 1e4))
def test_one_call_moves_a_prediction_by_a_tenth(seconds: float) -> None:
    costs = GraphCosts()
    before = costs.seconds(SIZES[2])
    costs.learn(SIZES[2], seconds)
    assert np.exp(-STEP) <= costs.seconds(SIZES[2]) / before <= np.exp(STEP)


def test_size_of_a_call_is_read_from_its_inputs(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 events behind 5 encoded ones and the start token; 9 candidates see 6 tokens."""
    engine = ranker.engines["fp32"]
    found: dict[str, Work] = {}
    run = Engine.run

    def noted(engine: Engine, graph: str, feeds: dict[str, Any], *more: Any) -> Any:
        found[graph] = work_of(graph, feeds)
        return run(engine, graph, feeds, *more)

    monkeypatch.setattr(Engine, "run", noted)
    request = draw_request(ranker, 12, 9, 1)
    history = ranker.history(request)
    candidates, _ = ranker.candidates(request, 0.0)
    state = engine.extend(engine.start, history[:5])
    engine.extend(state, history[5:])
    engine.dot(candidates, state)
    engine.set(engine.point(candidates, ranker.default_meta, state))
    assert found == {
        "encode": Work(1, 7, 7 * 13),
        "dot": Work(1, 9, 0),
        "point": Work(1, 9, 9 * 6),
        "set": Work(1, 9, 81),
    }


def test_timed_calls_fit_every_graph(ranker: Ranker) -> None:
    engine = ranker.engines["fp32"]
    before = {graph: costs.weights for graph, costs in engine.costs.items()}
    manifest = ranker.manifest
    limits = manifest.limits
    time_calls(engine, limits.history_used, limits.set_wise, len(manifest.features), manifest.meta_size, lambda f: f())
    for graph, costs in engine.costs.items():
        assert costs.weights != before[graph]
        assert costs.seconds(Work(1, 2_000, 400_000)) > costs.seconds(Work(1, 10, 100)) > 0
