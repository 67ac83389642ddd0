"""Metrics of ranked lists and of probabilities, and their confidence intervals.

Called by: `validation.py`, `offline.py`, `meta/personalization.py`. Calls: numpy, torch.
"""

from __future__ import annotations

import numpy as np
import torch

DEPTH = 10  # of every NDCG and hit rate here
BOOTSTRAPS = 1_000
BINS = 15


def rank_of(scores: np.ndarray, target: int) -> int:
    """Return the rank of an element among scores (n,), 0 for the best. Ties are ranked in input order."""
    return int((scores > scores[target]).sum() + (scores[:target] == scores[target]).sum())


def ranks_of(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return `rank_of` row by row: scores (n, m), targets (n,) columns -> (n,) int64."""
    mine = scores[np.arange(len(scores)), targets][:, None]
    earlier = (scores == mine) & (np.arange(scores.shape[1]) < targets[:, None])
    found: np.ndarray = ((scores > mine).sum(axis=1) + earlier.sum(axis=1)).astype(np.int64)
    return found


def top_rows(scores: np.ndarray, depth: int = DEPTH) -> np.ndarray:
    """Return the columns of the best scores of each row (n, m), best first, ties in input order: (n, depth) int64.

    Scores of -inf are left out; places without a score are 0.
    """
    result = np.zeros((len(scores), depth), np.int64)
    if not scores.size:
        return result
    floors = torch.topk(torch.from_numpy(scores), min(depth, scores.shape[1])).values[:, -1].numpy()
    for row, floor in enumerate(floors):
        above = np.flatnonzero(scores[row] > floor)
        best = above[np.argsort(-scores[row, above], kind="stable")]
        if floor > -np.inf:
            best = np.concatenate([best, np.flatnonzero(scores[row] == floor)[: depth - len(best)]])
        result[row, : len(best)] = best
    return result


def hits(ranks: np.ndarray) -> np.ndarray:
    """Return HR@10 (hit rate) of one relevant item per list: ranks (n,), 0 for the best -> (n,) float64, 0 or 1."""
    return (ranks < DEPTH).astype(float)


def gains(ranks: np.ndarray) -> np.ndarray:
    """Return NDCG@10 of one relevant item per list: ranks (n,), 0 for the best -> (n,) float64."""
    return np.where(ranks < DEPTH, 1 / np.log2(ranks + 2), 0.0)


def ndcg(scores: np.ndarray, labels: np.ndarray, depth: int = DEPTH) -> float:
    """Return NDCG@depth with binary gains. scores, labels: (n,).

    The result is NaN if all labels are 0 or all labels are 1.
    """
    if not 0 < labels.sum() < len(labels):
        return float("nan")
    discount = 1 / np.log2(np.arange(2, len(labels) + 2))
    discount[depth:] = 0
    found = (labels[np.argsort(-scores, kind="stable")] * discount).sum()
    return float(found / (np.sort(labels)[::-1] * discount).sum())


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the area under the ROC curve, ties counting half. scores, labels: (n,). NaN if a class is missing."""
    positive = np.sort(scores[labels == 1])
    negative = scores[labels == 0]
    if not len(positive) or not len(negative):
        return float("nan")
    below = (np.searchsorted(positive, negative, "left") + np.searchsorted(positive, negative, "right")) / 2
    return float(1 - below.mean() / len(positive))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error (Naeini et al., AAAI 2015) over 15 bins with equally many examples."""
    order = np.array_split(np.argsort(probabilities, kind="stable"), BINS)
    return float(sum(abs(probabilities[b].mean() - labels[b].mean()) * len(b) for b in order if len(b)) / len(labels))


def interval(values: np.ndarray, seed: int = 0, digits: int = 4) -> list[float]:
    """Return [mean, low, high] of values (n,), where low and high are a 95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(BOOTSTRAPS)]
    return [round(float(v), digits) for v in (values.mean(), *np.quantile(means, [0.025, 0.975]))]
