"""What a loaded ranker computes of a request beside arrays: scores of the heads' probabilities, and counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slatewise.bundle.ranker import Ranker, weighted_mean
from slatewise.schemas import RankRequest


def request_of(history: dict[str, Any]) -> RankRequest:
    return RankRequest.model_validate({"candidates": {"item_ids": ["1"]}, "history": history})


@pytest.mark.parametrize("times", ["none", "oldest first", "newest first"])
@pytest.mark.parametrize("events", [0, 1, 5, 300])  # 300 are more than the ranker reads
def test_unknown_actions_are_counted_among_the_events_read(ranker: Ranker, events: int, times: str) -> None:
    known = ranker.manifest.actions[0]
    actions = ([None, "purchase", known, "PURCHASE", known.upper()] * events)[:events]
    sent: dict[str, Any] = {"item_ids": ["1"] * events, "actions": actions}
    if times != "none":
        sent["timestamps"] = list(range(events))
    if times == "newest first":
        sent["actions"] = actions[::-1]
        sent["timestamps"] = sent["timestamps"][::-1]
    request = request_of(sent)
    read = actions[ranker.window_start(request) :]
    found = ranker.read_history(request)
    assert found.unknown_actions == len(read) - read.count(None) - read.count(known)
    assert len(found.events) == len(read)


def test_history_without_actions_has_no_unknown_one(ranker: Ranker) -> None:
    for actions in ({}, {"actions": None}, {"actions": [None, None]}):
        assert ranker.read_history(request_of({"item_ids": ["1", "2"], **actions})).unknown_actions == 0


P = np.array([[0.0, 1.0], [0.25, 0.5], [1.0, 1.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1.0, 0.2), [1 / 6, 0.35 / 1.2, 1, 0]),
        ((0.0, 3.0), [1, 0.5, 1, 0]),
        ((1.0, -1.0), [0, 0.375, 0.5, 0.5]),  # the mean of p and of the other head's 1 - p
        ((-2.0, 0.0), [1, 0.75, 0, 1]),
        ((0.0, 0.0), [0, 0, 0, 0]),
        ((5e-324, 0.0), [0, 0.25, 1, 0]),
    ],
)
def test_score_is_the_weighted_mean_of_the_heads(weights: tuple[float, ...], expected: list[float]) -> None:
    assert weighted_mean(P, np.array(weights)).tolist() == pytest.approx(expected, abs=1e-15)


def test_no_candidates_have_no_scores() -> None:
    assert weighted_mean(np.empty((0, 2)), np.ones(2)).tolist() == []


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 60))
def test_score_is_in_0_to_1_and_ordered_as_the_sum(seed: int, heads: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = rng.uniform(size=(n, heads)) if seed % 2 else rng.integers(0, 2, (n, heads)).astype(float)
    weights = rng.choice([0.0, 1.0, -1.0, 0.2, 3.7, -1e6, 1e6, 1e-300], heads)
    scores = weighted_mean(drawn, weights)
    assert scores.shape == (n,) and ((scores >= 0) & (scores <= 1)).all()
    sums = drawn @ weights
    apart = sums[:, None] - sums > 1e-12 * np.abs(weights).sum()  # by more than rounding
    assert (scores[:, None] > scores)[apart].all()


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-300, 0.3, 1.0, 3.0, 1e6]))
def test_score_of_a_single_head_is_its_probability(seed: int, weight: float) -> None:
    drawn = np.random.default_rng(seed).uniform(size=(20, 2))
    np.testing.assert_array_equal(weighted_mean(drawn, np.array([0.0, weight])), drawn[:, 1])
