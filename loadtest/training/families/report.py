"""The tables of the comparison: AUC with intervals, and observed over expected likes by group.

Called by: `__main__.py`. Calls: `runs.py`, `evaluation/metrics.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from loadtest.markdown import table
from loadtest.training.families.runs import PLAIN, SCORES, Scores, read_scores
from slatewise_train.data import Data, training_events
from slatewise_train.evaluation.metrics import auc

DRAWS = 400  # of the bootstrap
BANDS = 4  # equally many rated items in each
LEAST_OF_GROUP = 500  # rated items
LIMITS = (0.98, 1.02)  # of observed over expected


@dataclass(frozen=True)
class Rated:
    """The rated items of the held-out slates, user by user: (E,) each."""

    labels: np.ndarray
    users: np.ndarray
    items: np.ndarray


def read_runs(folder: Path, names: Sequence[str], seeds: int) -> dict[str, list[Scores]]:
    """Return the finished runs by ranker; rankers without one are left out."""
    found = {
        name: [
            read_scores(run) for seed in range(seeds) if ((run := folder / f"{name}, seed {seed}") / SCORES).exists()
        ]
        for name in names
    }
    return {name: runs for name, runs in found.items() if runs}


def weighted_auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Return the area under the ROC curve, ties counting half, of elements that count `weights` times: (E,) each."""
    _, places = np.unique(scores, return_inverse=True)
    positive = np.bincount(places, weights * labels)
    negative = np.bincount(places, weights * (1 - labels))
    below = np.cumsum(negative) - negative / 2
    return float((positive * below).sum() / (positive.sum() * negative.sum()))


def auc_interval(rated: Rated, runs: list[Scores], others: list[Scores] | None = None) -> list[float]:
    """Return mean AUC over the runs, minus that of the other runs, and its 95 % bootstrap interval.

    Each draw takes users with replacement, and seeds with replacement; runs of one seed stay together.
    """
    rng = np.random.default_rng(0)
    _, user = np.unique(rated.users, return_inverse=True)
    count = min(len(runs), len(others)) if others else len(runs)

    def value(seed: int, weights: np.ndarray) -> float:
        mine = weighted_auc(runs[seed].raw, rated.labels, weights)
        return mine - (weighted_auc(others[seed].raw, rated.labels, weights) if others else 0.0)

    mean = np.mean([value(seed, np.ones(len(user))) for seed in range(count)])
    draws = []
    for _ in range(DRAWS):
        drawn = rng.integers(0, user.max() + 1, user.max() + 1)
        weights = np.bincount(drawn, minlength=user.max() + 1)[user].astype(float)
        draws.append(np.mean([value(seed, weights) for seed in np.unique(rng.integers(0, count, count))]))
    return [float(mean), *(float(end) for end in np.quantile(draws, [0.025, 0.975]))]


def auc_in_slates(rated: Rated, scores: np.ndarray) -> float:
    """Return the mean AUC of the users whose slate has both labels."""
    edges = np.flatnonzero(np.diff(rated.users)) + 1
    parts = zip(np.split(scores, edges), np.split(rated.labels, edges), strict=True)
    return float(np.nanmean([auc(one, labels) if 0 < labels.sum() < len(labels) else np.nan for one, labels in parts]))


def quality_table(rated: Rated, runs: Mapping[str, list[Scores]], sizes: Mapping[str, int]) -> str:
    """Return the table of AUC, one row for each ranker."""
    rows = []
    for name, found in runs.items():
        cells = [name, f"{sizes[name]:,}" if name in sizes else None, len(found)]
        cells.append(spread(auc_interval(rated, found), ""))
        cells.append(f"{np.mean([auc_in_slates(rated, run.raw) for run in found]):.4f}")
        against = name != PLAIN and PLAIN in runs
        cells.append(spread(auc_interval(rated, found, runs[PLAIN]), "+") if against else None)
        cells.append(f"{np.mean([run.seconds for run in found]):.0f}")
        rows.append(cells)
    titles = ("ranker", "parameters", "seeds", "AUC", "AUC in the slate", f"AUC minus {PLAIN}'s, paired", "seconds")
    return table(titles, rows)


