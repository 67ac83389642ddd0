"""Residual DCN beside DCNv2, a gated MLP and LambdaMART: python -m loadtest.training.families

All rankers predict the label `like` of MovieLens 1M, on slates of held-out users. Residual DCN, DCNv2 and the MLP are
rankers of the family `dcn` with equal parameters, and have all other settings of `movielens.toml` beside this file. Two
more rankers are residual DCN without its isotonic layer, and with calibration features in it. LightGBM
(requirements.txt) trains LambdaMART and a classifier on features made by hand.

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

from loadtest.training.families.report import Rated, calibration_table, quality_table, read_runs
from loadtest.training.families.runs import (
    BY_FEATURES,
    NO_LAYER,
    PERCEPTRON,
    PLAIN,
    RESIDUAL,
    export_first,
    held_out,
    known_labels,
    parameters,
    run,
    scores_of_bundle,
    shapes,
)
from loadtest.training.families.trees import OBJECTIVES, run_trees
from slatewise.cli import run_main
from slatewise.process import cpu_name
from slatewise_train.config import Config, read_config
from slatewise_train.data import Data
from slatewise_train.loading import load_for_training

TOML = Path(__file__).parent / "movielens.toml"
ORDER = (
    (RESIDUAL, PLAIN),
    (PERCEPTRON,),
    (NO_LAYER,),
    (BY_FEATURES,),
)  # seeds of the first group come before the next group


def report(data: Data, config: Config, out: Path, seeds: int) -> str:
    """Return the tables of the runs that are finished, and write them to `results.md`."""
    rankers = shapes(data, dict(config.model.shape))
    cases = held_out(data)
    rated = Rated(*known_labels(cases))
    runs = read_runs(out, [*rankers, *OBJECTIVES], seeds)
    likes = {
        f"{name}, {kind}": [getattr(run, field) for run in runs[name]]
        for name in (RESIDUAL, NO_LAYER, BY_FEATURES)
        if name in runs
        for kind, field in (("no fitted map", "raw"), ("fitted map", "fitted"))
    }
    bundle = export_first(data, config, out)
    likes = {"exported bundle": [scores_of_bundle(data, bundle, cases)]} | likes
    parity = max(run.parity for name in rankers for run in runs.get(name, []))
    rows = f"{len(rated.labels):,} rated items of {len(cases):,} users"
    text = "\n\n".join(
        [
            f"{cpu_name()}, {torch.get_num_threads()} threads; {rows}",
            quality_table(rated, runs, {name: parameters(data, shape) for name, shape in rankers.items()}),
            f"Largest difference of a probability between graphs and torch, all runs: {parity:.1e}",
            "Observed over expected likes:",
            calibration_table(data, rated, likes),
        ]
    )
    (out / "results.md").write_text(text + "\n", encoding="utf-8")
    return text


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.training.families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("build/families"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of each ranker; default: %(default)s")
    parser.add_argument("--epochs", type=int, metavar="N", help="of each ranker; default: those of the TOML")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: PyTorch's choice")
    parser.add_argument(
        "--libraries", type=Path, help="folder with the packages of requirements.txt; without: no trees"
    )
    parser.add_argument("--report", action="store_true", help="train nothing; print the tables of what is finished")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    config = read_config(TOML)
    if args.epochs is not None:
        config = replace(config, train=replace(config.train, epochs=args.epochs, cascade_epochs=args.epochs))
    data, config = load_for_training(config)
    rankers = shapes(data, dict(config.model.shape))
    if not args.report:
        if args.libraries is not None:
            sys.path.append(str(args.libraries))
            for seed in range(args.seeds):
                for name in OBJECTIVES:
                    run_trees(data, name, seed, torch.get_num_threads(), args.out / f"{name}, seed {seed}")
        for group in ORDER:
            for seed in range(args.seeds):
                for name in group:
                    run(data, config, rankers[name], seed, args.out / f"{name}, seed {seed}")
    print(report(data, config, args.out, args.seeds))


if __name__ == "__main__":
    sys.exit(run_main("python -m loadtest.training.families", main, sys.argv[1:]))
