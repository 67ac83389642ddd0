"""Simulate users, train rankers on their choices, and compare them with the known best order.

    python -m slatewise_train.demo.simulated --source ml-latest-small.zip --out build/simulated

Without `--source`, MovieLens latest-small is downloaded. A stopped run continues: each training has checkpoints.

Called by: the command line. Calls: `experiment.py`, `demo/movielens.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from slatewise.cli import run_main
from slatewise_train.demo import movielens
from slatewise_train.demo.simulated.experiment import (
    TRADES,
    Result,
    add_mmr,
    recovered,
    run_world,
    share_of_gain,
    table,
)
from slatewise_train.demo.simulated.world import WorldConfig, pick_items
from slatewise_train.evaluation.metrics import interval

TRAIN = """\
epochs = {epochs}
cascade_epochs = {cascade}
batch_events = 4096
learning_rate = 0.005
embedding_std = 0.05
warmup = 0.05
negatives = 64
cascade_windows = 64
cascade_negatives = 8
validate_every = 100
id_dropout = 0.0
"""
LOSSES = ("bce", "softmax", "neural_ndcg", "lambda")


def films_of(source: Path | None, folder: Path, count: int) -> pl.DataFrame:
    """Return the items of the worlds: films of MovieLens latest-small."""
    tables = folder / "ml-latest-small"
    if not (tables / "items.parquet").exists():
        movielens.main(["ml-latest-small", "--out", str(tables), *(["--source", str(source)] if source else [])])
    return pick_items(pl.read_parquet(tables / "events.parquet"), pl.read_parquet(tables / "items.parquet"), count)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m slatewise_train.demo.simulated",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", type=Path, help="zip or folder of MovieLens latest-small; default: download")
    parser.add_argument("--out", type=Path, default=Path("build/simulated"), help="default: %(default)s")
    parser.add_argument("--users", type=int, default=WorldConfig.users, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--loss", choices=LOSSES, default="softmax", help="of the slates; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    films = films_of(args.source, args.out, WorldConfig.items)
    base = TRAIN.format(epochs=args.epochs, cascade=max(1, args.epochs * 4 // 5))

    def run(name: str, lines: str = "", **switches: float) -> Result:
        config = WorldConfig(users=args.users, seed=args.seed, **switches)  # type: ignore[arg-type]  # sizes are switches
        print(f"\n{name}:", flush=True)
        result = run_world(args.out, name, config, films, base + lines)
        for trade in TRADES if name == "neighbours" else ():
            add_mmr(result, trade)
        print("\n".join(table(result)), flush=True)
        return result

    loss = f'slate_loss = "{args.loss}"\n'
    found = run("neighbours", loss)
    own, whole = share_of_gain(found)
    print(f"\nset gains {own:.0%} of the worth of neighbours, and {whole:.0%} of the oracle's gain over point (NDCG@5)")
    alone = run("no-neighbours", loss, neighbours=0.0)
    difference = interval(alone.ndcg("set", 5) - alone.ndcg("point", 5))
    print(
        f"\nwithout neighbours, set minus point is {difference[0]:+.4f} ({difference[1]:+.4f} to {difference[2]:+.4f})"
    )
    switches = {"neighbours": 0.0, "fatigue": 0.0}
    fair = run("no-bias", loss, **switches)
    biased = {"position_power": 1.0, **switches}
    arms = {"naive": "", "weighted": "propensity_power = 1.0\n", "position-bias": "position_bias = true\n"}
    for name, line in arms.items():
        share = recovered(run(name, loss + line, **biased), fair, "point")
        print(f"\n{name}: {share:.0%} of the gain of NDCG@10 without click bias (exit point)")


if __name__ == "__main__":
    sys.exit(run_main("python -m slatewise_train.demo.simulated", main, sys.argv[1:]))
