"""Share of the engine's throughput that the server reaches: python -m loadtest.server.overhead

Each round measures two things in turn, for new users and for returning ones. First the server at 4 connections with
requests of shape W. Then the engine alone, one single-threaded process for each core, while the same client loads a
null server at the server's rate and answer size; for returning users it has the encoded histories. The difference is
HTTP, JSON, id look-up and scheduling. Prints one JSON line for each measurement, then the medians.

Called by: the command line, after `make reference-bundle`. Its numbers appear in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from loadtest.client import closed_loop, limit_time, open_loop, post
from loadtest.compare.speed import Load
from loadtest.server_process import ServerProcess, exit_on_sigterm
from loadtest.workload import STEADY, W, Workload
from slatewise.bundle.loader import load_rankers
from slatewise.inference.chunks import run_all
from slatewise.process import bound_malloc, cpu_name
from slatewise.ranking.cascade import extend, run_cascade
from slatewise.schemas import RankRequest
from tests.support.network import free_port

CONNECTIONS = 4
INPUTS = 40


USERS = ("distinct", "returning")


def engine(bundles: Path, orders: Connection) -> None:
    """Child process: receive (users, seconds), work that long, send (requests, CPU seconds). `None` ends it."""
    bound_malloc()  # as the server does
    ranker = next(iter(load_rankers(bundles).values()))
    engine = ranker.engines[ranker.default_variant]
    requests = [RankRequest.model_validate_json(body) for body in Workload(bundles).distinct(W, INPUTS)]
    inputs = [(ranker.history(r), ranker.candidates(r, r.request_time or 0.0)[0]) for r in requests]
    states = [run_all(extend(engine, engine.start, 0, history, False)) for history, _ in inputs]
    numbers = cycle(range(INPUTS))
    orders.send(None)
    while order := orders.recv():
        users, seconds = order
        end = time.perf_counter() + seconds
        cpu = time.process_time()
        done = 0
        while time.perf_counter() < end:
            k = next(numbers)
            history, candidates = inputs[k]
            state = states[k] if users == "returning" else run_all(extend(engine, engine.start, 0, history, False))
            exit = ranker.manifest.default_exit
            run_all(run_cascade(engine, candidates, state, ranker.default_meta, exit, False, []))
            done += 1
        orders.send((done, time.process_time() - cpu))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, default=Path("build/bundles"))
    parser.add_argument(
        "--requests", type=int, default=400, help="requests to the server in a round (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    exit_on_sigterm()
    context = multiprocessing.get_context("spawn")
    engines = []
    for _ in os.sched_getaffinity(0):
        ours, theirs = context.Pipe()
        context.Process(target=engine, args=(args.bundles, theirs), daemon=True).start()
        ours.recv()
        engines.append(ours)

    found: dict[str, list[dict[str, float]]] = {users: [] for users in USERS}
    with ServerProcess({"BUNDLES": str(args.bundles), "DRAIN_SECONDS": "0"}) as server:
        steady = [post("/rerank", body) for body in Workload(args.bundles, seed=-1).distinct(W, STEADY)]
        size = len(closed_loop(server.port, steady, CONNECTIONS, keep_bodies=True).bodies[-1])
        port = free_port()
        with ServerProcess(
            command=(sys.executable, "-m", "loadtest.server.null_server", str(port), str(size)), port=port, ready="/"
        ) as null:
            for turn in range(args.rounds):
                workload = Workload(args.bundles, seed=turn)
                for users in USERS:
                    first, requests = Load(W, args.requests, CONNECTIONS, users).draw(workload)
                    if first:
                        closed_loop(server.port, first, CONNECTIONS)
                    cpu = server.cpu_seconds()
                    served = closed_loop(server.port, requests, CONNECTIONS)
                    server_cpu = (server.cpu_seconds() - cpu) / len(requests)
                    for orders in engines:
                        orders.send((users, served.seconds))
                    open_loop(null.port, limit_time(served.seconds, cycle(requests)), served.per_second, CONNECTIONS)
                    results = [orders.recv() for orders in engines]
                    done = sum(number for number, _ in results)
                    engine_cpu = sum(seconds for _, seconds in results) / done
                    row = {
                        "server_per_second": served.per_second,
                        "engine_per_second": done / served.seconds,
                        "share": served.per_second * served.seconds / done,
                        "server_cpu_ms": server_cpu * 1e3,
                        "engine_cpu_ms": engine_cpu * 1e3,
                        "beside_the_engine_cpu_ms": (server_cpu - engine_cpu) * 1e3,
                    }
                    found[users].append(row)
                    print(line(users, row), flush=True)
    for orders in engines:
        orders.send(None)
    print(cpu_name())
    for users, rows in found.items():
        print(line(users, {name: median(row[name] for row in rows) for name in rows[0]}))


def line(users: str, row: dict[str, float]) -> str:
    return json.dumps({"users": users} | {name: round(value, 3) for name, value in row.items()})


if __name__ == "__main__":
    main()
