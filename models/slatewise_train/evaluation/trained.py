"""Compare a ranker with the baselines right after its training, on the validation users, without exporting it.

For each of at most SAMPLED_USERS validation users, the first held-out event is ranked in the full catalogue by the exit
`dot` of the torch model. Export measures every exit on the test events.

Called by: `train_command.py`. Calls: `baselines.py`, `verdict.py`, `batches.py`, and the ranker.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from slatewise.inference.arrays import FIRST_ITEM
from slatewise.schemas import Verdict
from slatewise_train.batches import make_batch, served_window_start
from slatewise_train.data import Data
from slatewise_train.evaluation.baselines import make_baselines
from slatewise_train.evaluation.cases import Case
from slatewise_train.evaluation.interactions import baseline_ranks, hidden_rows, validation_cases
from slatewise_train.evaluation.metrics import gains, hits, ranks_of
from slatewise_train.evaluation.report import BASELINES_FILE
from slatewise_train.evaluation.sampling import sample_users
from slatewise_train.evaluation.verdict import compare, judge
from slatewise_train.rankers.base import RankerModel

BATCH_EVENTS = 8_192  # padding included
BATCH_SCORES = 20_000_000


def dot_ranks(model: RankerModel, data: Data, cases: Sequence[Case], head: int) -> np.ndarray:
    """Rank the first upcoming item of each case by the exit `dot`: (n,), 0 for the best.

    Items of the history are not ranked, see `hidden_rows`. Equal scores are ranked in the order of the catalogue.
    """
    ranks = np.zeros(len(cases), np.int64)
    longest = data.config.history_length
    windows = [(case.user, served_window_start(len(case.seen), longest), len(case.seen)) for case in cases]
    model.eval()
    with torch.no_grad():
        table = model.item_table()
        vectors = table[FIRST_ITEM:].T * model.dot_scale[head]  # (d, catalogue)
        for rows in batches_of([last - first for _, first, last in windows], len(table)):
            batch = make_batch(data.sequences, [windows[row] for row in rows])
            _, users = model.encode(model.tokens(table[batch.items], batch.actions, batch.gaps))
            now = users[torch.arange(len(rows)), batch.lengths]  # (b, d) after the last event
            scores = (now @ vectors).numpy()
            targets = np.array([cases[row].upcoming[0] for row in rows])
            for mine, row in zip(scores, rows, strict=True):
                mine[hidden_rows(cases[row]) - FIRST_ITEM] = -np.inf
            ranks[rows] = ranks_of(scores, targets - FIRST_ITEM)
    return ranks


def batches_of(lengths: Sequence[int], items: int) -> list[np.ndarray]:
    """Split windows into batches of similar length, at most BATCH_EVENTS events and BATCH_SCORES scores each."""
    order = np.argsort(lengths, kind="stable")
    batches: list[list[int]] = [[]]
    for row in order.tolist():
        full = (lengths[row] + 1) * (len(batches[-1]) + 1) > BATCH_EVENTS or items * len(batches[-1]) > BATCH_SCORES
        if full and batches[-1]:
            batches.append([])
        batches[-1].append(row)
    return [np.array(batch) for batch in batches if batch]


class TrainingReport:
    """The baselines on the validation users, and later the verdict on the trained ranker.

    Without a head of kind `next` or without validation users there are no cases, and the verdict is "not measured".
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self.head = next((k for k, head in enumerate(data.config.heads) if head.kind == "next"), None)
        self.cases: list[Case] = []
        self.ranks: dict[str, np.ndarray] = {}
        if self.head is None:
            return
        self.cases = validation_cases(data, sample_users(data.split.validation_users))
        if self.cases:
            rows = len(data.catalogue.numeric)
            for name, baseline in make_baselines(data).items():
                self.ranks[name] = baseline_ranks(baseline, self.cases, rows, listed=False)[0]

    def levels(self) -> dict[str, dict[str, float]]:
        """Return HR@10 and NDCG@10 of each baseline."""
        return {
            name: {"hr10": round(float(hits(ranks).mean()), 4), "ndcg10": round(float(gains(ranks).mean()), 4)}
            for name, ranks in self.ranks.items()
        }

    def write_levels(self, folder: Path) -> None:
        """Write the levels beside the log, for its plot, and print them."""
        folder.mkdir(parents=True, exist_ok=True)
        levels = self.levels()
        (folder / BASELINES_FILE).write_text(json.dumps(levels, indent=1))
        if levels:
            print(f"baselines on {len(self.cases):,} validation users: {levels}", flush=True)

    def verdict(self, model: RankerModel, warnings: Sequence[str]) -> Verdict:
        """Compare the exit `dot` with the best baseline. warnings: of `verdict.training_warnings`."""
        ranks = dict(self.ranks)
        if self.cases and self.head is not None:
            ranks["dot"] = dot_ranks(model, self.data, self.cases, self.head)
        found = compare(
            {name: gains(values) for name, values in ranks.items()},
            "dot",
            f"first held-out event of {len(self.cases):,} validation users",
        )
        return judge([found] if found else [], warnings)
