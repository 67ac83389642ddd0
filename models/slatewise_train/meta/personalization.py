"""Measure the benefit of meta-embeddings for users that were not trained on.

    python -m slatewise_train.meta.personalization models/movielens.toml

The experiment trains a ranker and a meta block without the held-out users (`[personalization]` in the TOML). You can
stop it at any time; the same command continues. It then takes the first 5, 10 or 20 events of each held-out user, or
all events but the last ones if the user has 50 or more, and predicts the events after them. It repeats the prediction
with several meta-embeddings, called arms:

    adapted      adapted to the newest events by the meta block
    default      the default vector
    own vector   fitted to the same events directly
    nothing      a vector of zeros

The adapted vector is measured in float16 and int8 too. In every arm the ranker reads the whole history.

Writes report.json, report.md and report.png into `build/personalization/NAME/`.

Called by: the command line. Calls: `loading.py`, `train.py`, `limaml.py`, `tasks.py`, `evaluation/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from slatewise.cli import run_main
from slatewise.inference.arrays import FIRST_ITEM
from slatewise.store.codec import pack_many, unpack
from slatewise_train.batches import make_batch, newest_window_start
from slatewise_train.config import Config, read_config
from slatewise_train.data import Data
from slatewise_train.evaluation.metrics import gains, interval, ndcg, ranks_of
from slatewise_train.evaluation.report import personalization_table, plot_personalization
from slatewise_train.loading import load_for_training
from slatewise_train.meta.limaml import MetaLearner, MetaTrainer
from slatewise_train.meta.tasks import MetaCase, RankerTables, Tasks, event_losses, make_tasks, point_with
from slatewise_train.rankers.base import RankerModel
from slatewise_train.slates import Slates, read_slates
from slatewise_train.train import train

LENGTHS = (5, 10, 20, 50)  # events; the last one stands for that many and more
BATCH = 32  # users
FITS = [(rate, steps) for rate in (0.01, 0.03, 0.1) for steps in (3, 10, 30)]  # tried for the directly fitted vector
FLIPS = 10_000


@dataclass(frozen=True)
class Cases:
    """Users whose history has the same number of events, or at least LENGTHS[-1] events."""

    length: int
    cases: list[MetaCase]

    def batches(self) -> list[list[MetaCase]]:
        """Return batches of cases with similar length."""
        ordered = sorted(self.cases, key=lambda case: case[1])
        return [ordered[k : k + BATCH] for k in range(0, len(ordered), BATCH)]


def cases_of(data: Data, users: np.ndarray, length: int, query: int) -> Cases:
    """Return the users with enough events for a history of this length and the query after it.

    The history is the first `length` events. For the largest length it is all events except those of the query.
    """
    events = np.diff(data.sequences.offsets)
    now = events - query if length == LENGTHS[-1] else np.full(len(events), length)
    enough = [user for user in users if now[user] >= length and events[user] >= now[user] + query]
    return Cases(length, [(int(user), int(now[user])) for user in enough])


def fit_vectors(ranker: RankerModel, kinds: list[str], support: Tasks, rate: float, steps: int, most: int) -> Tensor:
    """Fit a vector for each user (U, M) by Adam, with the loss of the inner loop.

    rate and steps: of Adam; most: the largest possible number of events, as in `MetaLearner.support_loss`.
    """
    *inputs, real = support.tensors()
    vectors = ranker.default_meta.detach().repeat(len(real), 1).requires_grad_(True)
    optimizer = torch.optim.Adam([vectors], lr=rate)
    for _ in range(steps):
        loss = (event_losses(ranker, kinds, vectors, *inputs) * real).sum() / most
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vectors.detach()


def as_stored(vectors: Tensor, dtype: str) -> Tensor:
    """Return the vectors (U, M) after a round trip through the store's format."""
    values = pack_many(vectors.numpy(), 1, 0.0, dtype)
    return torch.from_numpy(np.stack([unpack(value, vectors.shape[1])[0] for value in values]))


@dataclass(frozen=True)
class NextEvents:
    """The next event of each of U users, among all C items of the catalogue, without a meta-embedding."""

    base: Tensor  # (U, C, d) hidden states for a meta-embedding of zero
    dot: Tensor  # (U, C, heads) logits of the exit `dot`
    target: Tensor  # (U,) the event's place in the catalogue
    seen: list[np.ndarray]  # for each user, the places in the catalogue of the items of earlier events


