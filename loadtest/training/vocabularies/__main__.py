"""Item tables of an eighth of float32's bytes: python -m loadtest.training.vocabularies models/movielens.toml

First a published bundle, by default the newest one of the ranker: its item table in forms of few bytes, and the rank of
the test users' last event with each. Nothing is trained.

With `--train` small rankers instead, which differ in their id table: float32 rows, QR hashing, a table that is born
factored, clusters of the graph of users and items (GraphHash) and random clusters, each within an eighth of the bytes
of the float32 rows. They train the exit `dot` alone. Beside them are the forms of the float32 rows. Stop the command
at any time: the same command continues after the last whole epoch.

Called by: the command line. Its numbers appear in docs/compression.md. Calls: `study.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from loadtest.markdown import table
from loadtest.training.vocabularies.study import Judge, rows_of_table, save, shortened, titles_of_table, train_tables
from slatewise.bundle.manifest import bundle_folder, read_manifest
from slatewise.cli import run_main
from slatewise.process import cpu_name
from slatewise_train.config import read_config
from slatewise_train.loading import load_for_training
from slatewise_train.rankers.weights import load_model

TABLES = "float32,QR,born factored,random clusters,GraphHash"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.training.vocabularies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("toml", type=Path, help="config of the ranker, for example models/movielens.toml")
    parser.add_argument("--bundle", type=Path, help="default: models/bundles/NAME")
    parser.add_argument("--exits", default="dot", help="dot, or dot,point, which takes longer; default: %(default)s")
    parser.add_argument("--users", type=int, metavar="N", help="test users; default: all")
    parser.add_argument("--train", action="store_true", help="train rankers with small tables")
    parser.add_argument("--tables", default=TABLES, help="that are trained; default: %(default)s")
    parser.add_argument("--width", type=int, default=64, help="of these rankers; default: %(default)s")
    parser.add_argument("--blocks", type=int, default=1, help="of these rankers; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=10, help="of each; default: %(default)s")
    parser.add_argument("--history", type=int, default=64, help="events that they read; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("build/vocabularies"), help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    config = read_config(args.toml)
    if args.train:
        config = shortened(config, args.width, args.blocks, args.epochs, args.history)
    data, config = load_for_training(config)
    exits = tuple(args.exits.split(","))
    judge = Judge(data, exits, args.users)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.train:
        found = train_tables(config, data, args.tables.split(","), args.out, judge)
        save(args.out / "trained.json", found)
    else:
        folder = bundle_folder(args.bundle or Path("models/bundles") / config.data.name)
        found = judge.with_forms(load_model(folder, read_manifest(folder)))
        save(args.out / "forms.json", found)
    print(f"{cpu_name()}; {len(judge.users):,} test users\n")
    print(table(titles_of_table(exits), rows_of_table(found)))


if __name__ == "__main__":
    sys.exit(run_main("python -m loadtest.training.vocabularies", main, sys.argv[1:]))
