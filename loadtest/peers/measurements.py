"""One contender, started, warmed up and measured: a cell of the report.

Before: `contenders.py`. After: `__main__.py` asks for cells, `report.py` shows them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.client import ask, closed_loop, connect, post
from loadtest.peers.contenders import OURS, PEERS, Contender, Setup, our_server, peer_server
from loadtest.peers.environments import BUNDLES, RANKER
from loadtest.workload import STEADY, Shape, W, Workload

WARM_UP = 20
RETURNING_USERS = 40
BOUND = 1e-5


@dataclass(frozen=True)
class Entry:
    """Who serves what."""

    name: str
    graph: str  # of our own server, the variant

    @property
    def title(self) -> str:
        return "Slatewise" if self.name == OURS else PEERS[self.name].title

    @contextmanager
    def serving(self, setup: Setup | None, logs: Path, warm_up: int = WARM_UP) -> Iterator[Contender]:
        """Ready and warm."""
        log = logs / f"{self.name}.log"
        if self.name == OURS:
            contender = our_server(self.graph, log)
        else:
            assert setup is not None
            contender = peer_server(PEERS[self.name], self.graph, setup, log)
        with contender:
            closed_loop(contender.port, self.requests(Workload(BUNDLES, RANKER, seed=-1).distinct(W, warm_up)), 4)
            yield contender

    def requests(self, bodies: Sequence[bytes]) -> list[bytes]:
        if self.name == OURS:
            return [post("/rerank", body) for body in bodies]
        return [post(PEERS[self.name].path, PEERS[self.name].wrap(body)) for body in bodies]


EXACT = Entry(OURS, "fp32")


@dataclass(frozen=True)
class Cell:
    phase: str  # choice or measurement
    round: int
    name: str
    graph: str
    setup: str | None
    users: str  # distinct, returning or growing
    connections: int
    requests: int
    per_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float  # of the server, a request
    resident_mb: float

    def line(self) -> str:
        return json.dumps(asdict(self))


def measure(contender: Contender, requests: Sequence[bytes], connections: int, **labels: Any) -> Cell:
    before = contender.cpu_seconds()
    outcome = closed_loop(contender.port, requests, connections)
    cpu = contender.cpu_seconds() - before
    if set(outcome.statuses) != {200}:
        raise RuntimeError(f"{labels}: statuses {dict(outcome.statuses)}")
    return Cell(
        connections=connections,
        requests=len(requests),
        per_second=round(len(requests) / outcome.seconds, 2),
        p50_ms=round(outcome.quantile(0.5) * 1e3, 3),
        p99_ms=round(outcome.quantile(0.99) * 1e3, 3),
        cpu_ms=round(cpu / len(requests) * 1e3, 2),
        resident_mb=round(contender.resident_mb(), 1),
        **labels,
    )


def measure_distinct(
    entry: Entry, setup: Setup | None, connections: Sequence[int], count: int, logs: Path, phase: str, turn: int
) -> Iterator[Cell]:
    """`count` requests at 4 connections, half of that at 1, none of whose users the server knows."""
    with entry.serving(setup, logs, STEADY if phase == "measurement" else WARM_UP) as contender:
        for k in connections:
            bodies = Workload(BUNDLES, RANKER, seed=10 * turn + k).distinct(W, count if k > 1 else ceil(count / 2))
            labels = {
                "phase": phase,
                "round": turn,
                "name": entry.name,
                "graph": entry.graph,
                "setup": str(setup) if setup else None,
            }
            yield measure(contender, entry.requests(bodies), k, users="distinct", **labels)


def measure_known(entry: Entry, count: int, logs: Path, turn: int) -> Iterator[Cell]:
    """Users whose histories the server has encoded before, at 4 connections: with new candidates, then with one event more."""
    with entry.serving(None, logs, STEADY) as contender:
        for users in ("returning", "growing"):
            workload = Workload(BUNDLES, RANKER, seed=10 * turn + len(users))
            first, rest = getattr(workload, users)(W, RETURNING_USERS, ceil(count / RETURNING_USERS))
            closed_loop(contender.port, entry.requests(first), 4)
            labels = {"phase": "measurement", "round": turn, "name": entry.name, "graph": entry.graph, "setup": None}
            yield measure(contender, entry.requests(rest), 4, users=users, **labels)


def sample_bodies() -> list[bytes]:
    """Of W and of other sizes, with a user of the bundle, nulls, unknown ids and columns left out."""
    workload = Workload(BUNDLES, RANKER, seed=7)
    sizes = (W, W, W, Shape(1, 1), Shape(40, 24), Shape(300, 500), Shape(2_048, 100))
    bodies = workload.distinct(W, 1) + [
        workload.body("u7", workload.history(size.history), size.candidates) for size in sizes
    ]
    gaps: dict[str, Any] = json.loads(workload.body("u8", workload.history(30), 20))
    gaps["history"]["timestamps"][3] = gaps["history"]["actions"][4] = gaps["candidates"]["features"][
        workload.features[0]
    ][5] = None
    gaps["history"]["item_ids"][6] = gaps["candidates"]["item_ids"][7] = "no-such-item"
    bare: dict[str, Any] = json.loads(workload.body("u9", workload.history(30), 20))
    del bare["history"]["actions"], bare["history"]["timestamps"], bare["candidates"]["features"], bare["user"]
    return [*bodies, json.dumps(gaps).encode(), json.dumps(bare).encode()]


def our_scores(bodies: Sequence[bytes], logs: Path) -> list[np.ndarray]:
    """In input order, from POST /score."""
    with EXACT.serving(None, logs) as contender:
        answers = [answer_of(contender.port, post("/score", body)) for body in bodies]
    return [np.array(json.loads(answer)["results"]["scores"]) for answer in answers]


def worst_difference(entry: Entry, bodies: Sequence[bytes], expected: Sequence[np.ndarray], logs: Path) -> float:
    """Of a peer's scores from ours. Raises RuntimeError where they are not sorted, or the ids not those that were sent."""
    peer = PEERS[entry.name]
    worst = 0.0
    with entry.serving(peer.setups()[0], logs) as contender:
        for body, request, scores in zip(bodies, entry.requests(bodies), expected, strict=True):
            results = json.loads(peer.unwrap(answer_of(contender.port, request)))["results"]
            index = results["index"]
            found = results["scores"]
            ids = json.loads(body)["candidates"]["item_ids"]
            if (
                found != sorted(found, reverse=True)
                or sorted(index) != list(range(len(ids)))
                or results["item_ids"] != [ids[k] for k in index]
            ):
                raise RuntimeError(f"{entry}: not the candidates in the order of their scores")
            worst = max(worst, float(np.abs(np.array(found) - scores[index]).max()))
    return worst


def answer_of(port: int, request: bytes) -> bytes:
    with connect(port) as connection:
        status, answer = ask(connection, request)
    if status != 200:
        raise RuntimeError(f"status {status}: {answer[:300].decode()}")
    return answer
