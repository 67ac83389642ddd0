"""CPU time and peak memory of reading tables of events, by their size: python -m loadtest.training.tables

The tables are made up: Zipf-distributed items, 20 events for each user on average, an action, a label, and an item
table with a list column. Every size is read in a process of its own. Linux alone reports its peak memory. The command
prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from slatewise.cli import run_main
from slatewise_train.config import DataConfig, Head, TablesConfig
from slatewise_train.data import load_data

ITEMS = 100_000
EVENTS_PER_USER = 20
FORMATS = ("parquet", "csv")


def write_tables(folder: Path, events: int, kind: str) -> None:
    """Write events.KIND and items.parquet; ids are text of 8 to 36 characters, as shops have them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    users = max(1, events // EVENTS_PER_USER)
    rank = np.minimum(rng.zipf(1.2, events) - 1, ITEMS - 1)
    spread = rng.integers(0, ITEMS, events)
    item = np.where(rng.random(events) < 0.5, rank, spread)
    table = pl.DataFrame(
        {
            "user": rng.integers(0, users, events),
            "item": item,
            "timestamp": rng.integers(1_600_000_000, 1_700_000_000, events),
            "bought": rng.integers(0, 5, events) == 0,
        }
    ).lazy()
    table = table.select(
        pl.format("6f1c2a9e-0000-4000-8000-{}", pl.col("user").cast(pl.String).str.zfill(12)).alias("user_id"),
        pl.format("sku-{}", "item").alias("item_id"),
        "timestamp",
        pl.when("bought").then(pl.lit("buy")).otherwise(pl.lit("view")).alias("action"),
        pl.col("bought").cast(pl.Int8).alias("label_buy"),
    )
    path = folder / f"events.{kind}"
    table.sink_parquet(path) if kind == "parquet" else table.sink_csv(path)
    genres = pl.Series([[f"g{k % 50}", f"h{k % 7}"] for k in range(ITEMS)])
    items = {"item_id": [f"sku-{k}" for k in range(ITEMS)], "genres": genres, "price": rng.random(ITEMS)}
    pl.DataFrame(items).write_parquet(folder / "items.parquet")


def peak_mb() -> float:
    """Return this process's peak memory. The peak of `getrusage` would include that of the process which started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(folder: Path, kind: str) -> dict[str, Any]:
    """Read the tables in this process."""
    start = peak_mb()
    heads = (Head("next", "next", 1.0), Head("buy", "label", 1.0))
    config = DataConfig("shop", heads, categorical=("genres",), numeric=("price", "popularity"))
    begin = time.process_time()
    data = load_data(config, TablesConfig(str(folder / f"events.{kind}"), str(folder / "items.parquet")))
    seconds = time.process_time() - begin
    return {"events": len(data.sequences.items), "seconds": seconds, "libraries_mb": start, "peak_mb": peak_mb()}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 3_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, default=Path("build/tables"), help="for the tables")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "KIND"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1])))
        return
    print(
        "| events | file | MB on disk | CPU seconds | peak MB | of these, libraries |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for size in args.sizes:
        for kind in FORMATS:
            folder = args.folder / str(size)
            write_tables(folder, size, kind)
            command = [sys.executable, "-m", "loadtest.training.tables", "--measure", str(folder), kind]
            result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
            row = json.loads(result.stdout.splitlines()[-1])
            disk = (folder / f"events.{kind}").stat().st_size / 2**20
            print(
                f"| {size:,} | {kind} | {disk:.0f} | {row['seconds']:.1f} | {row['peak_mb']:.0f} | "
                f"{row['libraries_mb']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(run_main("python -m loadtest.training.tables", main, sys.argv[1:]))
