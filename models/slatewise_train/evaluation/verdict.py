"""Decide whether a ranker beats its baselines, and whether its training looks healthy: the first line of a report.

A table is judged by the difference of NDCG@10 between the ranker and the best baseline, paired by user or by slate,
with a 95 % interval:

    better    the interval is above 0
    unclear   the interval holds 0: the ranker is not clearly better. It is exported and marked.
    worse     the interval is below 0: the ranker is exported with `--force` only, and marked.

The verdict of a ranker is that of its worst table, because a reader relies on each of them.

Called by: `train_command.py`, `export.py`, `trained.py`. Calls: `metrics.py`, `offline.py`.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
import torch

from slatewise.model_schemas import Verdict
from slatewise_train.config import Config
from slatewise_train.evaluation.metrics import interval
from slatewise_train.evaluation.offline import Outcome
from slatewise_train.rankers.base import EXITS

GRADES = ("worse", "unclear", "better")  # ascending
STILL_RISING = 1.05  # by this factor between the last two validations: more epochs would help
PHRASES = {
    "better": "Beats its baselines",
    "unclear": "NOT CLEARLY BETTER than its baselines",
    "worse": "DOES NOT BEAT its baselines",
}


@dataclass(frozen=True)
class Comparison:
    """A ranker beside the best baseline in one table."""

    table: str  # described for a reader
    exit: str
    baseline: str
    means: tuple[float, float]  # NDCG@10 of the ranker and of the baseline
    difference: list[float]  # [mean, low, high]

    @property
    def grade(self) -> str:
        _, low, high = self.difference
        return "better" if low > 0 else "worse" if high < 0 else "unclear"

    def line(self) -> str:
        mean, low, high = self.difference
        return (
            f"{PHRASES[self.grade]}: NDCG@10 {self.means[0]:.4f} (exit {self.exit}) against {self.means[1]:.4f} of "
            f"{self.baseline}, difference {mean:+.4f} ({low:+.4f} to {high:+.4f}), {self.table}"
        )


def compare(gains: Mapping[str, np.ndarray], exit: str, table: str) -> Comparison | None:
    """Compare an exit with the baseline that has the highest mean. gains: NDCG@10 (n,) by exit and baseline.

    Returns `None` without cases, without this exit or without baselines.
    """
    baselines = [name for name in gains if name not in EXITS]
    if exit not in gains or not baselines or not len(gains[exit]):
        return None
    best = max(baselines, key=lambda name: gains[name].mean())
    return Comparison(
        table,
        exit,
        best,
        (float(gains[exit].mean()), float(gains[best].mean())),
        interval(gains[exit] - gains[best]),
    )


def compare_tables(outcome: Outcome, exit: str) -> list[Comparison]:
    """Compare an exit with the baselines in every table that has a result."""
    users = len(next(iter(outcome.ranks.values()), ()))
    sampled = f"{users:,} users" if users == outcome.users else f"{users:,} of {outcome.users:,} users"
    next_item = {name: outcome.gains(name) for name in outcome.ranks}
    slates: dict[str, np.ndarray] = {}
    if outcome.measurable():
        ndcg = {name: outcome.per_slate(name)[:, 0] for name in outcome.slates}
        slates = {name: values[~np.isnan(values)] for name, values in ndcg.items()}
    count = len(next(iter(slates.values()), ()))
    found = [
        compare(next_item, exit, f"next item of {sampled}"),
        compare(slates, exit, f"`{outcome.label}` in {count:,} held-out slates"),
    ]
    return [comparison for comparison in found if comparison is not None]


def judge(comparisons: Sequence[Comparison], warnings: Sequence[str] = (), reasons: Sequence[str] = ()) -> Verdict:
    """Return the verdict of the worst comparison.

    warnings: remarks on the training, which join its line; reasons: why there is no comparison.
    """
    if not comparisons:
        line = f"NOT MEASURED against baselines: {'; '.join(reasons) or 'no held-out case has a result'}"
        return Verdict(
            beats_baselines=None, grade="unknown", line="; ".join([line, *warnings]), warnings=list(warnings)
        )
    worst = min(comparisons, key=lambda comparison: GRADES.index(comparison.grade))
    return Verdict(
        beats_baselines=worst.grade == "better",
        grade=worst.grade,
        line="; ".join([worst.line(), *warnings]),
        exit=worst.exit,
        baseline=worst.baseline,
        difference=worst.difference,
        warnings=list(warnings),
    )


# Warnings about a training


def training_warnings(config: Config, log: Path, model: torch.nn.Module, joined: int | None) -> list[str]:
    """Return the suspicious facts of a training, each as a short clause.

    log: its log.csv, which may be missing; joined: the epoch after which the last epochs began, as in
    `Progress.joined`. The last epochs add the losses of other exits, so their losses are compared with each other only.
    """
    found = []
    if not all(bool(value.isfinite().all()) for value in model.parameters()):
        found.append("WARNING: the training diverged, weights are not finite: a smaller learning_rate helps")
    rows = read_log(log)
    losses = [float(row["loss"]) for row in rows]
    if not all(map(isfinite, losses)):
        return [*found, "WARNING: the training loss is not a number: a smaller learning_rate helps"]
    joins = config.train.epochs if joined is None else joined
    last = [int(row["epoch"]) > joins for row in rows]
    for phase in ([loss for loss, late in zip(losses, last, strict=True) if late is part] for part in (False, True)):
        if len(phase) > 1 and phase[-1] >= phase[0]:
            found.append(
                f"WARNING: the training loss did not fall ({phase[0]:.4g} to {phase[-1]:.4g}): "
                "another learning_rate may help"
            )
    column = next((name for name in (rows[0] if rows else {}) if name.endswith("ndcg10")), None)
    points = [float(row[column]) for row in rows if row.get(column)] if column else []
    if len(points) > 1 and points[-1] == max(points) and points[-1] > STILL_RISING * points[-2]:
        found.append(
            f"WARNING: validation NDCG@10 still rose at the end ({points[-2]:.4f} to {points[-1]:.4f}): "
            "more epochs may help"
        )
    return found


def read_log(log: Path) -> list[dict[str, str]]:
    """Read the rows of a training's log.csv; no rows if it does not exist."""
    if not log.exists():
        return []
    with log.open(newline="") as file:
        return list(csv.DictReader(file))
