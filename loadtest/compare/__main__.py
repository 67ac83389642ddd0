r"""Compare two commits: python -m loadtest.compare --a COMMAND --b COMMAND [--speed]

    python -m loadtest.compare \
        --a ".venv/bin/python -m slatewise serve" --a-folder ../before --a-env PYTHONPATH=app:models \
        --b ".venv/bin/python -m slatewise serve" --b-env PYTHONPATH=app:models

Starts both servers at free ports (SLATEWISE_PORT), each with the bundles of its own folder. By default it sends random
requests to POST /score of both: for every variant and exit, each request cold (a new history), kept (repeated) and
extended (with new events). The answers must have the same JSON text, except `id`, `version`, `timings_ms` and the
version and age of the vector. Prints the differences, and ends with status 1 if there is one.

With --speed it measures POST /rerank instead: latency, CPU time, page faults and memory of the server process, in
rounds that send the same requests to A and to B in turn. Use it on an otherwise idle machine; --neighbours adds busy
processes. It needs Linux.

A server's environment is this process's without PYTHONPATH and SLATEWISE_*, plus --a-env or --b-env.

Called by: the command line. Calls: `requests.py`, `equality.py`, `speed.py`, `server_process.py`.
"""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from loadtest.compare.equality import Comparison
from loadtest.compare.requests import Card, CaseWriter
from loadtest.compare.speed import USERS, Load, busy_processes, measure_rounds, report
from loadtest.server_process import RunningServer, ServerProcess, exit_on_sigterm
from loadtest.workload import Shape, Workload
from slatewise.process import cpu_name


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for side in ("a", "b"):
        group = parser.add_argument_group(f"server {side.upper()}")
        group.add_argument(f"--{side}", required=True, metavar="COMMAND", help="command that starts the server")
        group.add_argument(f"--{side}-folder", type=Path, help="its working folder (default: this one)")
        group.add_argument(
            f"--{side}-env", action="append", default=[], metavar="NAME=VALUE", help="its environment; may be repeated"
        )
    parser.add_argument(
        "--bundles",
        type=Path,
        default=Path("models/bundles"),
        help="bundles to read item and user ids from (default: %(default)s)",
    )
    parser.add_argument("--ranker", help="name of the ranker (default: the first one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--requests",
        type=int,
        default=500,
        help="requests for each variant and exit, or in a round (default: %(default)s)",
    )
    parser.add_argument("--speed", action="store_true", help="measure speed and memory instead of equality")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of --speed (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=1, help="connections of --speed (default: %(default)s)")
    parser.add_argument(
        "--users", choices=USERS, default=USERS[0], help="users of --speed: half new and half grown, new, or known"
    )
    parser.add_argument("--neighbours", type=int, default=0, help="busy processes beside --speed (default: none)")
    parser.add_argument("--history", type=int, default=200, help="events of --speed (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=200, help="candidates of --speed (default: %(default)s)")
    args = parser.parse_args(argv)
    if not all("=" in pair for pair in (*args.a_env, *args.b_env)):
        parser.error("--a-env and --b-env take NAME=VALUE")
    return args


def server(command: str, folder: Path | None, pairs: list[str]) -> ServerProcess:
    kept = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("SLATEWISE_")
    }
    environment = kept | dict(pair.split("=", 1) for pair in pairs)
    return ServerProcess({"DRAIN_SECONDS": "0"}, tuple(shlex.split(command)), folder=folder, environment=environment)


def read_card(one: RunningServer, two: RunningServer, ranker: str) -> Card:
    """The first server's description of the ranker. Exits if the servers have different variants or exits."""
    cards = []
    for each in (one, two):
        models = {model["name"]: model for model in each.get("/models")[1]["models"]}
        cards.append(Card.read(models[ranker]["variants"], each.get(f"/models/{ranker}")[1]))
    if cards[0] != cards[1]:
        raise SystemExit(f"the servers describe {ranker} differently:\n{cards[0]}\n{cards[1]}")
    return cards[0]


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    exit_on_sigterm()
    workload = Workload(args.bundles, args.ranker, args.seed)
    with (
        server(args.a, args.a_folder, args.a_env) as one,
        server(args.b, args.b_folder, args.b_env) as two,
    ):
        if args.speed:
            load = Load(Shape(args.history, args.candidates), args.requests, args.connections, args.users)
            with busy_processes(args.neighbours):
                found = measure_rounds((one, two), workload, load, args.rounds)
            print(f"{cpu_name()}, busy neighbours: {args.neighbours}; {report(load, found)}")
            return
        card = read_card(one, two, workload.folder.parent.name)
        comparison = Comparison((one.port, two.port))
        comparison.run(CaseWriter(workload, card, args.seed), args.requests)
    print(comparison.report())
    if comparison.different:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
