"""Measure the ranking quality of a variant through its exported graphs. The results are the tables of `report.json`:

(a) leave-one-out: for each user, the rank of the last event's item among all items that are new to the user. This table
    needs a head of kind `next`.
(b) slates: the ranking of the next events of held-out users. This table needs a head of kind `label`.
(c) the difference between the exits `set` and `point`, paired by user.

Called by: `export.py`, `compression/`, `calibration.py`, `demo/show.py`. Calls: `inference/engine.py`, `cases.py`,
`metrics.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from slatewise.inference.arrays import FIRST_ITEM
from slatewise.inference.engine import Engine
from slatewise_train.data import Data, training_events
from slatewise_train.evaluation.cases import Case, candidates_of, next_cases, slate_cases
from slatewise_train.evaluation.metrics import auc, calibration_error, gains, hits, interval, ndcg, rank_of
from slatewise_train.rankers.base import EXITS

RERANKED = 100  # in (a) the exit `set` orders the best of `point`, because a catalogue is too large for one slate
NEIGHBOURS = 100  # of an item, for item-kNN
DENSE_LIMIT = 1_000_000_000  # numbers in the dense matrices of item-kNN

Baseline = Callable[["Case"], np.ndarray]  # a case -> scores (rows of the item table,)
Baselines = dict[str, Baseline]


def exits_of(engine: Engine) -> list[str]:
    return [exit for exit in EXITS if exit in engine.sessions]


def make_baselines(data: Data) -> Baselines:
    """Build the baselines: popularity, and item-kNN if its dense matrices are small enough for memory."""
    rows = len(data.sequences)
    columns = len(data.catalogue.numeric)
    if (rows + columns) * columns > DENSE_LIMIT:
        print(f"item-kNN is left out: {rows} users and {columns} items are too many for its dense matrices")
        return {"popularity": popularity(data)}
    return {"popularity": popularity(data), "item-kNN": item_knn(data)}


def popularity(data: Data) -> Baseline:
    """Build a baseline that scores each item by its number of training events."""
    items = training_events(data.sequences, data.split)[1]
    counts = np.bincount(items, minlength=len(data.catalogue.numeric)).astype(np.float64)
    return lambda case: counts


def item_knn(data: Data, neighbours: int = NEIGHBOURS) -> Baseline:
    """Build a baseline that scores an item by the sum of its similarities to the items of the history.

    The similarity of two items is the cosine of their users in the training events. It is 0 beyond the nearest
    neighbours.
    """
    users, items = training_events(data.sequences, data.split)
    matrix = np.zeros((len(data.sequences), len(data.catalogue.numeric)), np.float32)
    matrix[users, items] = 1
    norms = np.sqrt(matrix.sum(axis=0)).clip(min=1)
    similar = (matrix.T @ matrix) / norms[:, None] / norms
    np.fill_diagonal(similar, 0)
    if len(similar) > neighbours:
        floor = np.partition(similar, -neighbours, axis=1)[:, -neighbours]
        similar[similar < floor[:, None]] = 0
    return lambda case: similar[case.seen].sum(axis=0)


def leave_one_out(
    engine: Engine, data: Data, head: int, meta: np.ndarray, users: np.ndarray, baselines: Baselines
) -> dict[str, np.ndarray]:
    """Rank each user's last event. Returns ranks (users,), 0 for the best, by exit and baseline.

    head: the output to rank by; meta: (M,) the meta-embedding of every request.
    """
    catalogue = np.arange(FIRST_ITEM, len(engine.items))
    exits = exits_of(engine)
    ranks: dict[str, list[int]] = {name: [] for name in (*exits, *baselines)}
    for case in tqdm(list(next_cases(data, users)), desc="leave-one-out", mininterval=2):
        target = int(case.upcoming[0]) - FIRST_ITEM
        state = engine.extend(engine.start, case.history)
        candidates = candidates_of(engine, data, catalogue, case.time)
        seen = case.seen[case.seen != case.upcoming[0]] - FIRST_ITEM  # a repeated item stays in the catalogue
        scores = {"dot": engine.dot(candidates, state)[:, head].copy()}
        scores["point"] = engine.point(candidates, meta, state).probabilities[:, head].copy()
        for name, baseline in baselines.items():
            scores[name] = baseline(case)[FIRST_ITEM:].copy()
        for name, values in scores.items():
            values[seen] = -np.inf
            ranks[name].append(rank_of(values, target))
        if "set" in exits:
            best = np.argsort(-scores["point"], kind="stable")[:RERANKED]
            best = best[~np.isin(best, seen)]
            place = np.flatnonzero(best == target)
            if not len(place):
                ranks["set"].append(ranks["point"][-1])
                continue
            slate = engine.point(candidates_of(engine, data, best + FIRST_ITEM, case.time), meta, state)
            ranks["set"].append(rank_of(engine.set(slate)[:, head], int(place[0])))
    return {name: np.array(found) for name, found in ranks.items()}


ScoredSlates = list[tuple[np.ndarray, np.ndarray]]  # scores and labels, (n,) each


def slates(engine: Engine, data: Data, head: int, meta: np.ndarray, baselines: Baselines) -> dict[str, ScoredSlates]:
    """Return scores and known labels of every held-out slate, by exit and baseline. head, meta: see `leave_one_out`."""
    exits = exits_of(engine)
    result: dict[str, ScoredSlates] = {name: [] for name in (*exits, *baselines)}
    for case in tqdm(slate_cases(data, data.split.slate_users), desc="slates", mininterval=2):
        labels = case.labels[:, head]
        known = ~np.isnan(labels)
        candidates = candidates_of(engine, data, case.upcoming, case.time)
        for exit in exits:
            result[exit].append((engine.score(case.history, candidates, meta, exit)[known, head], labels[known]))
        for name, baseline in baselines.items():
            result[name].append((baseline(case)[case.upcoming][known], labels[known]))
    return result


@dataclass(frozen=True)
class Outcome:
    """The results of one variant for each case, by exit and baseline."""

    ranks: dict[str, np.ndarray]  # of `leave_one_out`; empty without a head of kind `next`
    slates: dict[str, ScoredSlates]  # of `slates`; empty without a head of kind `label`
    label: str | None  # the name of that head

    def gains(self, name: str) -> np.ndarray:
        """Return NDCG@10 of each user: (users,)."""
        return gains(self.ranks[name])

    def per_slate(self, name: str) -> np.ndarray:
        """Return NDCG@10 and AUC of each slate: (slates, 2). NaN if all labels of a slate are equal."""
        return np.array([[ndcg(*case), auc(*case)] for case in self.slates[name]])


def run_cases(
    engine: Engine, data: Data, meta: np.ndarray, most_users: int | None = None, *, baselines: bool = True
) -> Outcome:
    """Run all cases of the data. most_users limits leave-one-out to the first users, for tests."""
    heads = data.config.heads
    following = next((k for k, head in enumerate(heads) if head.kind == "next"), None)
    labelled = next((k for k, head in enumerate(heads) if head.kind == "label"), None)
    others = make_baselines(data) if baselines else {}
    users = np.arange(len(data.sequences))[:most_users]
    return Outcome(
        {} if following is None else leave_one_out(engine, data, following, meta, users, others),
        slates(engine, data, labelled, meta, others) if labelled is not None and len(data.split.slate_users) else {},
        None if labelled is None else heads[labelled].name,
    )


def tabulate(outcome: Outcome) -> dict[str, Any]:
    """Return the tables (a), (b) and (c) of the report. Metrics are [mean, low, high] of `metrics.interval`."""
    report: dict[str, Any] = {"leave_one_out": {}, "slates": {}, "set_against_point": {}, "label": outcome.label}
    for name, ranks in outcome.ranks.items():
        report["leave_one_out"][name] = {
            "users": len(ranks),
            "hr10": interval(hits(ranks)),
            "ndcg10": interval(outcome.gains(name)),
        }
    for name, cases in outcome.slates.items():
        scores, labels = (np.concatenate(column) for column in zip(*cases, strict=True))
        per_slate = outcome.per_slate(name)
        rated = ~np.isnan(per_slate[:, 0])
        row = {
            "slates": int(rated.sum()),
            "ndcg10": interval(per_slate[rated, 0]),
            "auc_in_slate": interval(per_slate[rated, 1]),
            "auc": round(auc(scores, labels), 4),
        }
        if name in EXITS:
            row["calibration_error"] = round(calibration_error(scores, labels), 4)
        report["slates"][name] = row
    if "set" in (*outcome.ranks, *outcome.slates):
        report["set_against_point"] = difference(outcome, outcome, "set", "point")
    return report


def difference(one: Outcome, other: Outcome, exit: str, other_exit: str | None = None) -> dict[str, list[float]]:
    """Return the metrics of an exit minus those of another outcome of the same cases, as [mean, low, high].

    Differences are paired by user and by slate. other_exit: the exit of the other outcome; None: the same exit.
    """
    against = other_exit or exit
    found = {}
    if exit in one.ranks:
        found["leave_one_out_hr10"] = interval(hits(one.ranks[exit]) - hits(other.ranks[against]))
        found["leave_one_out_ndcg10"] = interval(one.gains(exit) - other.gains(against))
    if exit in one.slates:
        per_slate = one.per_slate(exit) - other.per_slate(against)
        rated = ~np.isnan(per_slate[:, 0])
        found |= {"slate_ndcg10": interval(per_slate[rated, 0]), "slate_auc": interval(per_slate[rated, 1])}
    return found


def evaluate(engine: Engine, data: Data, meta: np.ndarray, most_users: int | None = None) -> dict[str, Any]:
    """Return the tables of one variant and of the baselines."""
    return tabulate(run_cases(engine, data, meta, most_users))
