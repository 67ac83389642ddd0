"""Compare a ranker with the baselines right after its training, on the validation users, without exporting it.

The first held-out event of each of `held_out_users` is ranked in the full catalogue by the baselines, and by the exit
`dot` of the torch model. The curves of the training show the same events. Export measures every exit on the test
events.

Called by: `train_command.py`. Calls: `baselines.py`, `held_out.py`, `verdict.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slatewise.model_schemas import Verdict
from slatewise_train.data import Data
from slatewise_train.evaluation.baselines import make_baselines
from slatewise_train.evaluation.held_out import held_out_ranks
from slatewise_train.evaluation.interactions import baseline_ranks, validation_cases
from slatewise_train.evaluation.metrics import gains, hits
from slatewise_train.evaluation.report import BASELINES_FILE
from slatewise_train.evaluation.sampling import held_out_users
from slatewise_train.evaluation.verdict import compare, judge
from slatewise_train.rankers.base import RankerModel


class TrainingReport:
    """The baselines on the validation users, and later the verdict on the trained ranker.

    Without a head of kind `next` or without validation users there are no ranks, and the verdict is "not measured".
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self.head = next((k for k, head in enumerate(data.config.heads) if head.kind == "next"), None)
        self.users = held_out_users(data)
        self.ranks: dict[str, np.ndarray] = {}
        self.left_out: dict[str, str] = {}  # reasons, by baseline
        if self.head is None or not len(self.users):
            return
        cases = validation_cases(data)
        baselines, self.left_out = make_baselines(data)
        for name, baseline in baselines.items():
            self.ranks[name] = baseline_ranks(baseline, cases, len(data.catalogue.numeric), name, listed=False)[0]

    def levels(self) -> dict[str, dict[str, float]]:
        """Return HR@10 and NDCG@10 of each baseline."""
        return {
            name: {"hr10": round(float(hits(ranks).mean()), 4), "ndcg10": round(float(gains(ranks).mean()), 4)}
            for name, ranks in self.ranks.items()
        }

    def write_levels(self, folder: Path) -> None:
        """Write the levels beside the log, for its plot. Print them, and why a baseline is left out."""
        folder.mkdir(parents=True, exist_ok=True)
        levels = self.levels()
        (folder / BASELINES_FILE).write_text(json.dumps(levels, indent=1))
        if levels:
            print(f"baselines on {len(self.users):,} validation users: {levels}", flush=True)
        for reason in self.left_out.values():
            print(f"not measured: {reason}", flush=True)

    def verdict(self, model: RankerModel, warnings: Sequence[str]) -> Verdict:
        """Compare the exit `dot` with the best baseline. warnings: of `verdict.training_warnings`."""
        if self.head is None:
            return judge([], warnings, ["without a head of kind `next` there is no next item to rank"])
        if not self.ranks:
            return judge([], warnings, ["there are no validation users (`validation_users` in [split])"])
        lengths = self.data.split.train_lengths[self.users]
        dot = held_out_ranks(model, self.data, self.users, lengths, self.head)["dot"]
        if lost := int((dot >= len(self.data.catalogue.numeric)).sum()):  # see `metrics.ranks_of`
            share = f"{lost:,} of {len(dot):,} users"
            warnings = [*warnings, f"WARNING: the scores of {share} are not finite: a smaller learning_rate helps"]
        found = compare(
            {name: gains(values) for name, values in (self.ranks | {"dot": dot}).items()},
            "dot",
            f"first held-out event of {len(dot):,} validation users",
        )
        return judge([found] if found else [], warnings)
