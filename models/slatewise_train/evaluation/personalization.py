"""What a meta-embedding is worth to users whom nothing was trained on: python -m slatewise_train.evaluation.personalization models/movielens.toml

Trains a ranker and a meta block without the held-out users (`[personalization]` in the TOML; both can be stopped and resumed), lets
each of these have 5, 10, 20 or 50 and more events, and asks what comes next, with the vector of the block adapted to their newest
events, with the un-adapted one, with a vector of their own fitted to the same events, and with none. In every arm the ranker reads
all events before, these too. Writes report.json, report.md and report.png under `build/personalization/NAME/`.
Before: the tables of `data.py`. After: docs/meta_embeddings.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from slatewise.inference.arrays import FIRST_ITEM
from slatewise.store.codec import pack_many, unpack
from slatewise_train.data import from_table, read_config
from slatewise_train.evaluation.offline import interval, ndcg
from slatewise_train.evaluation.report import personalization_table, plot_personalization
from slatewise_train.meta.limaml import (
    MetaConfig,
    MetaLearner,
    MetaTrainer,
    Tasks,
    event_losses,
    make_tasks,
    point_with,
)
from slatewise_train.rankers.ligr import Ligr
from slatewise_train.train import Data, Slates, TrainConfig, load_data, make_batch, read_slates, train

LENGTHS = (5, 10, 20, 50)  # events; the last: so many or more
BATCH = 32
FITS = [
    (rate, steps) for rate in (0.01, 0.03, 0.1) for steps in (3, 10, 30)
]  # of a vector of one's own, the best of which is taken
FLIPS = 10_000


@dataclass(frozen=True)
class Cases:
    """Users and how many of their events have happened."""

    length: int
    cases: list[tuple[int, int]]

    def batches(self) -> list[list[tuple[int, int]]]:
        ordered = sorted(self.cases, key=lambda case: case[1])
        return [ordered[k : k + BATCH] for k in range(0, len(ordered), BATCH)]


def cases_of(data: Data, users: np.ndarray, length: int, query: int) -> Cases:
    """The users with enough events; of those with the most all but the query's count, of others the first `length`."""
    events = np.diff(data.sequences.offsets)
    now = events - query if length == LENGTHS[-1] else np.full(len(events), length)
    return Cases(
        length,
        [(int(user), int(now[user])) for user in users if now[user] >= length and events[user] >= now[user] + query],
    )


def fit_vectors(ranker: Ligr, kinds: list[str], support: Tasks, rate: float, steps: int, most: int) -> Tensor:
    """(U, M): a vector of their own for each user, by Adam on the loss that the inner loop descends."""
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
    values = pack_many(vectors.numpy(), 1, 0.0, dtype)
    return torch.from_numpy(np.stack([unpack(value, vectors.shape[1])[0] for value in values]))


