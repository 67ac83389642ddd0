"""Residual DCN beside DCNv2, a gated MLP and LambdaMART: python -m loadtest.training.families

All rankers predict the label `like` of MovieLens 1M, on slates of held-out users. Residual DCN, DCNv2 and the MLP are
rankers of the family `dcn` with equal parameters, and have all other settings of `movielens.toml` beside this file. A
fourth ranker is residual DCN without its isotonic layer. LightGBM (requirements.txt) trains LambdaMART and a classifier
on features made by hand.

Stop the command at any time: the same command continues after the last whole epoch. The folder gets `results.md`, a
folder for each training, and the bundle of the first residual DCN, which a server can load.

Called by: the command line. Its numbers appear in docs/quality.md. Calls: `runs.py`, `trees.py`, `report.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from loadtest.training.families.runs import NO_LAYER, run, shapes
from slatewise.cli import run_main
from slatewise_train.config import read_config
from slatewise_train.loading import load_for_training

TOML = Path(__file__).parent / "movielens.toml"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.training.families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("build/families"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of each ranker; default: %(default)s")
    parser.add_argument("--epochs", type=int, metavar="N", help="of each ranker; default: those of the TOML")
    parser.add_argument("--only", metavar="NAME", help="train this ranker alone")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: PyTorch's choice")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    config = read_config(TOML)
    if args.epochs is not None:
        config = replace(config, train=replace(config.train, epochs=args.epochs, cascade_epochs=args.epochs))
    data, config = load_for_training(config)
    rankers = shapes(data, dict(config.model.shape))
    seeds = range(args.seeds)
    main_part = [(name, seed) for seed in seeds for name in rankers if name != NO_LAYER]
    for name, seed in [*main_part, *((NO_LAYER, seed) for seed in seeds)]:
        if args.only in (None, name):
            run(data, config, rankers[name], seed, args.out / f"{name}, seed {seed}")


if __name__ == "__main__":
    sys.exit(run_main("python -m loadtest.training.families", main, sys.argv[1:]))
