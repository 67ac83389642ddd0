"""Start one contender, warm it up and measure it.

Called by: `__main__.py`; `report.py` shows the cells. Calls: `contenders.py`, `allocator.py`, `client.py`,
`workload.py`.
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
from loadtest.peers import allocator
from loadtest.peers.contenders import OURS, PEERS, Contender, Setup, our_server, peer_server
from loadtest.peers.environments import BUNDLE, BUNDLES, DEMO, DEMO_BUNDLES, RANKER
from loadtest.workload import STEADY, Shape, W, Workload
from slatewise.bundle.manifest import read_manifest

WARM_UP = 20
RETURNING_USERS = 40
BOUND = 1e-5


@dataclass(frozen=True)
class Entry:
    """A contender: a server and the graph that it serves."""

    name: str
    graph: str  # for Slatewise, the variant of the reference ranker; with DEMO in front, of the demo

    @property
    def title(self) -> str:
        return "Slatewise" if self.name == OURS else PEERS[self.name].title

    @contextmanager
    def serving(self, setup: Setup | None, logs: Path, warm_up: int = WARM_UP) -> Iterator[Contender]:
        """Run the contender, ready and warmed up."""
        log = logs / f"{self.name}.log"
        if self.name == OURS:
            contender = our_server(self.bundles, self.graph.removeprefix(DEMO), log)
        else:
            assert setup is not None
            contender = peer_server(PEERS[self.name], self.graph, setup, log)
        with contender:
            closed_loop(contender.port, self.requests(self.workload(-1).distinct(W, warm_up)), 4)
            allocator.check(process.pid for process in contender.processes())
            yield contender

    @property
    def bundles(self) -> Path:
        return DEMO_BUNDLES if self.graph.startswith(DEMO) else BUNDLES

    def workload(self, seed: int) -> Workload:
        """Requests for the ranker of this contender: the shapes are the same, ids and features are its own."""
        return Workload(self.bundles, None if self.graph.startswith(DEMO) else RANKER, seed)

    def requests(self, bodies: Sequence[bytes]) -> list[bytes]:
        if self.name == OURS:
            return [post("/rerank", body) for body in bodies]
        return [post(PEERS[self.name].path, PEERS[self.name].wrap(body)) for body in bodies]


EXACT = Entry(OURS, "fp32")


@dataclass(frozen=True)
class Cell:
    phase: str  # choice, measurement, or of the cross-check: closed loop, wrk
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
    cpu_ms: float  # CPU time of all processes of the server for each request
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


@dataclass(frozen=True)
class Batch:
    """Cells of one entry in one round, of one server. `count` is the number of requests in a cell of 4 connections."""

    entry: Entry
    setup: Setup | None  # None: Slatewise with its defaults
    phase: str
    round: int
    count: int
    logs: Path

    def labels(self, users: str) -> dict[str, Any]:
        setup = str(self.setup) if self.setup else None
        labels = {"phase": self.phase, "round": self.round, "setup": setup, "users": users}
        return labels | {"name": self.entry.name, "graph": self.entry.graph}

    def cells(self, connections: Sequence[int]) -> Iterator[Cell]:
        """New users, by number of connections, and then for Slatewise the users that it knows."""
        with self.entry.serving(self.setup, self.logs, STEADY if self.phase == "measurement" else WARM_UP) as contender:
            for k in connections:
                yield self.measure_distinct(contender, k)
            if self.entry.name == OURS:
                for users in ("returning", "growing"):
                    yield self.measure_known(contender, users)

    def measure_distinct(self, contender: Contender, connections: int) -> Cell:
        """Every user is new. A cell of 1 connection has half as many requests."""
        workload = self.entry.workload(10 * self.round + connections)
        bodies = workload.distinct(W, self.count if connections > 1 else ceil(self.count / 2))
        return measure(contender, self.entry.requests(bodies), connections, **self.labels("distinct"))

    def measure_known(self, contender: Contender, users: str) -> Cell:
        """Users with a cached history, at 4 connections: with new candidates, or with one event more each time."""
        workload = self.entry.workload(10 * self.round + len(users))
        first, rest = getattr(workload, users)(W, RETURNING_USERS, ceil(self.count / RETURNING_USERS))
        closed_loop(contender.port, self.entry.requests(first), 4)
        return measure(contender, self.entry.requests(rest), 4, **self.labels(users))


def sample_bodies() -> list[bytes]:
    """Bodies of shape W and of other sizes, with a user of the bundle, nulls, unknown ids and missing columns."""
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
    """The scores of Slatewise from POST /score, in input order, times the sum of the weights: rank.onnx gives sums."""
    weights = sum(read_manifest(BUNDLE).heads.values())
    with EXACT.serving(None, logs) as contender:
        answers = [answer_of(contender.port, post("/score", body)) for body in bodies]
    return [weights * np.array(json.loads(answer)["results"]["scores"]) for answer in answers]


def worst_difference(entry: Entry, bodies: Sequence[bytes], expected: Sequence[np.ndarray], logs: Path) -> float:
    """Largest difference between a peer's scores and `expected`. Raises RuntimeError for a wrong order or wrong ids."""
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
                raise RuntimeError(f"{entry}: the answer is not the candidates in the order of their scores")
            worst = max(worst, float(np.abs(np.array(found) - scores[index]).max()))
    return worst


def answer_of(port: int, request: bytes) -> bytes:
    with connect(port) as connection:
        status, answer = ask(connection, request)
    if status != 200:
        raise RuntimeError(f"status {status}: {answer[:300].decode()}")
    return answer
