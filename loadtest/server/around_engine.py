"""CPU time of a request around the engine: python -m loadtest.server.around_engine

A server whose engine returns the results of its first call with the same shapes, so that only the server's own work is
left: HTTP, JSON, ids to rows, scheduling, metrics, and the wake-ups of threads. Requests of shape W at 4 connections,
from new and from returning users. Prints medians over the rounds: CPU time of the event loop's thread and of the other
threads, context switches and minor page faults of a request.

What the engine and the server cost each other, by evicting each other's data from the CPU caches, is not in these
numbers; `overhead.py` has it.

Called by: the command line, after `make reference-bundle`. Linux only: it reads /proc. Its numbers appear in
docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

from loadtest.client import closed_loop
from loadtest.compare.speed import Load
from loadtest.markdown import table
from loadtest.server_process import ServerProcess, exit_on_sigterm
from loadtest.workload import W, Workload
from slatewise.cli import main as slatewise
from slatewise.inference.engine import Engine
from slatewise.process import cpu_name

CONNECTIONS = 4
COLUMNS = ("loop's thread, ms", "other threads, ms", "together, ms", "context switches", "minor page faults")


def serve() -> int:
    """Run `slatewise serve` with recorded results of the graphs."""
    run = Engine.run
    recorded: dict[Any, Any] = {}

    def replay(self: Engine, graph: str, feeds: dict[str, Any]) -> Any:
        key = (id(self), graph, *(feed.shape for feed in feeds.values()))
        if key not in recorded:
            recorded[key] = run(self, graph, feeds)
        return recorded[key]

    Engine.run = replay  # type: ignore[method-assign]
    return slatewise(["serve"])


def counters(server: ServerProcess) -> tuple[float, float, float, float]:
    """Milliseconds of CPU of the main thread and of the others, context switches and minor page faults so far."""
    pid = server.process.pid
    loop = others = switches = 0.0
    for task in Path(f"/proc/{pid}/task").iterdir():
        milliseconds = int((task / "schedstat").read_text().split()[0]) / 1e6
        if int(task.name) == pid:
            loop += milliseconds
        else:
            others += milliseconds
        status = (task / "status").read_text().splitlines()
        switches += sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)
    return loop, others, switches, server.minor_faults()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, default=Path("build/bundles"))
    parser.add_argument("--requests", type=int, default=300, help="in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", action="store_true", help="be the server")
    args = parser.parse_args()
    if args.serve:
        raise SystemExit(serve())
    exit_on_sigterm()
    command = (sys.executable, "-m", "loadtest.server.around_engine", "--serve")
    rows = []
    with ServerProcess({"BUNDLES": str(args.bundles), "DRAIN_SECONDS": "0"}, command) as server:
        workload = Workload(args.bundles)
        for users in ("distinct", "returning"):
            found: list[tuple[float, ...]] = []
            for turn in range(args.rounds + 1):
                first, requests = Load(W, args.requests, CONNECTIONS, users).draw(workload)
                if first:
                    closed_loop(server.port, first, CONNECTIONS)
                before = counters(server)
                closed_loop(server.port, requests, CONNECTIONS)
                loop, others, *rest = ((b - a) / len(requests) for a, b in zip(before, counters(server), strict=True))
                if turn:  # the first one warms up
                    found.append((loop, others, loop + others, *rest))
            rows.append(
                [
                    users,
                    *(
                        f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
                        for values in zip(*found, strict=True)
                    ),
                ]
            )
    print(f"{cpu_name()}; medians of {args.rounds} rounds of {args.requests} requests (least to greatest)\n")
    print(table(("users", *COLUMNS), rows))


if __name__ == "__main__":
    main()