def spread(found: list[float], sign: str) -> str:
    mean, low, high = (f"{value:{sign}.4f}" for value in found)
    return f"{mean} ({low} to {high})"


def groups_of(data: Data, rated: Rated) -> dict[str, np.ndarray]:
    """Return the groups of the rated items: (E,) bool by name.

    Bands of the users' training events, bands of the items' training events, and genres.
    """
    _, items = training_events(data.sequences, data.split)
    events = {
        "user with {} events": data.split.train_lengths[rated.users],
        "film with {} events": np.bincount(items, minlength=len(data.catalogue.numeric))[rated.items],
    }
    groups = {"all": np.ones(len(rated.labels), bool)}
    for text, counts in events.items():
        edges = np.quantile(counts, np.linspace(0, 1, BANDS + 1)).astype(int)
        edges[-1] += 1
        for low, high in pairwise(edges):
            groups[text.format(f"{low:,} to {high - 1:,}")] = (counts >= low) & (counts < high)
    for name, values in data.catalogue.vocabulary.fields.items():
        rows = data.catalogue.field_values[name][rated.items]
        for row, value in enumerate(values, start=1):
            groups[f"{name} {value}"] = (rows == row).any(axis=1)
    return {name: chosen for name, chosen in groups.items() if chosen.sum() >= LEAST_OF_GROUP}


def calibration_table(data: Data, rated: Rated, columns: Mapping[str, list[np.ndarray]]) -> str:
    """Return observed over expected likes of each group.

    columns: probabilities (E,) of runs. Several runs of a column give the mean and the range of their ratios. The
    interval of chance alone is that of a perfectly calibrated ranker: 1 plus or minus 1.96 standard errors of the
    count. In the last row it has the number of groups within the limits.
    """
    rows = []
    inside = {name: 0 for name in columns}
    groups = groups_of(data, rated)
    for name, chosen in groups.items():
        observed = rated.labels[chosen].sum()
        p = next(iter(columns.values()))[0][chosen]
        error = 1.96 * np.sqrt((p * (1 - p)).sum()) / p.sum()
        cells: list[object] = [name, f"{chosen.sum():,}", f"{1 - error:.3f} to {1 + error:.3f}"]
        for column, runs in columns.items():
            ratios = [observed / run[chosen].sum() for run in runs]
            inside[column] += LIMITS[0] <= np.mean(ratios) <= LIMITS[1]
            ends = f" ({min(ratios):.3f} to {max(ratios):.3f})" if len(ratios) > 1 else ""
            cells.append(f"{np.mean(ratios):.3f}{ends}")
        rows.append(cells)
    chance = perfect_groups(next(iter(columns.values()))[0], list(groups.values()))
    counts = ["groups within .98 to 1.02", None, chance, *(f"{count} of {len(groups)}" for count in inside.values())]
    return table(("group", "rated items", "chance alone", *columns), [*rows, counts])


def perfect_groups(p: np.ndarray, groups: Sequence[np.ndarray]) -> str:
    """Return how many groups are within the limits if the labels are drawn from the probabilities p (E,).

    The text has the mean of the draws, and the interval of 95 % of them.
    """
    rng = np.random.default_rng(0)
    members = np.stack(groups).astype(np.float32)  # (groups, E)
    labels = (rng.random((DRAWS, len(p))) < p).astype(np.float32)
    ratios = labels @ members.T / (members @ p.astype(np.float32))  # (draws, groups)
    inside = ((ratios >= LIMITS[0]) & (ratios <= LIMITS[1])).sum(axis=1)
    low, high = np.quantile(inside, [0.025, 0.975])
    return f"{inside.mean():.1f} ({low:.0f} to {high:.0f})"
