"""Simulate users, train rankers on their choices, and compare them with the known best order.

    python -m slatewise_train.demo.simulated --source ml-latest-small.zip --out build/simulated

Without `--source`, MovieLens latest-small is downloaded. A stopped run continues: each training has checkpoints. The
folder gets `results.md` and `simulated.png`. All numbers are *simulated*.

Called by: the command line. Calls: `experiment.py`, `demo/movielens.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from slatewise.cli import run_main
from slatewise_train.demo import movielens
from slatewise_train.demo.simulated import experiment
from slatewise_train.demo.simulated.experiment import ALONE, TRADES, Result
from slatewise_train.demo.simulated.world import WorldConfig, pick_items
from slatewise_train.evaluation.metrics import interval
from slatewise_train.evaluation.report import Interval, difference_cell, interval_cell

# Small batches: with many slates in a step, `set` stays equal to `point` for most of the training.
TRAIN = """\
epochs = {epochs}
cascade_epochs = {epochs}
batch_events = 384
learning_rate = 0.004
embedding_std = 0.2
warmup = 0.05
cascade_windows = 256
cascade_positions = 11
id_dropout = 0.0
"""
# A weighted softmax of choices is that of users who look at all positions alike. The other list-wise losses are not.
CLICK_LOSS = 'slate_loss = "softmax"\n'
CLICK_EPOCHS = 3  # a ranker of few clicks with large weights overfits after them
LOSSES = ("lambda", "softmax", "neural_ndcg", "bce")


def films_of(source: Path | None, folder: Path, count: int) -> pl.DataFrame:
    """Return the items of the worlds: films of MovieLens latest-small."""
    tables = folder / "ml-latest-small"
    if not (tables / "items.parquet").exists():
        movielens.main(["ml-latest-small", "--out", str(tables), *(["--source", str(source)] if source else [])])
    return pick_items(pl.read_parquet(tables / "events.parquet"), pl.read_parquet(tables / "items.parquet"), count)


def percent(value: Interval) -> str:
    mean, low, high = (f"{100 * number:.1f}" for number in value)
    return f"{mean} % ({low} to {high})"


class Report:
    """Trains one ranker for each world, and collects the results as Markdown."""

    def __init__(self, folder: Path, users: int, seed: int, films: pl.DataFrame) -> None:
        self.folder = folder
        self.users = users
        self.seed = seed
        self.films = films
        self.text: list[str] = []

    def run(self, name: str, lines: str, **switches: float) -> Result:
        """Train and score the ranker of a world. lines: of `[train]`; switches: of `WorldConfig`."""
        config = WorldConfig(users=self.users, seed=self.seed, **switches)  # type: ignore[arg-type]  # sizes are ints
        begin = time.perf_counter()
        print(f"\n{name}:", flush=True)
        result = experiment.run_world(self.folder, name, config, self.films, lines)
        print(f"{name}: {(time.perf_counter() - begin) / 60:.1f} minutes", flush=True)
        self.add(f"## {name}", "", *experiment.table(result), "")
        return result

    def add(self, *lines: str) -> None:
        """Print lines, and write all lines so far into results.md."""
        self.text += lines
        print("\n".join(lines), flush=True)
        (self.folder / "results.md").write_text("\n".join(self.text) + "\n", encoding="utf-8")


def measure_neighbours(report: Report, lines: str) -> None:
    """Measure `set` against the oracle, and against MMR."""
    found = report.run("neighbours", lines)
    for name in ("point", ALONE):
        share = percent(experiment.share_of_gain(found, name))
        report.add(f"NDCG@5, set - point: {share} of the difference oracle - {name}")
    frontier = [experiment.add_mmr(found, trade) for trade in TRADES]
    report.add("", *experiment.table(found), "")
    further = interval(found.distance("set") - found.distance("point"))
    report.add(f"genre distance, set - point: {difference_cell(further)}")
    for name in ("point", experiment.as_diverse(found, frontier)):
        distance = interval_cell(interval(found.distance(name)))
        gain = difference_cell(experiment.difference(found, "set", name, 10))
        report.add(f"NDCG@10, set - ({name}): {gain}; distance of {name}: {distance}")
    experiment.plot(found, frontier, report.folder / "simulated.png")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m slatewise_train.demo.simulated",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", type=Path, help="zip or folder of MovieLens latest-small; default: download")
    parser.add_argument("--out", type=Path, default=Path("build/simulated"), help="default: %(default)s")
    parser.add_argument("--users", type=int, default=WorldConfig.users, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=4, help="with neighbours (%(default)s)")
    parser.add_argument("--loss", choices=LOSSES, default="lambda", help="of slates with neighbours (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    films = films_of(args.source, args.out, WorldConfig.items)
    report = Report(args.out, args.users, args.seed, films)
    slates = TRAIN.format(epochs=args.epochs) + f'slate_loss = "{args.loss}"\n'
    clicks = TRAIN.format(epochs=CLICK_EPOCHS) + CLICK_LOSS
    measure_neighbours(report, slates)
    alone = report.run("no-neighbours", slates, neighbours=0.0)
    report.add(f"NDCG@5, set - point: {difference_cell(experiment.difference(alone, 'set', 'point', 5))}", "")
    alike = {"neighbours": 0.0, "fatigue": 0.0}
    fair = report.run("no-bias", clicks, **alike)
    arms = {"naive": "", "weighted": "propensity_power = 1.0\n", "position-bias": "position_bias = true\n"}
    for name, line in arms.items():
        biased = report.run(name, clicks + line, **alike, position_power=1.0)
        shares = experiment.recovered(biased, fair, "point")
        report.add(f"NDCG@10 of {name}, exit point, as a share of no-bias: {percent(shares[0])}")
        report.add(f"the same of the gain over any order: {percent(shares[1])}", "")


if __name__ == "__main__":
    sys.exit(run_main("python -m slatewise_train.demo.simulated", main, sys.argv[1:]))
