"""The runs of the scaling study, and the file that keeps the result of each.

Called by: `study.py`, `report.py`, `__main__.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEEP = 8  # blocks of the runs with and without gates
SEEDS = 2

Row = dict[str, Any]  # of a finished run: the fields of `Run`, and those that `study.measure` adds
Size = tuple[int, int]  # width, blocks


@dataclass(frozen=True)
class Run:
    """One training."""

    width: int
    blocks: int
    history: int  # events that the ranker reads
    seed: int
    gates: bool = True  # of the blocks
    features: bool = True  # the columns of [items]: categorical and numeric

    @property
    def size(self) -> str:
        return f"{self.width}x{self.blocks}"

    @property
    def name(self) -> str:
        """The folder of the run."""
        parts = [self.size, f"history{self.history}"]
        parts += [] if self.gates else ["ungated"]
        parts += [] if self.features else ["featureless"]
        return "-".join([*parts, f"seed{self.seed}"])


def plan(base: Size, sizes: Sequence[Size], histories: Sequence[int], first_seed: int) -> list[Run]:
    """Return all runs of a study, each once.

    Every size has every history. With the longest history, blocks with gates and without meet at depth 8 and the width
    of `base`, and all features and no features meet at the size `base`.
    """
    seeds = range(first_seed, first_seed + SEEDS)
    longest = max(histories)
    runs = [Run(*size, history, seed) for size in sizes for history in histories for seed in seeds]
    runs += [Run(base[0], DEEP, longest, seed, gates=gates) for gates in (True, False) for seed in seeds]
    runs += [Run(*base, longest, seed, features=features) for features in (True, False) for seed in seeds]
    return list(dict.fromkeys(runs))


def read_rows(path: Path) -> list[Row]:
    """Read the finished runs. A line that a stopped process left unfinished is removed from the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def add_row(path: Path, row: Row) -> None:
    """Append a finished run, one line of JSON, and wait until the disk has it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
