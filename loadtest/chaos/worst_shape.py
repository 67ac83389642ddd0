"""R30. The largest requests first, then a mix: the memory of the mix stays within 5 % of what the largest ones needed.

The bundle is the demo with its real variants. The largest request has as many events and candidates as the settings
allow, and several are under way at once.

Called by: `__main__.py`, and the command line: python -m loadtest.chaos.worst_shape [--seconds 120]. Calls:
`loadtest/client.py`, `workload.py`, `report.py`.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from loadtest.chaos.report import Row, conclude
from loadtest.client import closed_loop, limit_time, post
from loadtest.server_process import ServerProcess, exit_on_sigterm
from loadtest.workload import Shape, Workload

BUNDLES = Path("models/bundles")
CONNECTIONS = 4
LARGEST = Shape(4_096, 4_096)
SET_WISE = 1_024  # most candidates of the set-wise exit
WARM_UP = 60  # largest requests
CACHE_MB = 16
CACHE_USERS = 300  # whose histories fill the cache
TOLERANCE = 0.05


def largest(workload: Workload, count: int) -> list[bytes]:
    """Half of them with the set-wise exit, which has its own limit of candidates."""
    set_wise = Shape(LARGEST.history, SET_WISE)
    half = count // 2
    return workload.distinct(LARGEST, half) + workload.distinct(set_wise, count - half, exit="set")


def ceiling(server: ServerProcess, requests: Iterable[bytes]) -> tuple[float, int]:
    """(largest resident MB while the requests are answered, number of answers). Raises if one is not 200."""
    most = server.resident_mb()
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.1):
            most = max(most, server.resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        outcome = closed_loop(server.port, (post("/rerank", body) for body in requests), CONNECTIONS)
    finally:
        over.set()
        watcher.join()
    if set(outcome.statuses) != {200}:
        raise RuntimeError(f"statuses {dict(outcome.statuses)}")
    return most, len(outcome.latencies)


def measure(seconds: float) -> Row:
    """Measure the demo. Say how far it is on standard error."""
    settings = {"BUNDLES": str(BUNDLES), "HISTORY_CACHE_MB": str(CACHE_MB), "DRAIN_SECONDS": "0"}
    workload = Workload(BUNDLES)
    with ServerProcess(settings) as server:
        small = server.resident_mb()
        users = workload.distinct(Shape(LARGEST.history, 1), CACHE_USERS)
        warm, count = ceiling(server, users + largest(workload, WARM_UP))
        print(f"worst_shape: {small:.0f} MB, then {warm:.0f} MB", file=sys.stderr, flush=True)
        mix_of_sizes = workload.endless(LARGEST.history, LARGEST.candidates)
        begin = time.monotonic()
        mix, asked = ceiling(server, limit_time(seconds, mix_of_sizes))
        took = time.monotonic() - begin
    number = f"{small:.0f} MB at the start, {warm:.0f} MB after {count}, {mix:.0f} MB in {asked:,} of {took:.0f} s"
    return Row(
        "R30",
        f"largest memory of a mix at most {TOLERANCE:.0%} above that of the warm-up",
        f"{mix / warm - 1:+.1%}: {number}",
        mix <= warm * (1 + TOLERANCE),
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.chaos.worst_shape", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    seconds = parser.parse_args().seconds
    exit_on_sigterm()
    return conclude([measure(seconds)])


if __name__ == "__main__":
    sys.exit(main())
