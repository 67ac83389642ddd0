"""Does a larger LiGR rank better? python -m loadtest.training.scaling models/movielens.toml --out build/scaling

Trains the ranker of a TOML at several sizes and lengths of history, with two seeds each, and plots NDCG@10 of the exits
`dot` and `point` on the validation users against the FLOPs of a request. With the longest history, it also compares
gated with ungated blocks at depth 8, and all item features with none: the two claims of LiGR (arXiv 2502.03417).

All other settings are those of the TOML, for every run. At the start, one epoch is timed and the time of the whole
study is printed; `--epochs` shortens every run alike. `--users` validates with more users than the TOML: the intervals
become narrower, and each of these users trains with 20 events less. Stop the command at any time: the same command
continues after the last whole epoch. The folder gets `results.jsonl` with a line for each finished run, `results.md`
and `scaling.png`.

Called by: the command line. Its use is described in docs/training.md. Calls: `runs.py`, `study.py`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from loadtest.training.scaling.report import TEXT
from loadtest.training.scaling.runs import Size, plan
from loadtest.training.scaling.study import load_study, run_study
from slatewise.cli import run_main
from slatewise_train.config import read_config
from slatewise_train.devices import DEVICES, find_device
from slatewise_train.loading import load_for_training

SIZES = "32x1,32x2,64x2,64x4,64x8"
SHARES = (4, 2, 1)  # of `history_length` in the TOML


def sizes_of(text: str) -> list[Size]:
    """Read "32x1,64x2": width x blocks."""
    if not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: sizes are WIDTHxBLOCKS, with commas between them: {SIZES}")
    pairs = [size.split("x") for size in text.split(",")]
    return [(int(width), int(blocks)) for width, blocks in pairs]


def lengths_of(text: str) -> list[int]:
    """Read "64,128,256": events."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: lengths are numbers of events, with commas between them")
    return [int(part) for part in text.split(",")]


def above_zero(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be 1 or more")
    return int(text)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.training.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("toml", type=Path, help="config of the ranker, for example models/movielens.toml")
    parser.add_argument("--out", type=Path, default=Path("build/scaling"), help="default: %(default)s")
    parser.add_argument("--sizes", type=sizes_of, default=SIZES, help="WIDTHxBLOCKS; default: %(default)s")
    parser.add_argument(
        "--histories", type=lengths_of, help="events; default: a quarter, half and all of history_length in the TOML"
    )
    parser.add_argument("--epochs", type=above_zero, metavar="N", help="of every run; default: those of the TOML")
    parser.add_argument("--users", type=above_zero, metavar="N", help="that validate; default: those of the TOML")
    parser.add_argument("--threads", type=above_zero, metavar="N", help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: a CUDA GPU if there is one")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = find_device(args.device)
    config = read_config(args.toml)
    if args.users is not None:
        config = replace(config, data=replace(config.data, validation_users=args.users))
    data, config = load_for_training(config)
    study = load_study(config, data, args.epochs, device)
    longest = data.config.history_length
    histories = args.histories or sorted({max(1, longest // share) for share in SHARES})
    base = (config.model.shape["width"], config.model.shape["blocks"])
    run_study(study, plan(base, args.sizes, histories, config.train.seed), args.out)
    print((args.out / TEXT).read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(run_main("python -m loadtest.training.scaling", main, sys.argv[1:]))
