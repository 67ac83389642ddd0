"""One cell of the comparison measured with `client.py` and with wrk in turn, on the same server.

Called by: `__main__.py`. Calls: wrk with wrk.lua, if the machine has it (Debian: apt-get install wrk).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from loadtest.peers.contenders import Contender
from loadtest.peers.environments import BUNDLES, HERE, RANKER
from loadtest.peers.measurements import EXACT, Batch, Cell
from loadtest.workload import STEADY, W, Workload

CONNECTIONS = 4
TURNS = 3
SECONDS = 5


def cross_check(count: int, logs: Path) -> Iterator[Cell]:
    """Cells of Slatewise with new users at 4 connections: a closed loop of `count` requests, then wrk, three times."""
    with EXACT.serving(None, logs, STEADY) as contender:
        for turn in range(TURNS):
            cell = Batch(EXACT, None, "closed loop", turn, count, logs).measure_distinct(contender, CONNECTIONS)
            yield cell
            workload = Workload(BUNDLES, RANKER, seed=10 * turn + 9)
            bodies = workload.distinct(W, ceil(2 * SECONDS * cell.per_second))  # more than wrk will send
            labels = Batch(EXACT, None, "wrk", turn, count, logs).labels("distinct")
            yield measure_with_wrk(contender, EXACT.requests(bodies), logs / "wrk.requests", **labels)


def installed() -> bool:
    return shutil.which("wrk") is not None


def measure_with_wrk(contender: Contender, requests: Sequence[bytes], file: Path, **labels: Any) -> Cell:
    """Raises RuntimeError if a request fails, or wrk sends some of them twice."""
    with file.open("wb") as out:
        for request in requests:
            out.write(b"%d\n" % len(request) + request)
    before = contender.cpu_seconds()
    command = ("wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}s", "-s", str(HERE / "wrk.lua"))
    url = f"http://127.0.0.1:{contender.port}"
    process = subprocess.run([*command, url, "--", str(file)], check=True, stdout=subprocess.PIPE, text=True)
    cpu = contender.cpu_seconds() - before
    file.unlink()
    result = json.loads(process.stdout.splitlines()[-1])
    if result["failed"] or result["requests"] > len(requests) - CONNECTIONS:
        raise RuntimeError(f"wrk: {result} of {len(requests)} requests")
    return Cell(
        connections=CONNECTIONS,
        requests=result["requests"],
        per_second=round(result["requests"] / result["seconds"], 2),
        p50_ms=result["p50_ms"],
        p99_ms=result["p99_ms"],
        cpu_ms=round(cpu / result["requests"] * 1e3, 2),
        resident_mb=round(contender.resident_mb(), 1),
        **labels,
    )
