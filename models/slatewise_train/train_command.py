"""Train a ranker: slatewise train models/movielens.toml

You can stop the command at any time; the same command continues after the last whole epoch. It writes three files into
`build/train/NAME/`: `checkpoint.pt`, `log.csv` with a row for each epoch, and `log.png` with the curves of the log and
the level of the baselines. At the end it says whether the ranker beats them. docs/training.md describes a run.
`--search 30m` first searches better values for the keys that the TOML leaves out, see `search.py`.

Called by: the command line. Calls: `config.py`, `devices.py`, `loading.py`, `search.py`, `train.py`, `training_log.py`,
`evaluation/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from slatewise_train.config import read_config
from slatewise_train.devices import DEVICES, find_device
from slatewise_train.evaluation.leakage import check_leakage
from slatewise_train.evaluation.trained import TrainingReport
from slatewise_train.evaluation.verdict import training_warnings
from slatewise_train.loading import load_for_training, training_folder
from slatewise_train.search import search
from slatewise_train.search_space import seconds_of
from slatewise_train.train import train
from slatewise_train.training_log import LOG


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="slatewise train",
        description="Train a ranker. Stop it at any time: the same command continues after the last whole epoch.",
    )
    parser.add_argument("toml", type=Path, help="config of the ranker, for example models/movielens.toml")
    parser.add_argument("--folder", type=Path, help="default: build/train/NAME")
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="default: a CUDA GPU if there is one, else CPU"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: as many as PyTorch chooses")
    searched = "search better values for the keys that the TOML leaves out for this time, then train: 90s, 30m, 2h"
    parser.add_argument("--search", metavar="TIME", help=searched)
    args = parser.parse_args(argv)
    if args.threads is not None:
        if args.threads < 1:
            parser.error("--threads must be 1 or more")
        torch.set_num_threads(args.threads)
    seconds = None if args.search is None else seconds_of(args.search)
    device = find_device(args.device)
    config = read_config(args.toml)
    folder = training_folder(config, args.folder)
    # A search applies the values that it found itself.
    data, config = load_for_training(config, folder if seconds is None else None)
    vocabulary = data.catalogue.vocabulary
    print(f"{len(data.sequences)} users, {len(data.sequences.items)} events, {len(vocabulary.items)} items", flush=True)
    if seconds is not None:
        config = search(data, config, folder, seconds, device)
    report = TrainingReport(data)
    report.write_levels(folder)
    trainer = train(data, config.model, config.train, folder, device)
    warnings = training_warnings(config, folder / LOG, trainer.model, trainer.progress.joined)
    verdict = report.verdict(trainer.model, warnings)
    print("\n".join([verdict.line, *(check.line for check in check_leakage(data) if check.found)]), flush=True)
