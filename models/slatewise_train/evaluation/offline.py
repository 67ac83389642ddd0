"""How well a variant ranks, through its exported graphs: the rows of `report.json`.

(a) leave-one-out: a user's last event among the full catalogue, history removed; head of kind `next`
(b) slates: the held-out users' next rated items, no sampled negatives; heads of kind `label`
(c) the exit `set` against `point`, paired by user
Before: `export.py` has made the graphs. After: `report.json`, its picture and the README's table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from slatewise.bundle.features import gap_buckets, request_context, window_start
from slatewise.inference.arrays import FIRST_ITEM, Candidates, History
from slatewise.inference.engine import Engine
from slatewise_train.data import training_events
from slatewise_train.rankers.base import EXITS
from slatewise_train.train import Data

RERANKED = 100  # in (a), the exit `set` orders the best of `point`: a slate of the whole catalogue is none
BOOTSTRAPS = 1_000
BINS = 15
DENSE_LIMIT = 1_000_000_000  # entries


@dataclass(frozen=True)
class Case:
    """One request of the evaluation."""

    user: int
    history: History
    seen: np.ndarray  # item rows of all events before, also those that are not read
    time: float  # of the last event before
    upcoming: np.ndarray  # item rows of the events to predict
    labels: np.ndarray  # (upcoming, heads)


def make_case(data: Data, user: int, length: int, upcoming: int) -> Case:
    """The user's first `length` events as history, the next ones to predict."""
    s = data.sequences
    start = int(data.sequences.offsets[user])
    first = start + window_start(0, length, data.config.history_length)
    read = slice(first, start + length)
    ahead = slice(start + length, start + length + upcoming)
    history = History(s.items[read], s.actions[read], gap_buckets(s.timestamps[read]))
    return Case(
        user,
        history,
        s.items[start : start + length],
        float(s.timestamps[start + length - 1]),
        s.items[ahead],
        s.labels[ahead],
    )


def next_cases(data: Data, users: np.ndarray) -> Iterator[Case]:
    """One a user who has a test event and something before it."""
    for user in users:
        if length := int(data.split.test_lengths[user]):
            yield make_case(data, int(user), length, 1)


def slate_cases(data: Data, users: np.ndarray) -> list[Case]:
    """What follows a user's training events is their held-out slate."""
    return [make_case(data, int(u), int(data.split.train_lengths[u]), data.config.slate_size) for u in users]


def candidates_of(engine: Engine, data: Data, rows: np.ndarray, time: float) -> Candidates:
    return Candidates(engine.items.take(rows, axis=0), data.catalogue.numeric[rows], request_context(time)[None])


def rank_of(scores: np.ndarray, target: int) -> int:
    """0 for the best; ties by input order."""
    return int((scores > scores[target]).sum() + (scores[:target] == scores[target]).sum())


def interval(values: np.ndarray, seed: int = 0, digits: int = 4) -> list[float]:
    """[mean, low, high]: a bootstrap over users, 95 %."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(BOOTSTRAPS)]
    return [round(float(v), digits) for v in (values.mean(), *np.quantile(means, [0.025, 0.975]))]


Baselines = dict[str, Callable[[Case], np.ndarray]]


def make_baselines(data: Data) -> Baselines:
    """Popularity and item-kNN; the latter only where its dense matrices fit into memory."""
    rows = len(data.sequences)
    columns = len(data.catalogue.numeric)
    if (rows + columns) * columns > DENSE_LIMIT:
        print(f"item-kNN is left out: {rows} users and {columns} items are too many for its dense matrices")
        return {"popularity": popularity(data)}
    return {"popularity": popularity(data), "item-kNN": item_knn(data)}


def leave_one_out(
    engine: Engine, data: Data, head: int, meta: np.ndarray, users: np.ndarray, baselines: Baselines
) -> dict[str, np.ndarray]:
    """Rank of each user's last event, by exit and baseline."""
    catalogue = np.arange(FIRST_ITEM, len(engine.items))
    exits = [name for name in ("dot", "point", "set") if name in engine.sessions]
    ranks: dict[str, list[int]] = {name: [] for name in (*exits, *baselines)}
    for case in tqdm(list(next_cases(data, users)), desc="leave-one-out", mininterval=2):
        target = int(case.upcoming[0]) - FIRST_ITEM
        state = engine.extend(engine.start, case.history)
        candidates = candidates_of(engine, data, catalogue, case.time)
        seen = case.seen[case.seen != case.upcoming[0]] - FIRST_ITEM  # who comes back to an item may be right
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


def popularity(data: Data) -> Callable[[Case], np.ndarray]:
    """(rows,) training events of each item."""
    counts = np.bincount(training_events(data.sequences, data.split)[1], minlength=len(data.catalogue.numeric)).astype(
        np.float64
    )
    return lambda case: counts


