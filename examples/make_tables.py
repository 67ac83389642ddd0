"""Writes the tables of two examples, baskets and exposures, from ratings of MovieLens latest-small.

    python examples/make_tables.py                                # the 60 users in tests/data
    python examples/make_tables.py --source ml-latest-small.zip   # all 610 users

Needs the training install. Ratings are neither purchases nor impressions, so the tables only have the *form* of such
logs. Items, users and their order in time are real:

- baskets: a basket is what one user rated within the same two minutes. Each row has the time of its basket, and the
  rows of a basket are in random order, because a basket has no order.
- exposures: a slate is what one user rated within the same five minutes, in the order of rating. A film rated 4 or more
  counts as clicked, any other as shown only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from slatewise_train.demo.movielens import read_movielens

ROOT = Path(__file__).parents[1]
BASKET_SECONDS = 120
SLATE_SECONDS = 300


def in_slots(events: pl.DataFrame, seconds: int) -> pl.DataFrame:
    """Return the events by user and time, with the column `slot`: unix seconds rounded down to a multiple.

    Events of one second are in random order: that of the source is the order of film ids, which says nothing.
    """
    time = pl.col("timestamp").cast(pl.Int64)
    events = events.with_columns(timestamp=time, slot=time // seconds * seconds)
    return events.sample(fraction=1.0, shuffle=True, seed=1).sort("user_id", "timestamp", maintain_order=True)


def make_baskets(events: pl.DataFrame) -> pl.DataFrame:
    """Columns customer, product, bought_at (ISO 8601, UTC): the names of the shop's export, not of Slatewise."""
    shuffled = in_slots(events, BASKET_SECONDS).sample(fraction=1.0, shuffle=True, seed=1)
    bought_at = pl.from_epoch("slot").dt.strftime("%Y-%m-%dT%H:%M:%SZ").alias("bought_at")
    return shuffled.sort("slot", maintain_order=True).select(
        pl.col("user_id").alias("customer"), pl.col("item_id").alias("product"), bought_at
    )


def make_exposures(events: pl.DataFrame) -> pl.DataFrame:
    """Columns user_id, item_id, timestamp, slate_id, position (from 1), action (shown or click), label_click."""
    slate = ["user_id", "slot"]
    clicked = pl.col("label_like") == 1
    return in_slots(events, SLATE_SECONDS).select(
        "user_id",
        "item_id",
        pl.col("slot").alias("timestamp"),
        pl.format("{}-{}", *slate).alias("slate_id"),
        pl.int_range(1, pl.len() + 1).over(slate).alias("position"),
        pl.when(clicked).then(pl.lit("click")).otherwise(pl.lit("shown")).alias("action"),
        clicked.cast(pl.Int8).alias("label_click"),
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = ROOT / "tests/data/ml-latest-small"
    parser.add_argument("--source", type=Path, default=source, help="folder or zip of MovieLens latest-small")
    parser.add_argument("--out", type=Path, default=Path("build/data/examples"), help="default: %(default)s")
    args = parser.parse_args(argv)
    events, items = read_movielens("ml-latest-small", args.source)
    for name, table in (("baskets", make_baskets(events)), ("exposures", make_exposures(events))):
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        table.write_csv(folder / "events.csv")
        (items.rename({"item_id": "product"}) if name == "baskets" else items).write_csv(folder / "items.csv")
        print(f"{folder}: events.csv with {len(table)} rows, items.csv with {len(items)} rows")


if __name__ == "__main__":
    main(sys.argv[1:])
