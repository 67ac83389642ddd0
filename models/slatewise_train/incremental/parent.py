"""Compare an update with the version that it comes from, on the new events that neither has learned from.

Both rank by their exported graphs: the last event of each user who has a new one, and the slates that end with a new
event. An update whose NDCG@10 is below that of its parent, with a 95 % interval below 0, is not published. The lists of
both versions tell the rank stability (FINEST, arXiv 2402.03481).

Called by: `update_command.py`, which hands it to `export.py`. Calls: `stability.py`, `evaluation/offline.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slatewise.bundle.manifest import Manifest, Update
from slatewise.inference.engine import Engine
from slatewise_train.data import Data
from slatewise_train.evaluation.metrics import interval
from slatewise_train.evaluation.offline import difference, run_cases
from slatewise_train.incremental.stability import overlap, rank_biased_overlap


@dataclass(frozen=True)
class Parent:
    """The version that an update comes from, and the new events."""

    folder: Path
    manifest: Manifest
    items: np.ndarray  # (rows, d) its item table, with vectors of new items that follow from their fields
    data: Data  # the held-out events are new ones
    events: int  # new events that the update has learned from
    trained_until: float | None  # time of the newest event, unix seconds
    space: str | None  # of the parent's meta-embeddings, if the update keeps it

    def compare(self, engine: Engine, meta: np.ndarray, exit: str, most_users: int | None) -> dict[str, Any]:
        """Return the row `update` of report.json. engine, meta, exit: of the update, and its default exit."""
        new = run_cases(engine, self.data, meta, most_users, baselines=False)
        path = self.folder / "default_meta.npy"
        own_meta = np.load(path) if path.exists() else meta
        actions = self.data.sequences.actions
        known = np.where(actions <= len(self.manifest.actions), actions, 0)
        data = dataclasses.replace(self.data, sequences=dataclasses.replace(self.data.sequences, actions=known))
        graphs = Engine(self.folder / "variants" / "fp32", self.items, self.manifest.exits)
        old = run_cases(graphs, data, own_meta, most_users, baselines=False)
        shared = [name for name in self.manifest.exits if name in new.ranks and len(new.ranks[name])]
        row: dict[str, Any] = {
            "parent": self.manifest.version,
            "events": self.events,
            "trained_until": self.trained_until,
            "users": len(next(iter(new.ranks.values()), ())),
            "difference": difference(new, old, exit) if shared or new.slates else {},
            "overlap10": {name: interval(overlap(new.best[name], old.best[name])) for name in shared},
            "rbo": {name: interval(rank_biased_overlap(new.best[name], old.best[name])) for name in shared},
        }
        return row | {"exit": exit, "line": sentence(row, exit)}


def is_worse(row: dict[str, Any]) -> bool:
    """Whether NDCG@10 of a row of `Parent.compare` is below that of the parent, with the whole interval."""
    found = (row["difference"].get(name) for name in ("leave_one_out_ndcg10", "slate_ndcg10"))
    return any(values is not None and values[2] < 0 for values in found)


def sentence(row: dict[str, Any], exit: str) -> str:
    """Return a sentence about a row for people."""
    start = f"Update of version {row['parent']} with {row['events']:,} new events"
    if exit not in row["overlap10"]:
        return f"{start}; no new event is held out to compare both versions."
    found = row["difference"].get("leave_one_out_ndcg10")
    gain = "" if found is None else f"NDCG@10 {found[0]:+.4f} ({found[1]:+.4f} to {found[2]:+.4f}), "
    same = f"overlap of the ten best {row['overlap10'][exit][0]:.2f}, rank-biased overlap {row['rbo'][exit][0]:.2f}"
    return f"{start}, against it on the last event of {row['users']:,} users by the exit `{exit}`: {gain}{same}."


def manifest_row(row: dict[str, Any]) -> Update:
    """Return the member `update` of the manifest."""
    exit = row["exit"]
    return Update(
        parent=row["parent"],
        events=row["events"],
        trained_until=row["trained_until"],
        overlap10=row["overlap10"].get(exit, [None])[0],
        rank_biased_overlap=row["rbo"].get(exit, [None])[0],
        ndcg10_difference=row["difference"].get("leave_one_out_ndcg10"),
    )
