"""Train a ranker: slatewise train models/movielens.toml

You can stop the command at any time; the same command continues after the last whole epoch. It writes three files into
`build/train/NAME/`: `checkpoint.pt`, `log.csv` with a row for each epoch, and `log.png` with the curves of the log and
the level of the baselines. At the end it says whether the ranker beats them. docs/training.md describes a run.

Called by: the command line. Calls: `devices.py`, `loading.py`, `train.py`, `training_log.py`, `evaluation/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from slatewise_train.config import read_config
from slatewise_train.devices import DEVICES, find_device
from slatewise_train.evaluation.leakage import check_leakage
from slatewise_train.evaluation.trained import TrainingReport
from slatewise_train.evaluation.verdict import training_warnings
from slatewise_train.loading import load_for_training
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
    args = parser.parse_args(argv)
    device = find_device(args.device)
    config = read_config(args.toml)
    data, config = load_for_training(config)
    vocabulary = data.catalogue.vocabulary
    print(f"{len(data.sequences)} users, {len(data.sequences.items)} events, {len(vocabulary.items)} items", flush=True)
    folder = args.folder or Path("build/train") / config.data.name
    report = TrainingReport(data)
    report.write_levels(folder)
    trainer = train(data, config.model, config.train, folder, device)
    verdict = report.verdict(trainer.model, training_warnings(config, folder / LOG, trainer.model))
    print("\n".join([verdict.line, *(check.line for check in check_leakage(data) if check.found)]), flush=True)
