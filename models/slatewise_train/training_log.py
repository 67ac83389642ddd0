"""The log of a training: log.csv with a row for each epoch, and log.png with its curves and the baselines.

Called by: `train.py`, `train_command.py`, `search.py`. Calls: `evaluation/report.py`.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from slatewise_train.evaluation.report import plot_training

LOG = "log.csv"
COLUMNS = ["epoch", "seconds", "loss", "dot_hr10", "dot_ndcg10", "point_hr10", "point_ndcg10"]

Row = Mapping[str, float]


def add_row(path: Path, *rows: Row) -> None:
    """Append a row or several ones to a log, with the header before the first one, and plot the log."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)
    plot_training(path)
