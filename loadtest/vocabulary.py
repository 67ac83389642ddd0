"""Ids to rows, with tables of 5,000 to 10 million items: python -m loadtest.vocabulary

The service's way (a dict, one loop in C) beside a sorted array of bytes with a binary search: microseconds for the 456 ids of
W, and the memory of the table. Between two look-ups the caches are swept, as the model's weights sweep them in a server.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from slatewise.bundle.features import rows_of
from slatewise.process import cpu_name

IDS = 456  # of one request W


def resident_mb() -> float:
    return (
        next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmRSS")
        )
        / 1024
    )


def microseconds(look_up: Callable[[list[str]], object], requests: list[list[str]], sweep: np.ndarray) -> float:
    seconds = []
    for ids in requests:
        sweep += 1.0
        begin = time.perf_counter()
        look_up(ids)
        seconds.append(time.perf_counter() - begin)
    return round(median(seconds) * 1e6, 1)


def search(in_order: np.ndarray, ids: list[str]) -> np.ndarray:
    return np.searchsorted(in_order, np.array(ids, "S"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[5_000, 100_000, 10_000_000])
    parser.add_argument("--requests", type=int, default=200)
    args = parser.parse_args()
    rng = random.Random(0)
    sweep = np.zeros(4_000_000, np.float32)
    rows = []
    for items in args.items:
        ids = [str(k * 7 + 10**8) for k in range(items)]
        requests = [[ids[rng.randrange(items)][:] for _ in range(IDS)] for _ in range(args.requests)]
        requests = [json.loads(json.dumps(request)) for request in requests]  # new strings, as from the wire
        before = resident_mb()
        table = dict(zip(ids, range(2, items + 2), strict=True))
        table_mb = resident_mb() - before
        in_order = np.array(ids, "S")  # they ascend
        for name, look_up in (("dict", partial(rows_of, table)), ("binary search", partial(search, in_order))):
            rows.append({"items": items, "way": name, "us": microseconds(look_up, requests, sweep)})
        rows[-2]["mb"] = round(table_mb)
        rows[-1]["mb"] = round(in_order.nbytes / 2**20)
    print(
        f"{cpu_name()}\n\n| items | way | us for {IDS} ids | MB of the table, its ids not counted |\n| --- | --- | --- | --- |"
    )
    for row in rows:
        print(f"| {row['items']:,} | {row['way']} | {row['us']} | {row['mb']} |")
    print(json.dumps({"machine": cpu_name(), "rows": rows}))


if __name__ == "__main__":
    main()
