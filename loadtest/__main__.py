"""What a server does under load: python -m loadtest [--quick]

Measures a matrix of cells (`cells.py`), each a JSON line as soon as it is done, and writes a report: cells.jsonl, report.md and
plots. `--soak SECONDS` watches the server's memory instead. The client runs on the same machine as the server.

    python -m loadtest --cells w,open --set THREADS=1     our own server, with settings (SLATEWISE_THREADS=1)
    python -m loadtest --port 8000                        one that runs: then without its CPU time and memory
    python -m loadtest --soak 600

Before: a bundle (`make reference-bundle`). After: docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from loadtest import report, soak
from loadtest.cells import GROUPS, Bench, Row
from loadtest.server import Running, Server
from loadtest.workload import Workload
from slatewise.process import cpu_name

REQUESTS = 800
QUICK_REQUESTS = 24
RETURNING_CACHE_MB = "1024"  # more than all returning users of the matrix fill


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bundles",
        type=Path,
        default=Path("build/bundles"),
        help="root of the bundles, also for the ids of the requests",
    )
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a setting of the server; repeat for more",
    )
    parser.add_argument(
        "--port", type=int, help="measure the server that runs here, started by somebody else on the same bundles"
    )
    parser.add_argument("--cells", default=",".join(GROUPS), help="which groups (default: %(default)s)")
    parser.add_argument(
        "--requests",
        type=int,
        default=REQUESTS,
        help="of a cell; fewer where they are expensive (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        dest="requests",
        action="store_const",
        const=QUICK_REQUESTS,
        help=f"--requests {QUICK_REQUESTS}: does it run at all?",
    )
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="no cells, but memory over that long")
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
        parser.error("--soak and --set need a server of our own")
    if args.requests < 4:
        parser.error("--requests takes at least 4")
    return args


def own_server(args: argparse.Namespace, **settings: str) -> Server:
    return Server({"BUNDLES": str(args.bundles), "DRAIN_SECONDS": "0"} | settings | args.settings)


def measure(args: argparse.Namespace, workload: Workload) -> Iterator[Row]:
    """Cold cells share one server; the returning users have one of their own, with room for all of them."""
    cold = [name for name in args.cells if name != "returning"]
    for names, settings in (
        (cold, {}),
        ([name for name in args.cells if name == "returning"], {"HISTORY_CACHE_MB": RETURNING_CACHE_MB}),
    ):
        if names:
            with Running(args.port) if args.port else own_server(args, **settings) as server:
                bench = Bench(server, workload, args.requests)
                for name in names:
                    yield from GROUPS[name](bench)


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and the server ends with it
    args.out.mkdir(parents=True, exist_ok=True)
    workload = Workload(
        args.bundles, seed=int(time.time()) if args.port else 0
    )  # a server that runs on has met the users of seed 0
    about = [
        cpu_name(),
        f"ranker {workload.folder.parent.name}, version {workload.folder.name}",
        f"a server at port {args.port}"
        if args.port
        else "settings: " + (", ".join(f"{k}={v}" for k, v in args.settings.items()) or "the defaults"),
    ]
    if args.soak:
        with own_server(args, HISTORY_CACHE_MB=str(soak.HISTORY_CACHE_MB)) as server:
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
