"""The cells of a run in a file, so that a stopped run continues.

Called by: `__main__.py`. Output: run.json (what the cells belong to) and cells.jsonl in the run's folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest.commit import CHANGED
from loadtest.peers.measurements import Cell


class Kept:
    """Continues with the cells of a run with the same labels: commit, machine, contenders, requests.

    A tree with changes always begins anew, because its label does not say which changes.
    """

    def __init__(self, folder: Path, labels: dict[str, Any]) -> None:
        self.file = folder / "cells.jsonl"
        run = folder / "run.json"
        before = json.loads(run.read_text()) if run.exists() else {}
        self.date = before.pop("date", None)  # when the run began
        self.cells: list[Cell] = []
        if before == labels and not labels["commit"].endswith(CHANGED) and self.file.exists():
            self.cells = [Cell(**json.loads(line)) for line in self.file.read_text().splitlines()]
            return
        self.date = datetime.now(UTC).date().isoformat()
        folder.mkdir(parents=True, exist_ok=True)
        for path in (self.file, *folder.glob("*.log")):
            path.unlink(missing_ok=True)
        run.write_text(json.dumps(labels | {"date": self.date}))

    def has(self, **labels: Any) -> bool:
        """Whether there is a cell with these values."""
        return any(all(getattr(cell, name) == value for name, value in labels.items()) for cell in self.cells)

    def add(self, cells: Iterable[Cell]) -> None:
        """Keep cells that belong together, all or none: those of a server, or of a round.

        The new file takes the place of the old one in one step, so a run that is killed meanwhile can continue.
        """
        self.cells += cells
        complete = self.file.with_suffix(".part")
        complete.write_text("".join(f"{cell.line()}\n" for cell in self.cells))
        complete.replace(self.file)
