"""Look-up of item ids in tables of 5,000 to 10 million items: python -m loadtest.engine.id_lookup

Compares the service's dict (one loop in C) with a binary search in a sorted array of bytes: microseconds for the 456
ids of one request of shape W, and the memory of the table. The CPU caches are swept between two look-ups, as the
model's weights do in a server.

Called by: the command line. Its numbers appear in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import psutil

from loadtest.markdown import table
from slatewise.bundle.features import rows_of
from slatewise.process import cpu_name

IDS = 456  # in one request of shape W


def resident_mb() -> float:
    return float(psutil.Process().memory_info().rss / 2**20)


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
        requests = [
            json.loads(json.dumps(request)) for request in requests
        ]  # new string objects, as in a parsed request
        before = resident_mb()
        rows_by_id = dict(zip(ids, range(2, items + 2), strict=True))
        table_mb = resident_mb() - before
        in_order = np.array(ids, "S")  # the ids ascend
        for name, look_up in (("dict", partial(rows_of, rows_by_id)), ("binary search", partial(search, in_order))):
            rows.append({"items": items, "method": name, "us": microseconds(look_up, requests, sweep)})
        rows[-2]["mb"] = round(table_mb)
        rows[-1]["mb"] = round(in_order.nbytes / 2**20)
    titles = ("items", "method", f"us for {IDS} ids", "MB of the table without its ids")
    print(f"{cpu_name()}\n")
    print(table(titles, ((f"{row['items']:,}", row["method"], row["us"], row["mb"]) for row in rows)))
    print(json.dumps({"machine": cpu_name(), "rows": rows}))


if __name__ == "__main__":
    main()
