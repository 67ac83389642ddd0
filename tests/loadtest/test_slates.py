"""The ways to rank more candidates than one slate holds, with a perfect ranker of each slate."""

from __future__ import annotations

import numpy as np

from loadtest.engine.slates import mean, page_rank, random_slates, win_rate
from slatewise_train.evaluation.metrics import DEPTH, ndcg

REQUESTS = 40


def test_each_candidate_is_in_so_many_random_slates() -> None:
    slates = random_slates(103, 20, 3, np.random.default_rng(0))
    assert np.bincount(np.concatenate(slates), minlength=103).tolist() == [3] * 103
    assert max(map(len, slates)) <= 20


def test_mean_is_taken_over_the_slates_of_a_candidate() -> None:
    slates = [np.array([0, 1]), np.array([1, 2])]
    found = [np.array([[0.2], [0.4]]), np.array([[0.6], [0.8]])]
    assert np.allclose(mean(slates, found, 3), [[0.2], [0.5], [0.8]])


def test_orders_of_a_perfect_ranker_are_put_together() -> None:
    """100 candidates in slates of 20, four slates each."""
    gains: dict[str, list[float]] = {"win rate": [], "PageRank": []}
    for seed in range(REQUESTS):
        rng = np.random.default_rng(seed)
        worth = rng.permutation(100).astype(float)
        slates = random_slates(100, 40, 4, rng)
        scores = [worth[rows] for rows in slates]
        best = (worth >= 100 - DEPTH).astype(float)
        gains["win rate"].append(ndcg(win_rate(slates, scores, 100), best))
        gains["PageRank"].append(ndcg(page_rank(slates, scores, 100), best))
    assert np.mean(gains["PageRank"]) >= 0.92 and np.mean(gains["win rate"]) >= 0.88
