"""Diversity of best lists: how far apart their items are, and how much of the catalogue they show.

The distance of two items is the Jaccard distance of their values in a categorical field (1 - shared / all values),
averaged over the fields. MMR is the baseline: it reorders candidates so that near items do not follow each other.

Called by: `offline.py`, `demo/simulated/`. Calls: `metrics.py`.

Letters in shapes: n lists, k items of a list, C candidates, V values of a field. A field is an array (items, V) of
`Catalogue.field_values`: rows of values, 0 for padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from slatewise_train.evaluation.metrics import DEPTH, gains, interval

TRADES = (0.9, 0.7, 0.5)  # of MMR in reports: from nearly the order of the scores to equal parts
CHUNK = 2_000_000  # numbers in one comparison of all values of many pairs
LISTS = 2_000  # that MMR orders at once: each step compares an item with all candidates


def similarity(one: np.ndarray, other: np.ndarray, fields: Sequence[np.ndarray]) -> np.ndarray:
    """Return the Jaccard similarity of items, the mean over the fields: item rows of two shapes that broadcast.

    Items are 1 apart in a field that one of them has no value of, and 0 apart if both have none.
    """
    one, other = np.broadcast_arrays(one, other)
    total = np.zeros(one.shape)
    for values in fields:
        a, b = values[one], values[other]
        shared = np.zeros(one.shape, np.int64)
        for v in range(values.shape[1]):
            shared += ((a[..., v : v + 1] == b) & (b > 0)).sum(axis=-1)
        union = (a > 0).sum(axis=-1) + (b > 0).sum(axis=-1) - shared
        total += np.where(union > 0, shared / np.maximum(union, 1), 1.0)
    return total / len(fields)


def list_distance(best: np.ndarray, fields: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean distance of all pairs of items in each list: item rows (n, k) -> (n,).

    Row 0 is a missing place. The result is NaN for lists of fewer than two items.
    """
    n, k = best.shape
    first, second = np.triu_indices(k, 1)
    widest = max(values.shape[1] for values in fields)
    step = max(1, CHUNK // max(1, len(first) * widest))
    result = np.full(n, np.nan)
    for start in range(0, n, step):
        rows = best[start : start + step]
        a, b = rows[:, first], rows[:, second]
        pair = (a > 0) & (b > 0)
        apart = np.where(pair, 1 - similarity(a, b, fields), 0.0).sum(axis=1)
        count = pair.sum(axis=1)
        result[start : start + step] = np.where(count > 0, apart / np.maximum(count, 1), np.nan)
    return result


def coverage(best: np.ndarray, items: int) -> float:
    """Return the share of a catalogue of `items` items that is in at least one list: item rows (n, k), 0 missing."""
    return len(np.unique(best[best > 0])) / items


def mmr(scores: np.ndarray, rows: np.ndarray, fields: Sequence[np.ndarray], trade: float, count: int) -> np.ndarray:
    """Return the places (n, count) of the items that MMR picks, best first (Carbonell and Goldstein, SIGIR 1998).

    Each step picks the candidate with the largest `trade * score - (1 - trade) * similarity`, with the similarity to
    the nearest item picked before. Scores are scaled to 0..1 in each list; equal values keep their input order.

    scores, rows: (n, C) of the candidates; row 0 is a missing candidate. trade: 1 is the order of the scores. A place
    is -1 if no candidates are left.
    """
    lists = np.arange(len(scores))
    left = rows > 0
    low = np.where(left, scores, np.inf).min(axis=1, keepdims=True)
    high = np.where(left, scores, -np.inf).max(axis=1, keepdims=True)
    scaled = np.where(left, scores - low, 0.0) / np.where(high > low, high - low, 1.0)
    nearest = np.zeros(scores.shape)
    picked = np.empty((len(scores), count), np.int64)
    for place in range(count):
        value = np.where(left, trade * scaled - (1 - trade) * nearest, -np.inf)
        best = value.argmax(axis=1)
        picked[:, place] = np.where(left[lists, best], best, -1)
        left[lists, best] = False
        nearest = np.maximum(nearest, similarity(rows[lists, best][:, None], rows, fields))
    return picked


def mmr_lists(scores: np.ndarray, rows: np.ndarray, fields: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the ten best of MMR for each of `TRADES`, by name: item rows (n, 10), 0 missing. Arguments: see `mmr`."""
    found = {}
    for trade in tqdm(TRADES, desc="MMR", mininterval=1):
        lists = [np.zeros((0, DEPTH), np.int64)]
        for first in range(0, len(rows), LISTS):
            part = rows[first : first + LISTS]
            places = mmr(scores[first : first + LISTS], part, fields, trade, DEPTH)
            lists.append(np.where(places < 0, 0, np.take_along_axis(part, np.maximum(places, 0), axis=1)))
        found[f"point, MMR {trade}"] = np.concatenate(lists)
    return found


@dataclass(frozen=True)
class Diversity:
    """Diversity and quality of the best lists of one exit, baseline or MMR."""

    distance: np.ndarray  # (n,) of `list_distance`
    coverage: float
    gains: np.ndarray  # (n,) NDCG@10

    def row(self) -> dict[str, float | list[float]]:
        """Return a row of the report. Means are [mean, low, high] of `metrics.interval`."""
        known = self.distance[~np.isnan(self.distance)]
        row: dict[str, float | list[float]] = {"ndcg10": interval(self.gains), "coverage": round(self.coverage, 4)}
        return row | ({"distance": interval(known)} if len(known) else {})


def measure_lists(
    best: dict[str, np.ndarray], targets: np.ndarray, fields: Sequence[np.ndarray], items: int
) -> dict[str, Diversity]:
    """Measure lists of item rows (n, 10) by name. targets: (n,) the item rows to find; items: of the catalogue."""
    found = {}
    for name, lists in best.items():
        hit = lists == targets[:, None]
        ranks = np.where(hit.any(axis=1), hit.argmax(axis=1), DEPTH)
        found[name] = Diversity(list_distance(lists, fields), coverage(lists, items), gains(ranks))
    return found
