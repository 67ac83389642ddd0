"""Vectors of items that are newer than a ranker, adapted to the items' first events.

Called by: `ranker.py`, which gives them to unknown candidates, and `store/adapted_items.py`, which reads and writes
them. Calls: no module of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np

from slatewise.inference.arrays import Float32, Int64


@dataclass(frozen=True)
class AdaptedItems:
    """One vector for each item, as rows of an item table have it: fields included."""

    ids: list[str]
    vectors: Float32  # (n, d)
    events: Int64  # (n,) of each item, that its vector was adapted to
    created_at: float  # unix seconds
    rows: dict[str, int] = field(init=False, repr=False, compare=False)  # id -> row of `vectors`

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", dict(zip(self.ids, range(len(self.ids)), strict=True)))

    def find(self, names: Sequence[str]) -> Int64:
        """Return the rows of the names: (n,), -1 for an item without a vector. Loops in C."""
        return np.fromiter(map(self.rows.get, names, repeat(-1)), np.int64, len(names))
