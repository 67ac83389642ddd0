"""The state of a hyper-parameter search, which `FOLDER/search/search.json` has.

Called by: `search.py`. Calls: `search_space.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slatewise_train.search_space import SPACE, Values


@dataclass
class Candidate:
    """The values that a candidate changes, and the rows of its log."""

    values: Values
    rows: list[dict[str, Any]] = field(default_factory=list)
    diverged: bool = False
    stopped: bool = False  # without improvement for `patience` validations: it would begin its last epochs now

    @property
    def reached(self) -> float:
        """Epochs after which its score is known; a candidate that ended has a score for any number."""
        return math.inf if self.diverged or self.stopped else len(self.rows)

    def score(self, epochs: float) -> float:
        """Return the best NDCG@10 of the first epochs; minus infinity if it diverged in them."""
        found = [row["dot_ndcg10"] for row in self.rows if row["epoch"] <= epochs and "dot_ndcg10" in row]
        return -math.inf if self.failed(epochs) else max(found, default=-math.inf)

    def failed(self, epochs: float) -> bool:
        """Return whether it diverged in the first epochs."""
        return self.diverged and len(self.rows) <= epochs


@dataclass
class State:
    """The content of `search.json`."""

    identity: str
    seconds: float  # the budget
    spent: float = 0.0  # seconds until the state was saved; an epoch that a stop lost counts too
    rungs: list[int] = field(default_factory=list)  # planned after the first epochs, which tell their time
    planned: int = 0  # likely number of candidates without the defaults
    closed: bool = False  # the first rung takes no more candidates
    candidates: list[Candidate] = field(default_factory=list)
    chosen: Values | None = None  # the result of a finished search

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.part")
        unfinished.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        os.replace(unfinished, path)


def read_state(folder: Path) -> State | None:
    """Read the search in the folder of a training; `None` without one. Raises ValueError for a damaged file."""
    path = folder / "search" / "search.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        state = State(**found | {"candidates": [Candidate(**one) for one in found["candidates"]]})
        for values in [state.chosen or {}, *(candidate.values for candidate in state.candidates)]:
            if unknown := dict(values).keys() - SPACE.keys():
                raise ValueError(f"unknown key {min(unknown)}")
        return state
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged, remove {path.parent}: {error}") from None