def item_knn(data: Data, neighbours: int = 100) -> Callable[[Case], np.ndarray]:
    """Sum over the history of the cosine between items' users (training events), the 100 nearest of each item."""
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


def ndcg(scores: np.ndarray, labels: np.ndarray, depth: int = 10) -> float:
    """Binary gains; NaN where no label or every label is positive."""
    if not 0 < labels.sum() < len(labels):
        return float("nan")
    discount = 1 / np.log2(np.arange(2, len(labels) + 2))
    discount[depth:] = 0
    return float(
        (labels[np.argsort(-scores, kind="stable")] * discount).sum() / (np.sort(labels)[::-1] * discount).sum()
    )


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, ties counting half; NaN where a class is missing."""
    positive = np.sort(scores[labels == 1])
    negative = scores[labels == 0]
    if not len(positive) or not len(negative):
        return float("nan")
    below = (np.searchsorted(positive, negative, "left") + np.searchsorted(positive, negative, "right")) / 2
    return float(1 - below.mean() / len(positive))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error over 15 bins of equal size."""
    order = np.array_split(np.argsort(probabilities, kind="stable"), BINS)
    return float(sum(abs(probabilities[b].mean() - labels[b].mean()) * len(b) for b in order if len(b)) / len(labels))


def slates(
    engine: Engine, data: Data, head: int, meta: np.ndarray, baselines: Baselines
) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """(scores, labels) of every held-out slate, by exit and baseline."""
    exits = [name for name in ("dot", "point", "set") if name in engine.sessions]
    result: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in (*exits, *baselines)}
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
    """What one variant did with each case, by exit and baseline."""

    ranks: dict[str, np.ndarray]  # (users,) of the last event among the catalogue; empty without a head of kind `next`
    slates: dict[
        str, list[tuple[np.ndarray, np.ndarray]]
    ]  # (scores, labels) of each held-out slate; empty without a head of kind `label`
    label: str | None  # that head's name

    def gains(self, name: str) -> np.ndarray:
        """(users,) NDCG@10 of one relevant item."""
        return np.where(self.ranks[name] < 10, 1 / np.log2(self.ranks[name] + 2), 0.0)

    def per_slate(self, name: str) -> np.ndarray:
        """(slates, 2) NDCG@10 and AUC, NaN where a slate has one label only."""
        return np.array([[ndcg(*case), auc(*case)] for case in self.slates[name]])


def run_cases(
    engine: Engine, data: Data, meta: np.ndarray, most_users: int | None = None, *, baselines: bool = True
) -> Outcome:
    """`most_users` bounds (a), for tests."""
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


def tabulate(outcome: Outcome) -> dict:
    """The tables (a), (b) and (c)."""
    report: dict = {"leave_one_out": {}, "slates": {}, "set_against_point": {}, "label": outcome.label}
    for name, ranks in outcome.ranks.items():
        row = {
            "users": len(ranks),
            "hr10": interval((ranks < 10).astype(float)),
            "ndcg10": interval(outcome.gains(name)),
        }
        report["leave_one_out"][name] = row
    for name, cases in outcome.slates.items():
        scores, labels = (np.concatenate(column) for column in zip(*cases, strict=True))
        per_slate = outcome.per_slate(name)
        rated = ~np.isnan(per_slate[:, 0])
        row = {
            "slates": int(rated.sum()),
            "ndcg10": interval(per_slate[rated, 0]),
            "auc_in_slate": interval(per_slate[rated, 1]),
        }
        row["auc"] = round(auc(scores, labels), 4)
        if name in EXITS:
            row["calibration_error"] = round(calibration_error(scores, labels), 4)
        report["slates"][name] = row
    report["set_against_point"] = (
        {} if "set" not in (*outcome.ranks, *outcome.slates) else difference(outcome, outcome, "set", "point")
    )
    return report


def difference(one: Outcome, other: Outcome, exit: str, other_exit: str | None = None) -> dict[str, list[float]]:
    """Paired by user and by slate: one exit of an outcome minus the same, or another, of an outcome of the same cases."""
    against = other_exit or exit
    found = {}
    if exit in one.ranks:
        found["leave_one_out_hr10"] = interval((one.ranks[exit] < 10).astype(float) - (other.ranks[against] < 10))
        found["leave_one_out_ndcg10"] = interval(one.gains(exit) - other.gains(against))
    if exit in one.slates:
        per_slate = one.per_slate(exit) - other.per_slate(against)
        rated = ~np.isnan(per_slate[:, 0])
        found |= {"slate_ndcg10": interval(per_slate[rated, 0]), "slate_auc": interval(per_slate[rated, 1])}
    return found


def evaluate(engine: Engine, data: Data, meta: np.ndarray, most_users: int | None = None) -> dict:
    """The tables of one variant, baselines beside it."""
    return tabulate(run_cases(engine, data, meta, most_users))