@torch.no_grad()
def catalogue_logits(
    ranker: Ligr, table: Tensor, numeric: Tensor, data: Data, cases: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the next event of each user among all items: hidden states without a vector (U, C, d), logits of `dot` (U, C, heads), the event's place (U,)."""
    longest = data.config.history_length
    batch = make_batch(data.sequences, [(user, max(0, now - longest), now) for user, now in cases])
    state, users = ranker.encode(ranker.tokens(table[batch.items], batch.actions, batch.gaps))
    items = torch.arange(FIRST_ITEM, len(table)).expand(len(cases), 1, -1)
    none = torch.zeros(len(cases), 1, 1)
    rows = torch.arange(len(cases))
    read = batch.lengths
    slates = Slates(
        read[:, None], items, numeric[items], batch.contexts[rows, read][:, None], none > 0, none[..., None], none
    )
    dot, _, base = read_slates(
        ranker, slates, state, users, table[items], torch.zeros(len(cases), 1, ranker.config.meta_size)
    )
    target = [int(data.sequences.items[data.sequences.offsets[user] + now]) - FIRST_ITEM for user, now in cases]
    return base, dot, torch.tensor(target)


def next_gains(
    ranker: Ligr, head: int, base: Tensor, dot: Tensor, target: Tensor, seen: list[np.ndarray], vectors: Tensor
) -> np.ndarray:
    """(U,) NDCG@10 of the next event in the full catalogue, what was seen removed."""
    scores = point_with(ranker, vectors, base[:, None], dot[:, None])[:, 0, :, head].numpy()
    gains = np.zeros(len(scores))
    for k, (row, place) in enumerate(zip(scores, target.tolist(), strict=True)):
        mine = row[place]
        row[seen[k]] = -np.inf
        rank = int((row > mine).sum())
        gains[k] = 1 / np.log2(rank + 2) if rank < 10 else 0.0
    return gains


def sign_flip(difference: np.ndarray) -> float:
    """Two-sided p of a paired permutation test: how often a mean as large comes of random signs."""
    rng = np.random.default_rng(0)
    observed = abs(difference.mean())
    means = np.array([abs((rng.choice((-1.0, 1.0), len(difference)) * difference).mean()) for _ in range(FLIPS)])
    return float((1 + (means >= observed).sum()) / (1 + FLIPS))


class Comparison:
    """The arms over held-out users, length by length."""

    def __init__(self, data: Data, ranker: Ligr, learner: MetaLearner) -> None:
        self.data = data
        self.ranker = ranker
        self.learner = learner
        self.config = learner.config
        self.kinds = [head.kind for head in data.config.heads]
        self.table = ranker.item_table()
        self.numeric = torch.from_numpy(data.catalogue.numeric)

    def tasks(self, cases: list[tuple[int, int]]) -> tuple[Tasks, Tasks]:
        """Support and query."""
        c = self.config
        longest = self.data.config.history_length
        both = make_tasks(
            self.ranker, self.table, self.numeric, self.data.sequences, cases, longest, c.support, c.query, c.negatives
        )
        return both.columns(0, c.support), both.columns(c.support, c.support + c.query)

    def query_losses(self, query: Tasks, vectors: Tensor) -> np.ndarray:
        *inputs, real = query.tensors()
        with torch.no_grad():
            losses = event_losses(self.ranker, self.kinds, vectors, *inputs) * real
        return (losses.sum(1) / real.sum(1).clamp(min=1)).numpy()

    def like_gains(self, query: Tasks, vectors: Tensor) -> np.ndarray:
        """(U,) NDCG@10 of the query's events ordered by the first head of kind `label`, NaN where all have one label."""
        head = self.kinds.index("label")
        with torch.no_grad():
            logits = point_with(self.ranker, vectors, query.base, query.dot)
        scores = logits[:, :, 0, head].numpy()
        labels = query.labels[..., head].numpy()
        real = query.real.numpy() > 0
        rows = [r & ~np.isnan(y) for r, y in zip(real, labels, strict=True)]
        return np.array([ndcg(s[r], y[r]) for s, y, r in zip(scores, labels, rows, strict=True)])

    def best_fit(self, users: np.ndarray) -> tuple[float, int]:
        """Of `FITS`, by the query loss of users who are not held out."""
        totals = np.zeros(len(FITS))
        for length in LENGTHS:
            torch.manual_seed(0)
            cases = cases_of(self.data, users, length, self.config.query).batches()
            for batch in cases[:: max(1, len(cases) // 8)]:
                support, query = self.tasks(batch)
                for k, (rate, steps) in enumerate(FITS):
                    totals[k] += self.query_losses(
                        query, fit_vectors(self.ranker, self.kinds, support, rate, steps, self.config.support)
                    ).mean()
        return FITS[int(totals.argmin())]

    def run(self, cases: Cases, fit: tuple[float, int]) -> dict[str, dict[str, np.ndarray]]:
        """Arm -> metric -> a value a user."""
        found: dict[str, dict[str, list[np.ndarray]]] = {}
        torch.manual_seed(1)
        for batch in tqdm(cases.batches(), desc=f"{cases.length} events", mininterval=2):
            support, query = self.tasks(batch)
            adapted = self.learner.vectors(self.ranker, self.kinds, support).detach()
            default = self.ranker.default_meta.detach().expand_as(adapted)
            arms = {
                "adapted": adapted,
                "default": default,
                "own vector": fit_vectors(self.ranker, self.kinds, support, *fit, self.config.support),
                "nothing": torch.zeros_like(adapted),
                "adapted, float16": as_stored(adapted, "float16"),
                "adapted, int8": as_stored(adapted, "int8"),
            }
            base, dot, target = catalogue_logits(self.ranker, self.table, self.numeric, self.data, batch)
            seen = [
                self.data.sequences.items[self.data.sequences.offsets[user] :][:now] - FIRST_ITEM for user, now in batch
            ]
            for name, vectors in arms.items():
                row = found.setdefault(name, {"query_loss": [], "next_ndcg10": [], "like_ndcg10": []})
                row["query_loss"].append(self.query_losses(query, vectors))
                with torch.no_grad():
                    row["next_ndcg10"].append(
                        next_gains(self.ranker, self.kinds.index("next"), base, dot, target, seen, vectors)
                    )
                row["like_ndcg10"].append(self.like_gains(query, vectors))
        return {name: {metric: np.concatenate(values) for metric, values in row.items()} for name, row in found.items()}


def tabulate(found: dict[int, dict[str, dict[str, np.ndarray]]]) -> dict:
    """By length: each arm's means, and its paired difference to the default vector."""
    report: dict = {}
    for length, arms in found.items():
        rows = report[str(length)] = {"users": len(arms["default"]["query_loss"]), "arms": {}}
        for name, metrics in arms.items():
            rows["arms"][name] = {}
            for metric, values in metrics.items():
                kept = ~np.isnan(values)
                row = {"mean": round(float(values[kept].mean()), 5), "users": int(kept.sum())}
                if name != "default":
                    difference = (values - arms["default"][metric])[kept]
                    row["minus_default"] = interval(difference, digits=6)
                    row["p"] = round(sign_flip(difference), 4)
                rows["arms"][name][metric] = row
    return report


@dataclass(frozen=True)
class PersonalizationConfig:
    held_out_users: int = 1800
    epochs: int = 24  # of the ranker without them
    ladder_epochs: int = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("toml", type=Path)
    parser.add_argument("--folder", type=Path, help="default: build/personalization/NAME")
    args = parser.parse_args()
    try:
        config, toml = read_config(args.toml)
        own = from_table(PersonalizationConfig, toml.get("personalization", {}), "personalization")
        config = dataclasses.replace(config, held_out_users=own.held_out_users)
        learning = from_table(
            TrainConfig, toml.get("train", {}) | {"epochs": own.epochs, "ladder_epochs": own.ladder_epochs}, "train"
        )
        meta = from_table(MetaConfig, toml.get("meta", {}), "meta")
        folder = args.folder or Path("build/personalization") / config.name
        data = load_data(config, toml)
        ranker = train(data, toml.get("model", {}), learning, folder).model
        comparison = Comparison(data, ranker, MetaTrainer(ranker, data, meta).train(folder))
        users = data.split.held_out_users
        fit = comparison.best_fit(np.setdiff1d(np.arange(len(data.sequences)), users))
        found = {length: comparison.run(cases_of(data, users, length, meta.query), fit) for length in LENGTHS}
        report = {
            "held_out_users": len(users),
            "own_vector": {"rate": fit[0], "steps": fit[1]},
            "lengths": tabulate(found),
        }
    except (ValueError, OSError) as error:
        parser.error(str(error))
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    (folder / "report.md").write_text(personalization_table(report) + "\n")
    plot_personalization(report, folder / "report.png")
    print(personalization_table(report))


if __name__ == "__main__":
    main()
