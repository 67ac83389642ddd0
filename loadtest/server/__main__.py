"""Throughput, latency, CPU time and memory of a server: python -m loadtest.server [--quick]

Measures the cells of `cells.py`, prints each as a JSON line, and writes a report: cells.jsonl, report.md and plots.
`--soak SECONDS` watches the server's memory instead. The client runs on the same machine as the server.

    python -m loadtest.server --cells w,open --set THREADS=1     a new server, with settings (SLATEWISE_THREADS=1)
    python -m loadtest.server --port 8000                        a running one, without its CPU time and memory
    python -m loadtest.server --soak 600

Called by: the command line, after `make reference-bundle`. Its numbers appear in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

from loadtest.server import report, soak
from loadtest.server.cells import GROUPS, Bench, Row
from loadtest.server_process import RunningServer, ServerProcess, exit_on_sigterm
from loadtest.workload import Workload
from slatewise.process import cpu_name

REQUESTS = 800
QUICK_REQUESTS = 24
RETURNING_CACHE_MB = "1024"  # holds all returning users of all cells


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bundles",
        type=Path,
        default=Path("build/bundles"),
        help="root folder of the bundles, also for the ids of the requests (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a setting of the server; may be repeated",
    )
    parser.add_argument("--port", type=int, help="measure the server at this port, which serves the same bundles")
    parser.add_argument(
        "--cells", default=",".join(GROUPS), help="groups of cells, comma-separated (default: %(default)s)"
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=REQUESTS,
        help="requests in a cell; expensive cells have fewer (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        dest="requests",
        action="store_const",
        const=QUICK_REQUESTS,
        help=f"the same as --requests {QUICK_REQUESTS}: a smoke test",
    )
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="watch memory for so long instead")
    parser.add_argument(
        "--out", type=Path, default=Path("build/loadtest"), help="folder of the report (default: %(default)s)"
    )
    args = parser.parse_args()
    args.cells = args.cells.split(",")
    if unknown := set(args.cells) - set(GROUPS):
        parser.error(f"no such cells: {', '.join(sorted(unknown))}")
    if not all("=" in pair for pair in args.settings):
        parser.error("--set takes NAME=VALUE")
    args.settings = dict(pair.removeprefix("SLATEWISE_").split("=", 1) for pair in args.settings)
    if args.port and (args.soak or args.settings):
        parser.error("--soak and --set cannot be combined with --port")
    if args.requests < 4:
        parser.error("--requests must be at least 4")
    return args


def new_server(args: argparse.Namespace, **settings: str) -> ServerProcess:
    return ServerProcess({"BUNDLES": str(args.bundles), "DRAIN_SECONDS": "0"} | settings | args.settings)


def measure(args: argparse.Namespace, workload: Workload) -> Iterator[Row]:
    """Groups share one server; `returning` has its own, with a history cache for all its users."""
    cold = [name for name in args.cells if name != "returning"]
    for names, settings in (
        (cold, {}),
        ([name for name in args.cells if name == "returning"], {"HISTORY_CACHE_MB": RETURNING_CACHE_MB}),
    ):
        if names:
            with RunningServer(args.port) if args.port else new_server(args, **settings) as server:
                bench = Bench(server, workload, args.requests)
                for name in names:
                    yield from GROUPS[name](bench)


def main() -> None:
    args = arguments()
    exit_on_sigterm()
    args.out.mkdir(parents=True, exist_ok=True)
    # A running server may know the users of an earlier run, so those of this run differ.
    workload = Workload(args.bundles, seed=int(time.time()) if args.port else 0)
    about = [
        cpu_name(),
        f"ranker {workload.folder.parent.name}, version {workload.folder.name}",
        f"a server at port {args.port}"
        if args.port
        else "settings: " + (", ".join(f"{k}={v}" for k, v in args.settings.items()) or "the defaults"),
    ]
    if args.soak:
        with new_server(args, HISTORY_CACHE_MB=str(soak.HISTORY_CACHE_MB)) as server:
            row, samples = soak.soak(server, workload, args.soak)
        print(json.dumps(row))
        (args.out / "soak.json").write_text(json.dumps({"about": about, "row": row, "samples": samples}))
        report.plot_soak(row, samples, args.out / "soak.png")
        return
    rows = []
    with (args.out / "cells.jsonl").open("w") as lines:
        for row in measure(args, workload):
            print(json.dumps(row), flush=True)
            print(json.dumps(row), file=lines, flush=True)
            rows.append(row)
    report.write(args.out, about, rows)


if __name__ == "__main__":
    main()
