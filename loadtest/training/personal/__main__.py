"""Do personal weights, low rank + sparse (AMHT-LRS), earn their place? python -m loadtest.training.personal TOML BUNDLE

First on users with known weights (`synthetic.py`), then on the held-out slates of the ranker's training
(`movielens.py`). Prints two tables in Markdown.

Called by: the command line. Its numbers appear in docs/quality.md. Calls: the modules of this folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from loadtest.markdown import table
from loadtest.training.personal.movielens import LEARNING_USERS, measure, read_user, scaled
from loadtest.training.personal.synthetic import FEATURES, RANK, SPARSE, USERS, errors
from slatewise.bundle.manifest import bundle_folder, read_manifest
from slatewise.cli import run_main
from slatewise.process import cpu_name
from slatewise_train.config import read_config
from slatewise_train.loading import load_for_training
from slatewise_train.rankers.weights import load_model

EXAMPLES = (5, 10, 20, 40, 80)
EVENTS = (5, 20, 50)
SEED = 3


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.training.personal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("toml", type=Path, help="of the ranker's training")
    parser.add_argument("bundle", type=Path, help="<root>/<ranker>, or one version of it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = {count: errors(count) for count in tqdm(EXAMPLES, desc="synthetic")}
    print(f"{USERS} users, {FEATURES} features, rank {RANK} and {SPARSE} more numbers of each user; {cpu_name()}\n")
    names = list(rows[EXAMPLES[0]])
    print(table(["examples of a user", *names], [[n, *(f"{row[k]:.3f}" for k in names)] for n, row in rows.items()]))
    folder = bundle_folder(args.bundle)
    model = load_model(folder, read_manifest(folder)).requires_grad_(False)
    data, config = load_for_training(read_config(args.toml))
    head = next(k for k, one in enumerate(config.data.heads) if one.kind == "label")
    split = data.split
    others = np.setdiff1d(np.flatnonzero(split.train_lengths > max(EVENTS) + data.config.slate_size), split.slate_users)
    others = np.random.default_rng(SEED).permutation(others)[:LEARNING_USERS]
    most = max(EVENTS)
    learning = [
        read_user(model, data, u, int(split.train_lengths[u]) - data.config.slate_size, head, most)
        for u in tqdm(others.tolist(), desc="learning users")
    ]
    held_out = [
        read_user(model, data, u, int(split.train_lengths[u]), head, most)
        for u in tqdm(split.slate_users.tolist(), desc="slates")
    ]
    every = np.concatenate([user.slate for user in learning])
    mean, deviation = every.mean(axis=0), every.std(axis=0) + 1e-6
    learning, held_out = scaled(learning, mean, deviation), scaled(held_out, mean, deviation)
    print(f"\n{len(held_out)} held-out slates, differences from the ranker alone\n")
    cells = []
    for count in tqdm(EVENTS, desc="fits"):
        for name, found in measure(learning, held_out, count).items():
            cells.append([count, name, *(f"{m:+.4f} ({a:+.4f} to {b:+.4f})" for m, a, b in found.values())])
    print(table(["events", "fit", "log loss", "NDCG@10 of the label"], cells))


if __name__ == "__main__":
    sys.exit(run_main("python -m loadtest.training.personal", main, sys.argv[1:]))