@torch.no_grad()
def next_events(tables: RankerTables, data: Data, cases: list[MetaCase]) -> NextEvents:
    """Compute the next event of each case. Every case must have one."""
    longest = data.config.history_length
    windows = [(user, newest_window_start(now, longest), now) for user, now in cases]
    batch = make_batch(data.sequences, windows)
    ranker = tables.ranker
    history, users = ranker.encode(ranker.tokens(tables.items[batch.items], batch.actions, batch.gaps))
    items = torch.arange(FIRST_ITEM, len(tables.items)).expand(len(cases), 1, -1)
    unused = torch.zeros(len(cases), 1, 1)
    context = batch.contexts[torch.arange(len(cases)), batch.lengths][:, None]
    slates = Slates(
        batch.lengths[:, None], items, tables.numeric[items], context, unused > 0, unused[..., None], unused
    )
    no_meta = torch.zeros(len(cases), 1, ranker.meta_size)
    dot, base = read_slates(ranker, slates, history, users, tables.items[items], no_meta)
    rows = data.sequences.items - FIRST_ITEM
    starts = [int(data.sequences.offsets[user]) for user, _ in cases]
    ends = [start + now for start, (_, now) in zip(starts, cases, strict=True)]
    target = torch.tensor([int(rows[end]) for end in ends])
    return NextEvents(base, dot, target, [rows[start:end] for start, end in zip(starts, ends, strict=True)])


def next_gains(ranker: RankerModel, head: int, events: NextEvents, vectors: Tensor) -> np.ndarray:
    """Return NDCG@10 (U,) of the next event in the full catalogue, without the items met before. vectors: (U, M)."""
    scores = point_with(ranker, vectors, events.base[:, None], events.dot[:, None])[:, 0, :, head].numpy()
    targets = events.target.numpy()
    mine = scores[np.arange(len(scores)), targets]
    for row, seen in zip(scores, events.seen, strict=True):
        row[seen] = -np.inf
    scores[np.arange(len(scores)), targets] = mine
    return gains(ranks_of(scores, targets))


def sign_flip(difference: np.ndarray) -> float:
    """Return the two-sided p value of a paired permutation test on differences (n,).

    It is the share of random signs whose mean is at least as large as the observed mean.
    """
    rng = np.random.default_rng(0)
    observed = abs(difference.mean())
    means = np.array([abs((rng.choice((-1.0, 1.0), len(difference)) * difference).mean()) for _ in range(FLIPS)])
    return float((1 + (means >= observed).sum()) / (1 + FLIPS))


