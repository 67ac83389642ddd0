"""Share of the engine's throughput that the server reaches: python -m loadtest.server.overhead

Each round measures two things in turn. First the server at 4 connections with requests of shape W, each from a new
user. Then the engine alone, one single-threaded process for each core, while the same client loads a null server at
the server's rate and answer size. The difference is HTTP, JSON, id look-up and scheduling. Prints one JSON line a
round, then the medians.

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
from loadtest.server_process import ServerProcess, exit_on_sigterm
from loadtest.workload import STEADY, W, Workload
from slatewise.bundle.loader import load_rankers
from slatewise.process import cpu_name
from slatewise.schemas import RankRequest
from tests.support.network import free_port

CONNECTIONS = 4
INPUTS = 40


def engine(bundles: Path, orders: Connection) -> None:
    """Child process: receive seconds, score requests of shape W that long, send (requests, CPU seconds). 0 ends it."""
    ranker = next(iter(load_rankers(bundles).values()))
    engine = ranker.engines[ranker.default_variant]
    requests = [RankRequest.model_validate_json(body) for body in Workload(bundles).distinct(W, INPUTS)]
    inputs = cycle([(ranker.history(r), ranker.candidates(r, r.request_time or 0.0)[0]) for r in requests])
    orders.send(None)
    while seconds := orders.recv():
        end = time.perf_counter() + seconds
        cpu = time.process_time()
        done = 0
        while time.perf_counter() < end:
            engine.score(*next(inputs), ranker.default_meta, ranker.manifest.default_exit)
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

    def posts(seed: int, number: int) -> list[bytes]:
        return [post("/rerank", body) for body in Workload(args.bundles, seed=seed).distinct(W, number)]

    rounds: list[dict[str, float]] = []
    with ServerProcess({"BUNDLES": str(args.bundles), "DRAIN_SECONDS": "0"}) as server:
        size = len(closed_loop(server.port, posts(-1, STEADY), CONNECTIONS, keep_bodies=True).bodies[-1])
        port = free_port()
        with ServerProcess(
            command=(sys.executable, "-m", "loadtest.server.null_server", str(port), str(size)), port=port, ready="/"
        ) as null:
            for turn in range(args.rounds):
                requests = posts(turn, args.requests)
                cpu = server.cpu_seconds()
                served = closed_loop(server.port, requests, CONNECTIONS)
                server_cpu = (server.cpu_seconds() - cpu) / len(requests)
                for orders in engines:
                    orders.send(served.seconds)
                open_loop(null.port, limit_time(served.seconds, cycle(requests)), served.per_second, CONNECTIONS)
                results = [orders.recv() for orders in engines]
                done = sum(number for number, _ in results)
                rounds.append(
                    {
                        "server_per_second": served.per_second,
                        "engine_per_second": done / served.seconds,
                        "share": served.per_second * served.seconds / done,
                        "server_cpu_ms": server_cpu * 1e3,
                        "engine_cpu_ms": sum(seconds for _, seconds in results) / done * 1e3,
                    }
                )
                print(
                    json.dumps({"round": turn} | {name: round(value, 3) for name, value in rounds[-1].items()}),
                    flush=True,
                )
    for orders in engines:
        orders.send(0)
    print(json.dumps({"machine": cpu_name()} | {name: round(median(r[name] for r in rounds), 3) for name in rounds[0]}))


if __name__ == "__main__":
    main()
