"""Latency of a served bundle over HTTP: python -m loadtest.latency

Starts a server for each number of threads, asks it with as many connections as it has threads (closed loop), cells
interleaved, every request from a user the server has not met (no kept history) among the bundle's known items, and
prints a Markdown table; the last line is JSON. The client runs on the same cores as the server.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from itertools import product
from typing import Any

from app.engine import processor

HISTORIES, SLATES = (50, 200), (50, 200, 500)


class Server:
    """`python -m app.main` on a free port, ready when entered."""

    def __init__(self, bundles: str, threads: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        settings = {"SLATEWISE_BUNDLES": bundles, "SLATEWISE_PORT": str(self.port), "SLATEWISE_THREADS": str(threads)}
        self.process = subprocess.Popen([sys.executable, "-m", "app.main"], env=os.environ | settings)

    def __enter__(self) -> Server:
        for _ in range(600):
            try:
                if self.get("/readyz")[0] == 200:
                    return self
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("the server did not get ready in a minute")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", path)
        answer = connection.getresponse()
        content = answer.status, json.loads(answer.read())
        connection.close()
        return content


def make_bodies(card: dict[str, Any], count: int, seed: int) -> dict[tuple[int, int], list[bytes]]:
    """Requests a cell, made before the clock starts."""
    rng, example = random.Random(seed), card["example"]
    items, actions = example["candidates"]["item_ids"] + example["history"]["item_ids"], card["actions"] or [None]
    bodies = {}
    for events, n in product(HISTORIES, SLATES):
        bodies[events, n] = [
            json.dumps(
                {
                    "user": f"{seed}-{events}-{n}-{k}",
                    "history": {
                        "item_ids": rng.choices(items, k=events),
                        "actions": rng.choices(actions, k=events),
                        "timestamps": sorted(rng.randrange(10**9, 10**9 + 10**7) for _ in range(events)),
                    },
                    "candidates": {"item_ids": rng.choices(items, k=n), "features": {f: [rng.random() for _ in range(n)] for f in card["features"]}},
                }
            ).encode()
            for k in range(count)
        ]
    return bodies


def ask(port: int, bodies: dict[tuple[int, int], list[bytes]], seconds: dict[tuple[int, int], list[float]]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for k in range(len(next(iter(bodies.values())))):
        for cell, requests in bodies.items():  # interleaved
            begin = time.perf_counter()
            connection.request("POST", "/rerank", requests[k], {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            seconds[cell].append(time.perf_counter() - begin)
            if answer.status != 200:
                raise RuntimeError(f"status {answer.status}")
    connection.close()


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", default="models/bundles")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--requests", type=int, default=300, help="a cell and connection")
    args = parser.parse_args()
    rows = []
    for threads in args.threads:
        with Server(args.bundles, threads) as server:
            name = server.get("/models")[1]["models"][0]["name"]
            card = server.get(f"/models/{name}")[1]
            seconds: list[dict[tuple[int, int], list[float]]] = [{cell: [] for cell in product(HISTORIES, SLATES)} for _ in range(threads)]
            warm: dict[tuple[int, int], list[float]] = {cell: [] for cell in product(HISTORIES, SLATES)}
            ask(server.port, make_bodies(card, 20, 0), warm)
            clients = [threading.Thread(target=ask, args=(server.port, make_bodies(card, args.requests, k + 1), seconds[k])) for k in range(threads)]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
        for events, n in product(HISTORIES, SLATES):
            all_seconds = [s for one in seconds for s in one[events, n]]
            p50, p99 = (round(quantile(all_seconds, q) * 1e3, 2) for q in (0.5, 0.99))
            rows.append({"threads": threads, "history": events, "candidates": n, "p50_ms": p50, "p99_ms": p99, "requests": len(all_seconds)})
    print(f"{name} version {card['version']}, variant {card['default_variant']}, exit {card['default_exit']}; {processor()}\n")
    print("| threads = connections | history | candidates | p50 ms | p99 ms |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row['threads']} | {row['history']} | {row['candidates']} | {row['p50_ms']:.2f} | {row['p99_ms']:.2f} |")
    print(json.dumps({"machine": processor(), "rows": rows}))


if __name__ == "__main__":
    main()
