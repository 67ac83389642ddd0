"""Deletion test and cost of explanations: python -m loadtest.server.explain ml-latest-small.zip

For each user, the ranker's exit `dot` selects the slate from the items that the user has not rated, as a first stage
would; `--slate random` draws it. Then one result is explained, and the request is ranked again without the three events
that the explanation names first, and ten times without three random events. The test counts the users for whom the
named events lower the result's rank more than the random ones. Two results are tested: the first one, and one drawn
from the first ten.

The cost is the latency of the request with `explain: true`, divided by that without it, at one connection, in
alternating blocks: medians over the users. CPU time of the server is compared too, since other processes disturb it
less. Each is measured without a user id, so that the history is encoded, and with its state cached.

Called by: the command line. Its numbers appear in docs/explain.md. Calls: a server of its own, over HTTP.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import polars as pl

from loadtest.server_process import ServerProcess, exit_on_sigterm
from loadtest.workload import Workload
from slatewise.process import cpu_name
from slatewise_train.demo.movielens import read_movielens

NAMED = 3
DRAWS = 10  # of three random events
FEWEST = 10  # known events of a user
MOST = 256  # events sent: all of them are read
BLOCK = 20  # requests with, then without explanations
CPU_TICK = 0.01  # seconds, the resolution of a process's CPU time

Body = dict[str, Any]


class Asker:
    def __init__(self, port: int) -> None:
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)

    def ask(self, body: Body, **more: Any) -> dict[str, Any]:
        answer = self.client.post("/rerank", json=body | more)
        answer.raise_for_status()
        content: dict[str, Any] = answer.json()
        return content

    def seconds(self, content: bytes) -> float:
        begin = time.perf_counter()
        self.client.post("/rerank", content=content).raise_for_status()
        return time.perf_counter() - begin


def histories(source: Path, known: set[str], users: int) -> list[Body]:
    """The known events of the first users who have enough of them."""
    events, _ = read_movielens("ml-latest-small", source)
    events = events.filter(pl.col("item_id").is_in(sorted(known))).with_columns(pl.col("timestamp").cast(pl.Int64))
    found: list[Body] = []
    for (_,), rows in events.sort("timestamp", maintain_order=True).group_by(["user_id"], maintain_order=True):
        rows = rows.tail(MOST)
        if len(rows) >= FEWEST:
            columns = (("item_ids", "item_id"), ("actions", "action"), ("timestamps", "timestamp"))
            found.append({name: rows[column].to_list() for name, column in columns})
    return found[:users]


def without(body: Body, positions: list[int]) -> Body:
    gone = set(positions)
    history = {name: [v for k, v in enumerate(column) if k not in gone] for name, column in body["history"].items()}
    return body | {"history": history}


def rank_of(answer: dict[str, Any], index: int) -> int:
    rank: int = answer["results"]["index"].index(index)
    return rank


def deletion(asker: Asker, body: Body, place: int, rng: random.Random) -> tuple[int, list[int]]:
    """(places lost without the three events named for the result at `place`, the same for random events)."""
    explanation = asker.ask(body, explain=True)["explanations"][place]
    index = explanation["index"]
    lost = rank_of(asker.ask(without(body, explanation["events"]["position"][:NAMED])), index) - place
    events = range(len(body["history"]["item_ids"]))
    return lost, [rank_of(asker.ask(without(body, rng.sample(events, NAMED))), index) - place for _ in range(DRAWS)]


def report(name: str, rows: list[tuple[int, list[int]]]) -> None:
    share = sum(lost > drawn[0] for lost, drawn in rows) / len(rows)
    row = {
        "result": name,
        "users": len(rows),
        "named_lower_more": round(share, 3),
        "error": round(1.96 * (share * (1 - share) / len(rows)) ** 0.5, 3),
        "equal": round(sum(lost == drawn[0] for lost, drawn in rows) / len(rows), 3),
        "more_than_mean_of_ten": round(sum(lost > sum(drawn) / DRAWS for lost, drawn in rows) / len(rows), 3),
        "places_lost_named": round(sum(lost for lost, _ in rows) / len(rows), 2),
        "places_lost_random": round(sum(sum(drawn) for _, drawn in rows) / len(rows) / DRAWS, 2),
    }
    print(json.dumps(row), flush=True)


def cost(asker: Asker, server: ServerProcess, bodies: list[Body], name: str) -> None:
    """Print latency and CPU time with and without explanations, in turns of BLOCK requests."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    cpu = {False: 0.0, True: 0.0}
    for first in range(0, len(bodies), BLOCK):
        block = bodies[first : first + BLOCK]
        for body in block:
            asker.ask(body)  # the history is cached now if the request names a user
        for explain in (False, True) if first // BLOCK % 2 else (True, False):
            contents = [json.dumps(body | {"explain": explain, "top_n": 10}).encode() for body in block]
            begin = server.cpu_seconds()
            seconds[explain] += [asker.seconds(content) for content in contents]
            cpu[explain] += server.cpu_seconds() - begin
    plain, explained = (median(seconds[explain]) for explain in (False, True))
    row = {"plain_ms": plain * 1e3, "explained_ms": explained * 1e3, "ratio": explained / plain}
    row |= {"plain_cpu_ms": cpu[False] / len(bodies) * 1e3, "explained_cpu_ms": cpu[True] / len(bodies) * 1e3}
    row |= {"cpu_ratio": cpu[True] / max(cpu[False], CPU_TICK)}
    print(json.dumps({"cost": name} | {key: round(value, 2) for key, value in row.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="zip or folder of MovieLens latest-small")
    parser.add_argument("--bundles", type=Path, default=Path("models/bundles"))
    parser.add_argument("--users", type=int, default=500)
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--slate", choices=["first-stage", "random"], default="first-stage")
    parser.add_argument("--exit", default="auto")
    parser.add_argument("--variant", default="auto")
    args = parser.parse_args()
    exit_on_sigterm()
    ids = Workload(args.bundles, "movielens").ids
    rng = random.Random(1)
    settings = {"BUNDLES": str(args.bundles), "DRAIN_SECONDS": "0", "THREADS": "1"}
    with ServerProcess(settings) as server:
        asker = Asker(server.port)
        bodies = []
        for history in histories(args.source, set(ids), args.users):
            new = [item for item in ids if item not in set(history["item_ids"])]
            body: Body = {"history": history, "request_time": history["timestamps"][-1] + 60}
            if args.slate == "random":
                slate = rng.sample(new, args.candidates)
            else:
                first = asker.ask(body | {"candidates": {"item_ids": new}}, exit="dot", top_n=args.candidates)
                slate = first["results"]["item_ids"]
            chosen = {"exit": args.exit, "variant": args.variant}
            bodies.append(body | {"candidates": {"item_ids": slate}} | chosen)
        print(json.dumps({"machine": cpu_name()} | {k: str(v) for k, v in vars(args).items()}))
        cost(asker, server, bodies, "history encoded")
        cost(asker, server, [body | {"user": f"user-{k}"} for k, body in enumerate(bodies)], "history cached")
        report("first", [deletion(asker, body, 0, rng) for body in bodies])
        report("one of the first ten", [deletion(asker, body, rng.randrange(10), rng) for body in bodies])


if __name__ == "__main__":
    main()
