"""Times at given rates against a server with the reference ranker, with what each side needed.

Called by: `overload.py`. Calls: `flood.py`, `loadtest/server_process.py`, `workload.py`.
"""

from __future__ import annotations

import http.client
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtest.chaos.flood import Answer, Flood, percentile, send
from loadtest.chaos.watched_server import SLOW
from loadtest.client import closed_loop, limit_time, post
from loadtest.server_process import SERVE, ServerProcess
from loadtest.workload import Shape, Workload

BUNDLES = Path("build/bundles")
SETTINGS = {"BUNDLES": str(BUNDLES), "HISTORY_CACHE_MB": "0", "DRAIN_SECONDS": "0", "SLOW_MS": "0"}
QUIET = ("sh", "-c", 'exec "$@" 2>/dev/null', "sh")
SHAPE = Shape(256, 1_300)
DIFFERENT = 100  # requests of a kind
CAPACITY_SECONDS = 5.0


@dataclass(frozen=True)
class Step:
    """A time at one rate."""

    name: str
    seconds: float
    answers: list[Answer]
    server_cpu: float  # seconds
    client_cpu: float
    resident_mb: float
    livez: list[tuple[float, int]]  # (latency, status)

    @property
    def ranked(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.is_good]

    @property
    def refused(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.is_good]

    @property
    def goodput(self) -> float:
        return len(self.ranked) / self.seconds

    def p(self, q: float) -> float:
        """Milliseconds of the ranked answers."""
        return 1e3 * percentile([answer.latency for answer in self.ranked], q)

    @property
    def cells(self) -> tuple[str, ...]:
        exits = Counter(answer.exit if answer.status == 200 else str(answer.status) for answer in self.answers)
        refused = [answer.latency for answer in self.refused]
        return (
            self.name,
            f"{len(self.answers) / self.seconds:.0f}",
            f"{self.goodput:.0f}",
            ", ".join(f"{exit} {count / len(self.answers):.0%}" for exit, count in exits.most_common()),
            f"{self.p(0.5):.0f}",
            f"{self.p(0.99):.0f}",
            f"{1e3 * percentile(refused, 0.99):.0f}" if refused else "",
            f"{self.server_cpu / self.seconds:.2f}",
            f"{self.client_cpu / self.seconds:.2f}",
            f"{self.resident_mb:.0f}",
        )


COLUMNS = (
    "load",
    "sent/s",
    "ranked/s",
    "answers",
    "p50 ms",
    "p99 ms",
    "refused p99 ms",
    "CPU of the server, cores",
    "of the client",
    "MB",
)


@contextmanager
def probing(port: int) -> Iterator[list[tuple[float, int]]]:
    """Ask /livez ten times a second, each time on a new connection."""
    found: list[tuple[float, int]] = []
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.1):
            begin = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            try:
                connection.request("GET", "/livez")
                status = connection.getresponse().status
            except OSError:
                status = 0
            finally:
                connection.close()
            found.append((time.perf_counter() - begin, status))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


class Bench:
    """Requests, and the capacity for each kind of them. steps: all that were measured, for the table."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.workload = Workload(BUNDLES, "reference")
        self.steps: list[Step] = []
        self.requests = self.of(SHAPE)

    def of(self, shape: Shape, **members: object) -> list[bytes]:
        return [post("/rerank", body) for body in self.workload.distinct(shape, DIFFERENT, **members)]

    def server(self, **settings: str) -> ServerProcess:
        return ServerProcess(SETTINGS | settings, command=(*QUIET, *SERVE))

    def slow_server(self, milliseconds: int) -> ServerProcess:
        """A server whose model takes so long for each call."""
        command = (*QUIET, sys.executable, "-m", "loadtest.chaos.watched_server")
        return ServerProcess(SETTINGS, command, environment=dict(os.environ) | {SLOW: str(milliseconds)})

    def capacity(self, server: ServerProcess, requests: list[bytes]) -> float:
        """Requests a second in a closed loop of four connections."""
        endless = (request for _ in iter(int, 1) for request in requests)
        return closed_loop(server.port, limit_time(CAPACITY_SECONDS, endless), 4).per_second

    def work(self, server: ServerProcess, requests: list[bytes]) -> float:
        """CPU seconds of a request that has the server to itself, so that its answer is a full one.

        Not the time until its answer, because idle threads take parts of it.
        """
        endless = (request for _ in iter(int, 1) for request in requests)
        before = server.cpu_seconds()
        outcome = closed_loop(server.port, limit_time(CAPACITY_SECONDS, endless), 1)
        return (server.cpu_seconds() - before) / len(outcome.latencies)

    def at_rate(self, server: ServerProcess, name: str, rate: float, requests: list[bytes]) -> Step:
        return self.flood(server, name, Flood([requests], [(rate, self.seconds)]))

    def flood(self, server: ServerProcess, name: str, flood: Flood) -> Step:
        before = server.cpu_seconds()
        with probing(server.port) as livez:
            answers, client_cpu = send(server.port, flood)
        spent = server.cpu_seconds() - before
        seconds = sum(seconds for _, seconds in flood.rates)
        found = Step(name, seconds, answers, spent, client_cpu, server.resident_mb(), livez)
        print("overload:", *found.cells, file=sys.stderr, flush=True)
        self.steps.append(found)
        return found
