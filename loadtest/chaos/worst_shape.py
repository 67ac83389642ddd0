"""R30. The largest requests first, then a mix: the memory of the mix stays within 5 % of what the largest ones needed.

The bundle is the demo with its real variants. The largest request has as many events and candidates as the settings
allow, and several are under way at once. The history cache is full before the first of them. The memory depends on
which steps of several requests meet, and on the free space between the blocks of the heap, so the largest requests
go on for over a thousand: measured, 60 of them need 200 MB, 600 need 214, and 3,000 need 221.

The memory is the kernel's own record of the largest resident size, which misses no peak: Linux only.

Called by: `__main__.py`, and the command line: python -m loadtest.chaos.worst_shape [--seconds 120]. Calls:
`loadtest/client.py`, `workload.py`, `report.py`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from loadtest.chaos.report import Row, conclude
from loadtest.client import closed_loop, limit_time, post
from loadtest.server_process import ServerProcess, exit_on_sigterm
from loadtest.workload import Shape, Workload

BUNDLES = Path("models/bundles")
CONNECTIONS = 4
LARGEST = Shape(4_096, 4_096)
SET_WISE = 1_024  # most candidates of the set-wise exit
ROUNDS = 20  # of the largest requests
ROUND = 60  # requests
CACHE_MB = 16
CACHE_USERS = 300  # whose histories fill the cache
FULL = 0.9  # least share of the cache's limit at which it counts as full: the next history may not fit
CACHED = "slatewise_history_cache_bytes "
TOLERANCE = 0.05


def largest(workload: Workload) -> Iterator[bytes]:
    """Half of them with the set-wise exit, which has its own limit of candidates; 30 of a kind follow each other."""
    set_wise = Shape(LARGEST.history, SET_WISE)
    for _ in range(ROUNDS):
        yield from workload.distinct(LARGEST, ROUND // 2)
        yield from workload.distinct(set_wise, ROUND // 2, exit="set")


def ceiling(server: ServerProcess, requests: Iterable[bytes]) -> tuple[float, int]:
    """(largest resident MB while the requests are answered, number of answers). Raises if one is not 200."""
    forget_peak(server.process.pid)
    outcome = closed_loop(server.port, (post("/rerank", body) for body in requests), CONNECTIONS)
    if set(outcome.statuses) != {200}:
        raise RuntimeError(f"statuses {dict(outcome.statuses)}")
    return peak_mb(server.process.pid), len(outcome.latencies)


def peak_mb(process: int) -> float:
    """Largest resident MB of a process since its start, or since `forget_peak`."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def forget_peak(process: int) -> None:
    Path(f"/proc/{process}/clear_refs").write_text("5")


def cached_mb(server: ServerProcess) -> float:
    """MB in the history cache."""
    lines = server.get("/metrics")[1].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(CACHED)) / 2**20


def measure(seconds: float) -> Row:
    """Measure the demo. Say how far it is on standard error."""
    settings = {"BUNDLES": str(BUNDLES), "HISTORY_CACHE_MB": str(CACHE_MB), "DRAIN_SECONDS": "0"}
    workload = Workload(BUNDLES)
    with ServerProcess(settings) as server:
        small = server.resident_mb()
        users = workload.distinct(Shape(LARGEST.history, 1), CACHE_USERS)
        warm, count = ceiling(server, itertools.chain(users, largest(workload)))
        cached = cached_mb(server)
        print(f"worst_shape: {small:.0f} MB, then {warm:.0f} MB", file=sys.stderr, flush=True)
        mix_of_sizes = workload.endless(LARGEST.history, LARGEST.candidates)
        begin = time.monotonic()
        mix, asked = ceiling(server, limit_time(seconds, mix_of_sizes))
        took = time.monotonic() - begin
    numbers = (
        f"{small:.0f} MB at the start",
        f"{warm:.0f} MB in {count:,} of the largest, {cached:.1f} MB of it cached histories",
        f"{mix:.0f} MB in {asked:,} of {took:.0f} s",
    )
    return Row(
        "R30",
        f"largest memory of a mix at most {TOLERANCE:.0%} above that of the largest requests with a full history cache",
        f"{mix / warm - 1:+.1%}: {', '.join(numbers)}",
        mix <= warm * (1 + TOLERANCE) and cached >= FULL * CACHE_MB,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.chaos.worst_shape", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    seconds = parser.parse_args().seconds
    exit_on_sigterm()
    return conclude([measure(seconds)])


if __name__ == "__main__":
    sys.exit(main())