class Comparison:
    """Compares the arms (see above) on users, for one length of history at a time."""

    def __init__(self, data: Data, ranker: RankerModel, learner: MetaLearner) -> None:
        self.data = data
        self.ranker = ranker
        self.learner = learner
        self.config = learner.config
        self.kinds = [head.kind for head in data.config.heads]
        self.tables = RankerTables(ranker, ranker.item_table(), torch.from_numpy(data.catalogue.numeric))

    def tasks(self, cases: list[MetaCase]) -> tuple[Tasks, Tasks]:
        """Return the support and the query of each case."""
        c = self.config
        both = make_tasks(self.tables, self.data.sequences, cases, self.data.config.history_length, c)
        return both.columns(0, c.support), both.columns(c.support, c.support + c.query)

    def query_losses(self, query: Tasks, vectors: Tensor) -> np.ndarray:
        """Return the mean loss of each user's query events: (U,). vectors: (U, M)."""
        *inputs, real = query.tensors()
        with torch.no_grad():
            losses = event_losses(self.ranker, self.kinds, vectors, *inputs) * real
        means: np.ndarray = (losses.sum(1) / real.sum(1).clamp(min=1)).numpy()
        return means

    def like_gains(self, query: Tasks, vectors: Tensor) -> np.ndarray:
        """Return NDCG@10 (U,) of the query's events by the first head of kind `label`. NaN if all labels are equal."""
        head = self.kinds.index("label")
        with torch.no_grad():
            logits = point_with(self.ranker, vectors, query.base, query.dot)
        scores = logits[:, :, 0, head].numpy()
        labels = query.labels[..., head].numpy()
        real = query.real.numpy() > 0
        rows = [r & ~np.isnan(y) for r, y in zip(real, labels, strict=True)]
        return np.array([ndcg(s[r], y[r]) for s, y, r in zip(scores, labels, rows, strict=True)])

    def best_fit(self, users: np.ndarray) -> tuple[float, int]:
        """Return the rate and steps of FITS with the lowest query loss on users that are not held out."""
        totals = np.zeros(len(FITS))
        for length in LENGTHS:
            torch.manual_seed(0)
            cases = cases_of(self.data, users, length, self.config.query).batches()
            for batch in cases[:: max(1, len(cases) // 8)]:
                support, query = self.tasks(batch)
                for k, (rate, steps) in enumerate(FITS):
                    vectors = fit_vectors(self.ranker, self.kinds, support, rate, steps, self.config.support)
                    totals[k] += self.query_losses(query, vectors).mean()
        return FITS[int(totals.argmin())]

    def run(self, cases: Cases, fit: tuple[float, int]) -> dict[str, dict[str, np.ndarray]]:
        """Measure every arm on the cases: arm -> metric -> a value for each user (U,).

        fit: rate and steps of the directly fitted vector, see `best_fit`.
        """
        found: dict[str, dict[str, list[np.ndarray]]] = {}
        torch.manual_seed(1)
        for batch in tqdm(cases.batches(), desc=f"{cases.length} events", mininterval=2):
            support, query = self.tasks(batch)
            adapted = self.learner.vectors(self.ranker, self.kinds, support).detach()
            arms = {
                "adapted": adapted,
                "default": self.ranker.default_meta.detach().expand_as(adapted),
                "own vector": fit_vectors(self.ranker, self.kinds, support, *fit, self.config.support),
                "nothing": torch.zeros_like(adapted),
                "adapted, float16": as_stored(adapted, "float16"),
                "adapted, int8": as_stored(adapted, "int8"),
            }
            events = next_events(self.tables, self.data, batch)
            for name, vectors in arms.items():
                row = found.setdefault(name, {"query_loss": [], "next_ndcg10": [], "like_ndcg10": []})
                row["query_loss"].append(self.query_losses(query, vectors))
                with torch.no_grad():
                    row["next_ndcg10"].append(next_gains(self.ranker, self.kinds.index("next"), events, vectors))
                row["like_ndcg10"].append(self.like_gains(query, vectors))
        return {name: {metric: np.concatenate(values) for metric, values in row.items()} for name, row in found.items()}


def compare_lengths(found: dict[int, dict[str, dict[str, np.ndarray]]]) -> dict[str, Any]:
    """Return the means of each arm by length, and the paired differences from the default vector.

    A difference has an interval and a p value.
    """
    report: dict[str, Any] = {}
    for length, arms in found.items():
        rows: dict[str, Any] = {"users": len(arms["default"]["query_loss"]), "arms": {name: {} for name in arms}}
        for name, metrics in arms.items():
            for metric, values in metrics.items():
                rows["arms"][name][metric] = compare(values, None if name == "default" else arms["default"][metric])
        report[str(length)] = rows
    return report


def compare(values: np.ndarray, default: np.ndarray | None) -> dict[str, Any]:
    """Return the mean of values (U,), NaN left out, and their difference from `default` if it is given."""
    kept = ~np.isnan(values)
    row: dict[str, Any] = {"mean": round(float(values[kept].mean()), 5), "users": int(kept.sum())}
    if default is not None:
        difference = (values - default)[kept]
        row["minus_default"] = interval(difference, digits=6)
        row["p"] = round(sign_flip(difference), 4)
    return row


def experiment(config: Config, folder: Path) -> dict[str, Any]:
    """Train without the held-out users, compare the arms on them, and return the report."""
    own = config.personalization
    held_out = dataclasses.replace(config.data, held_out_users=own.held_out_users)
    data, config = load_for_training(dataclasses.replace(config, data=held_out))
    learning = dataclasses.replace(config.train, epochs=own.epochs, cascade_epochs=own.cascade_epochs)
    ranker = train(data, config.model, learning, folder).model
    comparison = Comparison(data, ranker, MetaTrainer(ranker, data, config.meta).train(folder))
    users = data.split.held_out_users
    fit = comparison.best_fit(np.setdiff1d(np.arange(len(data.sequences)), users))
    found = {length: comparison.run(cases_of(data, users, length, config.meta.query), fit) for length in LENGTHS}
    return {
        "held_out_users": len(users),
        "own_vector": {"rate": fit[0], "steps": fit[1]},
        "lengths": compare_lengths(found),
    }


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m slatewise_train.meta.personalization",
        description="Measure the benefit of meta-embeddings for users that were not trained on.",
    )
    parser.add_argument("toml", type=Path, help="config of the ranker, as for `slatewise train`")
    parser.add_argument("--folder", type=Path, help="default: build/personalization/NAME")
    args = parser.parse_args(argv)
    config = read_config(args.toml)
    folder = args.folder or Path("build/personalization") / config.data.name
    report = experiment(config, folder)
    table = personalization_table(report)
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    (folder / "report.md").write_text(table + "\n")
    plot_personalization(report, folder / "report.png")
    print(table)


if __name__ == "__main__":
    sys.exit(run_main("python -m slatewise_train.meta.personalization", main, sys.argv[1:]))
