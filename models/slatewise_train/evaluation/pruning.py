"""Measure a prune: the share of users whose ten best items stay the same if the costly exits score only the best of the
exit before. `export` publishes a prune only if this share is at least LEAST_UNCHANGED at every exit that it prunes.

Each test user has one list of candidates, the longest that a server takes: all items that are new to the user, or
LONGEST of them at random. Shorter lists lose less. Scores are those of a request without `head_weights`.

Called by: `export.py`. Calls: `cases.py`, `sampling.py`, `metrics.py`, `inference/`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slatewise.bundle.manifest import Manifest
from slatewise.bundle.ranker import weighted_mean
from slatewise.inference.arrays import FIRST_ITEM, PointScores, best_rows
from slatewise.inference.chunks import run_all
from slatewise.inference.engine import Engine
from slatewise.inference.slates import run_set
from slatewise.pruning import Prune
from slatewise_train.data import Data
from slatewise_train.evaluation.cases import Case, candidates_of, next_cases, point_of_many, state_of
from slatewise_train.evaluation.metrics import DEPTH, gains, interval
from slatewise_train.evaluation.sampling import SAMPLED_USERS, SEED, in_parallel, sample_users

LEAST_UNCHANGED = 0.99
LONGEST = 4_096  # candidates: the default of SLATEWISE_MAX_CANDIDATES


def measure_pruning(
    engine: Engine,
    manifest: Manifest,
    data: Data,
    meta: np.ndarray,
    prune: Prune,
    most_users: int | None = SAMPLED_USERS,
) -> dict[str, Any]:
    """Return the row `pruning` of the report. Shares of users are [mean, low, high], by exit that is pruned.

    unchanged: the same ten items in the same order; same_items: in any order. ndcg10: of the next item, pruned minus
    unpruned, paired. published: whether every share in `unchanged` is high enough; false without a test user. meta:
    (M,) the meta-embedding of every request; most_users: see `sample_users`. Raises ValueError if no exit is pruned.
    """
    weights = np.array(list(manifest.heads.values()))
    exits = [exit for exit in ("point", "set") if exit in manifest.exits and (exit == "set" or prune.point is not None)]
    if not exits:
        raise ValueError(f"[export] has a prune, and the exits of the ranker are {', '.join(manifest.exits)}")

    def compare(case: Case) -> tuple[int, list[tuple[float, float, float]]]:
        rows = candidate_rows(case, len(engine.items))
        if not len(rows):  # the user knows every item
            return 0, [(1.0, 1.0, 0.0)] * len(exits)
        candidates = candidates_of(engine, data, rows, case.time)
        state = state_of(engine, case)
        dot = weighted_mean(engine.dot(candidates, state), weights)
        point = point_of_many(engine, candidates, meta, state)
        changes = []
        for exit in exits:
            plain, pruned = (ten_best(engine, weights, exit, dot, point, one) for one in (Prune(), prune))
            gain = gain_of(rows[pruned], case.upcoming[0]) - gain_of(rows[plain], case.upcoming[0])
            changes.append((float(plain == pruned), float(set(plain) == set(pruned)), gain))
        return len(rows), changes

    users = np.flatnonzero(data.split.test_lengths)
    found = in_parallel(compare, list(next_cases(data, sample_users(users, most_users))), "pruning")
    columns = np.array([changes for _, changes in found]).reshape(-1, len(exits), 3)
    unchanged, same_items, ndcg = (
        {exit: interval(columns[:, k, column]) for k, exit in enumerate(exits) if found} for column in range(3)
    )
    return {
        "prune": prune.model_dump(),
        "users": len(found),
        "candidates": round(float(np.mean([count for count, _ in found]))) if found else 0,
        "unchanged": unchanged,
        "same_items": same_items,
        "ndcg10": ndcg,
        "least": LEAST_UNCHANGED,
        "published": bool(unchanged) and all(share[0] >= LEAST_UNCHANGED for share in unchanged.values()),
    }


def gain_of(best: np.ndarray, target: int) -> float:
    """Return NDCG@10 of a list of the ten best item rows whose only relevant item is `target`."""
    return float(gains(np.flatnonzero(best == target)).sum())


def candidate_rows(case: Case, items: int) -> np.ndarray:
    """Return the item rows (n,) that are new to the user, at most LONGEST of them, in the order of the catalogue."""
    new = np.setdiff1d(np.arange(FIRST_ITEM, items), case.seen)
    if len(new) <= LONGEST:
        return new
    return np.sort(np.random.default_rng((SEED, case.user)).choice(new, LONGEST, replace=False))


def ten_best(
    engine: Engine, weights: np.ndarray, exit: str, dot: np.ndarray, point: PointScores, prune: Prune
) -> list[int]:
    """Return the positions of the ten best candidates of an exit, as a server ranks them with a prune.

    weights: (heads,) of the score. dot: (n,) scores of the exit `dot`. point: the exit `point` of all n candidates.
    """
    rows = best_rows(dot, min(prune.point or len(dot), len(dot)))
    scores = weighted_mean(point.probabilities[rows], weights)
    if exit == "set":
        rows = rows[best_rows(scores, min(prune.set or len(rows), len(rows)))]
        scores = weighted_mean(run_all(run_set(engine, point[rows])), weights)
    order: list[int] = rows[np.argsort(-scores, kind="stable")][:DEPTH].tolist()
    return order
