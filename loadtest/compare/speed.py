"""Latency and CPU time of two servers, measured in turn in each round.

Called by: `__main__.py`. Calls: `workload.py`, `client.py`, `server_process.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from math import nan
from statistics import median

from loadtest.client import closed_loop, post
from loadtest.markdown import table
from loadtest.server_process import ServerProcess
from loadtest.workload import Shape, Workload


@dataclass(frozen=True)
class Measurement:
    """One server in one round, in milliseconds."""

    p50: float
    cpu: float  # of the server, for each request


@dataclass(frozen=True)
class Load:
    """The requests of a round: one half from new users, the other half from the same users with one event more."""

    shape: Shape
    requests: int
    connections: int

    def draw(self, workload: Workload) -> list[bytes]:
        first, grown = workload.growing(self.shape, max(1, self.requests // 2), 1)
        return [post("/rerank", body) for body in (*first, *grown)]


def measure(server: ServerProcess, requests: list[bytes], connections: int) -> Measurement:
    """Raises RuntimeError if a request fails."""
    before = server.cpu_seconds()
    outcome = closed_loop(server.port, requests, connections)
    spent = server.cpu_seconds() - before
    if set(outcome.statuses) != {200}:
        raise RuntimeError(f"statuses {dict(outcome.statuses)}")
    return Measurement(outcome.quantile(0.5) * 1e3, spent / len(requests) * 1e3)


def measure_rounds(
    servers: tuple[ServerProcess, ServerProcess], workload: Workload, load: Load, rounds: int
) -> list[tuple[Measurement, Measurement]]:
    """Both servers get the same requests in every round, in random order. A first round warms up and does not count."""
    found = []
    for turn in range(rounds + 1):
        requests = load.draw(workload)
        order = [0, 1]
        random.Random(turn).shuffle(order)
        pair = {k: measure(servers[k], requests, load.connections) for k in order}
        if turn:
            found.append((pair[0], pair[1]))
    return found


def spread(values: list[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def report(load: Load, found: list[tuple[Measurement, Measurement]]) -> str:
    """Medians over the rounds with the least and the greatest value. The ratio B / A is formed in each round."""
    values: dict[str, Callable[[Measurement], float]] = {
        "p50, ms": lambda m: m.p50,
        "CPU a request, ms": lambda m: m.cpu,
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
        f"{load.shape.history} events, {load.shape.candidates} candidates, connections: {load.connections}; medians of "
        f"{len(found)} rounds of {load.requests} requests (least to greatest)"
    )
    return f"{setting}\n\n{table(('', 'A', 'B', 'B / A'), rows)}"
