"""What does an update cost users' own weights? python -m loadtest.training.incremental.weights models/movielens.toml

Weights of a user act on the normalised hidden states of the exit `point` (`meta/personal_weights.py`). An update moves
these states a little, and the stored weights stay as they are until the next refresh. The command trains a small ranker
on the events before `--first`, learns the prior of the weights on it, and updates it day by day. Before the first
update, after one day and after the last day, it measures the exit `point` on the last events of users who have no event
after that date, and whose last events were held out:

    none     no weights
    stored   weights that were fitted on the ranker before the first update
    fitted   weights that were fitted on the updated ranker, as a refresh would make them

Called by: the command line. Its numbers appear in docs/meta_embeddings.md. Calls: `study.py`, `slatewise_train`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from loadtest.markdown import table
from loadtest.training.incremental.study import Study
from loadtest.training.personal.movielens import read_user
from loadtest.training.personal.served import newest
from slatewise.cli import run_main
from slatewise.process import cpu_name
from slatewise_train.config import read_config
from slatewise_train.data import Data
from slatewise_train.evaluation.metrics import interval, ndcg
from slatewise_train.evaluation.report import difference_cell
from slatewise_train.incremental.update import UpdateConfig, update
from slatewise_train.meta.personal_weights import learn_precision, personal_weights
from slatewise_train.meta.tasks import RankerTables
from slatewise_train.rankers.base import RankerModel, personal_features
from slatewise_train.train import Trainer, train

USERS = 1_000
LEAST_EVENTS = 60  # of a measured user, with the held-out ones
FIRST = "2000-11-26"  # of the updates
HEAD = "like"


def held_out(data: Data, users: np.ndarray) -> Data:
    """Return the data without the last events of some users, those of a slate."""
    lengths = data.split.train_lengths.copy()
    lengths[users] -= data.config.slate_size
    return dataclasses.replace(data, split=dataclasses.replace(data.split, train_lengths=lengths))


def ranker_tables(model: RankerModel, data: Data, head: int) -> RankerTables:
    """Return a ranker that takes weights for a head."""
    own = model.with_personal_heads((head,)).requires_grad_(False).eval()
    return RankerTables(own, own.item_table(), torch.from_numpy(data.catalogue.numeric))


def fitted(tables: RankerTables, precision: torch.Tensor, data: Data, users: np.ndarray, count: int) -> torch.Tensor:
    """Return the weights (users, D) from each user's newest `count` events of the training."""
    cut = newest(data, users, data.split.train_lengths[users], None)
    longest = data.config.history_length
    return torch.from_numpy(personal_weights(tables, precision, cut, longest, count))


def measure(tables: RankerTables, data: Data, users: np.ndarray, head: int, arms: list[torch.Tensor]) -> np.ndarray:
    """Return NDCG@10 and log loss of the held-out slates with each arm's weights (users, D): (users, arms, 2)."""
    found = []
    for k, user in enumerate(users.tolist()):
        read = read_user(tables.ranker, data, user, int(data.split.train_lengths[user]), head, 0)
        x = personal_features(torch.from_numpy(read.slate).float())
        logits = torch.from_numpy(read.chance).logit().float()
        labels = torch.from_numpy(read.labels).float()
        moved = [logits + x @ weights[k] for weights in arms]
        losses = [float(F.binary_cross_entropy_with_logits(scores, labels)) for scores in moved]
        found.append([(ndcg(s.numpy(), read.labels), loss) for s, loss in zip(moved, losses, strict=True)])
    return np.array(found)


def cells(values: np.ndarray) -> list[str]:
    """Return NDCG@10 without weights, and both differences of `stored` and `fitted`, and of `stored` from `fitted`."""
    pairs = ((1, 0), (2, 0), (1, 2))
    gaps = [values[:, one, metric] - values[:, other, metric] for metric in (0, 1) for one, other in pairs]
    return [f"{np.nanmean(values[:, 0, 0]):.4f}", *(difference_cell(interval(gap[~np.isnan(gap)])) for gap in gaps)]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.training.incremental.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("toml", type=Path, help="config of the ranker: models/movielens.toml")
    parser.add_argument("--out", type=Path, default=Path("build/incremental-weights"), help="default: %(default)s")
    parser.add_argument("--first", default=FIRST, help="day of the first update, in UTC; default: %(default)s")
    parser.add_argument("--days", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=10, help="of the training; default: %(default)s")
    parser.add_argument("--cascade-epochs", type=int, default=4, help="the last ones; default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = read_config(args.toml)
    study = Study(config, args.out, args.first, args.epochs, UpdateConfig())
    training = dataclasses.replace(study.config.train, cascade_epochs=args.cascade_epochs)
    counts, every = study.counts(0), np.diff(study.all.sequences.offsets)
    able = np.flatnonzero((counts == every) & (counts >= LEAST_EVENTS))
    users = np.sort(np.random.default_rng(0).permutation(able)[:USERS])
    data = held_out(study.until(0), users)
    model = train(data, study.config.model, training, args.out).model.eval()
    head = [head.name for head in data.config.heads].index(HEAD)
    tables = ranker_tables(model, data, head)
    precision = learn_precision(tables, data, config.meta)
    if precision is None:
        raise ValueError("weights of their own do not help users of this ranker: train it for more epochs")
    stored = fitted(tables, precision, data, users, config.meta.examples)
    none = torch.zeros_like(stored)
    rows = [["none", *cells(measure(tables, data, users, head, [none, stored, stored]))]]
    for day in range(1, args.days + 1):
        data = held_out(study.until(day), users)
        update(Trainer(data, model, training), study.counts(day - 1), UpdateConfig())
        if day in (1, args.days):
            tables = ranker_tables(model, data, head)
            again = fitted(tables, precision, data, users, config.meta.examples)
            rows.append([str(day), *cells(measure(tables, data, users, head, [none, stored, again]))])
    titles = ["stored", "fitted", "stored minus fitted"]
    print(f"{len(users):,} users, {data.config.slate_size} held-out events each, exit `point`; {cpu_name()}\n")
    header = ["updates", "NDCG@10 without", *(f"NDCG@10, {t}" for t in titles), *(f"log loss, {t}" for t in titles)]
    print(table(header, rows))


if __name__ == "__main__":
    sys.exit(run_main("python -m loadtest.training.incremental.weights", main, sys.argv[1:]))
