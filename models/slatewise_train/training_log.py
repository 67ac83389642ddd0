"""The log of a training: log.csv with a row for each epoch, and log.png with its curves and the baselines.

A checkpoint has the rows too. A resumed training writes them anew, so that the log has each epoch of the checkpoint
once, whenever the process was stopped.

Called by: `train.py`, `train_command.py`. Calls: `evaluation/report.py`.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from slatewise_train.evaluation.report import plot_training

LOG = "log.csv"
COLUMNS = ["epoch", "seconds", "loss", "dot_hr10", "dot_ndcg10", "point_hr10", "point_ndcg10"]

Row = Mapping[str, float | str]  # column -> value; validations have the last four columns


def write_log(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows of all epochs to a temporary file, rename it to `path`, and plot them."""
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)
    plot_training(path)


def rows_up_to(path: Path, epoch: int, rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the epochs 1 to `epoch`: those of a checkpoint, and others from a log, if there is one."""
    found: dict[int, Row] = {}
    if path.exists():
        with path.open(newline="") as file:
            found = {int(row["epoch"]): row for row in csv.DictReader(file)}
    found |= {int(row["epoch"]): row for row in rows}
    return [found[number] for number in sorted(found) if number <= epoch]


def described(row: Row, left: str) -> str:
    """Return a row as a line. left: what follows it, for example "about 12 min left"."""
    values = [f"{name} {row[name]}" for name in COLUMNS[2:] if name in row]
    line = f"epoch {row['epoch']}: {', '.join(values)}, {row['seconds']} s"
    line = line.replace("_hr10", " HR@10").replace("_ndcg10", " NDCG@10")
    return f"{line}; {left}" if left else line
