"""Latency, CPU time, page faults and memory of two servers, measured in turn in each round.

Called by: `__main__.py`. Calls: `workload.py`, `client.py`, `server_process.py`.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan
from statistics import median

from loadtest.client import closed_loop, post
from loadtest.markdown import table
from loadtest.server_process import ServerProcess
from loadtest.workload import Shape, Workload

USERS = ("mixed", "distinct", "returning")
KNOWN_USERS = 40
BUSY = (sys.executable, "-c", "while True: pass")


@dataclass(frozen=True)
class Measurement:
    """One server in one round."""

    p50: float  # milliseconds
    p99: float
    cpu: float  # milliseconds of the server for each request
    faults: float  # minor page faults of the server for each request
    resident: float  # MB, after the round


@dataclass(frozen=True)
class Load:
    """The requests of a round, by users.

    mixed: one half from new users, the other half from the same users with one event more. distinct: each from a new
    user. returning: from users whose history the server encoded just before.
    """

    shape: Shape
    requests: int
    connections: int
    users: str = "mixed"

    def draw(self, workload: Workload) -> tuple[list[bytes], list[bytes]]:
        """Return the requests to send before the measurement, and those to measure."""
        first: list[bytes] = []
        if self.users == "returning":
            known = min(KNOWN_USERS, self.requests)
            first, measured = workload.returning(self.shape, known, -(-self.requests // known))
            measured = measured[: self.requests]
        elif self.users == "distinct":
            measured = workload.distinct(self.shape, self.requests)
        else:
            new, grown = workload.growing(self.shape, max(1, self.requests // 2), 1)
            measured = [*new, *grown]
        return [post("/rerank", body) for body in first], [post("/rerank", body) for body in measured]


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Run processes beside the servers that use all the CPU time that they get."""
    processes = [subprocess.Popen(BUSY) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(server: ServerProcess, first: list[bytes], requests: list[bytes], connections: int) -> Measurement:
    """Raises RuntimeError if a request fails."""
    if first:
        closed_loop(server.port, first, connections)
    cpu = server.cpu_seconds()
    faults = server.minor_faults()
    outcome = closed_loop(server.port, requests, connections)
    cpu = server.cpu_seconds() - cpu
    faults = server.minor_faults() - faults
    if set(outcome.statuses) != {200}:
        raise RuntimeError(f"statuses {dict(outcome.statuses)}")
    return Measurement(
        outcome.quantile(0.5) * 1e3,
        outcome.quantile(0.99) * 1e3,
        cpu / len(requests) * 1e3,
        faults / len(requests),
        server.resident_mb(),
    )


def measure_rounds(
    servers: tuple[ServerProcess, ServerProcess], workload: Workload, load: Load, rounds: int
) -> list[tuple[Measurement, Measurement]]:
    """Both servers get the same requests in every round, in random order. A first round warms up and does not count."""
    found = []
    for turn in range(rounds + 1):
        first, requests = load.draw(workload)
        order = [0, 1]
        random.Random(turn).shuffle(order)
        pair = {k: measure(servers[k], first, requests, load.connections) for k in order}
        if turn:
            found.append((pair[0], pair[1]))
    return found


def spread(values: list[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def report(load: Load, found: list[tuple[Measurement, Measurement]]) -> str:
    """Medians over the rounds with the least and the greatest value. The ratio B / A is formed in each round."""
    values: dict[str, Callable[[Measurement], float]] = {
        "p50, ms": lambda m: m.p50,
        "p99, ms": lambda m: m.p99,
        "CPU a request, ms": lambda m: m.cpu,
        "minor page faults a request": lambda m: m.faults,
        "resident MB": lambda m: m.resident,
    }
    rows = [
        (
            name,
            spread([value(a) for a, _ in found], 2),
            spread([value(b) for _, b in found], 2),
            spread([value(b) / value(a) if value(a) else nan for a, b in found], 3),  # few requests: no tick of CPU
        )
        for name, value in values.items()
    ]
    setting = (
        f"{load.shape.history} events, {load.shape.candidates} candidates, users: {load.users}, connections: "
        f"{load.connections}; medians of {len(found)} rounds of {load.requests} requests (least to greatest)"
    )
    return f"{setting}\n\n{table(('', 'A', 'B', 'B / A'), rows)}"
