"""The cells of the load test: requests of one kind, sent in one way, and the result as a row (a dict of plain values).

    w            shape W (256 events, 200 candidates), every user new
    neighbours   other history lengths and numbers of candidates, every user new
    returning    users known to the server: the same history, a grown one, or a sliding window
    mixed        cheap requests alone, and concurrent with connections that send only expensive ones
    open         shape W at shares of its closed-loop rate, which is measured just before

Called by: `__main__.py`. Calls: `workload.py` (bodies), `client.py`, `server_process.py`; `report.py` shows the rows.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from loadtest.client import Outcome, closed_loop, limit_time, open_loop, post
from loadtest.server_process import RunningServer, ServerProcess, machine_cpu_seconds
from loadtest.workload import Shape, W, Workload

Row = dict[str, Any]
Result = TypeVar("Result")

CONNECTIONS = (1, 4)
HISTORIES = (50, 1_024, 2_048)
CANDIDATES = (20, 512, 1_024, 4_096)  # the group `w` has W itself
LOADS = (0.5, 0.8, 1.2)
OPEN_CONNECTIONS = 64
CHEAP = Shape(50, 20)
EXPENSIVE = Shape(256, 4_096)
CHEAP_CONNECTIONS = 2
EXPENSIVE_CONNECTIONS = (1, 2)
MOST_USERS = 50  # returning users in one cell; the server caches about a megabyte for each

STAGE = re.compile(r'^slatewise_stage_duration_seconds_sum{stage="(\w+)"} (\S+)$', re.MULTILINE)
REQUEST = re.compile(r"^slatewise_request_duration_seconds_(sum|count){.*} (\S+)$", re.MULTILINE)


def durations(text: str) -> dict[str, float]:
    """Parse `/metrics`: seconds by stage, and `sum` (seconds) and `count` of whole requests."""
    found: defaultdict[str, float] = defaultdict(float)
    for name, value in STAGE.findall(text) + REQUEST.findall(text):
        found[name] += float(value)
    return found


def breakdown(before: dict[str, float], after: dict[str, float]) -> Row:
    """Mean milliseconds a request by stage, and the stages' share of the whole request time."""
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    whole = spent.pop("sum")
    count = spent.pop("count")
    means = {name: round(seconds / count * 1e3, 3) for name, seconds in spent.items()}
    return {
        "stage_means_ms": means | {"request": round(whole / count * 1e3, 3)},
        "stages_share": round(sum(spent.values()) / whole, 3),
    }


def describe_answers(bodies: list[bytes]) -> Row:
    """Shares of degraded answers, exits and cache results, and median stage times, from the answers themselves."""
    answers = [json.loads(body) for body in bodies]
    if not answers:
        return {}
    timings = [answer["timings_ms"] for answer in answers]
    return {
        "degraded_share": round(sum(bool(answer["degraded"]) for answer in answers) / len(answers), 3),
        "exits": dict(Counter(answer["exit"] for answer in answers)),
        "cache": dict(Counter(answer["history"]["cache"] for answer in answers)),
        "stage_medians_ms": {stage: round(statistics.median(one[stage] for one in timings), 3) for stage in timings[0]},
    }


class Bench:
    """A server and the requests for it. `requests` is the number in a cell of shape W."""

    def __init__(self, server: RunningServer, workload: Workload, requests: int) -> None:
        self.server = server
        self.workload = workload
        self.requests = requests

    def count(self, shape: Shape) -> int:
        """Number of requests in a cell: fewer if each is larger than W."""
        scaled = self.requests * (W.history + W.candidates) // (shape.history + shape.candidates)
        return max(4, self.requests // 10, min(self.requests, scaled))

    def new(self, shape: Shape, count: int) -> list[bytes]:
        return requests_of(self.workload.distinct(shape, count))

    def warm_up(self, shape: Shape, connections: int) -> None:
        closed_loop(self.server.port, self.new(shape, 2 * connections), connections)

    def closed(self, requests: Iterable[bytes], connections: int) -> Outcome:
        return closed_loop(self.server.port, requests, connections, keep_bodies=True)

    def side_by_side(self, seconds: float, requests: list[list[bytes]], connections: list[int]) -> list[Outcome]:
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda sent, n: self.closed(limit_time(seconds, sent), n), requests, connections))

    def metered(self, run: Callable[[], Result]) -> tuple[Result, Row]:
        """Return the result of `run` and the server's cost: stage times and, for a child process, CPU and memory."""
        before = durations(self.server.get("/metrics")[1])
        spent = self.spent()
        result = run()
        cost = breakdown(before, durations(self.server.get("/metrics")[1]))
        if isinstance(self.server, ServerProcess):
            seconds, server, client, machine = (after - before for before, after in zip(spent, self.spent()))
            others = max(0.0, machine - server - client) / seconds
            cost |= {
                "cpu_seconds": server,
                "other_cores": round(others, 2),
                "resident_mb": round(self.server.resident_mb(), 1),
            }
        return result, cost

    def spent(self) -> tuple[float, ...]:
        """Clock seconds, and CPU seconds of server, client and machine; empty unless the server is a child process."""
        if not isinstance(self.server, ServerProcess):
            return ()
        return time.perf_counter(), self.server.cpu_seconds(), time.process_time(), machine_cpu_seconds()

    def row(
        self,
        group: str,
        users: str,
        shape: Shape,
        connections: int,
        run: Callable[[], Outcome],
        loop: str = "closed",
        **more: Any,
    ) -> Row:
        outcome, cost = self.metered(run)
        if "cpu_seconds" in cost:
            cost["cpu_ms"] = round(cost.pop("cpu_seconds") / len(outcome.latencies) * 1e3, 2)
        row = describe(group, users, shape, connections, loop)
        return row | more | outcome.summary() | describe_answers(outcome.bodies) | cost

    def cold(self, group: str, shape: Shape, connections: int) -> Row:
        requests = self.new(shape, self.count(shape))
        self.warm_up(shape, connections)
        return self.row(group, "new", shape, connections, partial(self.closed, requests, connections))


def describe(group: str, users: str, shape: Shape, connections: int, loop: str) -> Row:
    return {
        "group": group,
        "users": users,
        "history": shape.history,
        "candidates": shape.candidates,
        "loop": loop,
        "connections": connections,
    }


def requests_of(bodies: list[bytes]) -> list[bytes]:
    return [post("/rerank", body) for body in bodies]


def w(bench: Bench) -> Iterator[Row]:
    for connections in CONNECTIONS:
        yield bench.cold("w", W, connections)


def neighbours(bench: Bench) -> Iterator[Row]:
    for shape in chain(
        (Shape(history, W.candidates) for history in HISTORIES), (Shape(W.history, n) for n in CANDIDATES)
    ):
        for connections in CONNECTIONS:
            yield bench.cold("neighbours", shape, connections)


def returning(bench: Bench) -> Iterator[Row]:
    """The users' first requests are not measured."""
    workload = bench.workload
    users = min(MOST_USERS, max(5, bench.requests // 4))
    rounds = -(-bench.requests // users)
    kinds: dict[str, Callable[[], tuple[list[bytes], list[bytes]]]] = {
        "returning": lambda: workload.returning(W, users, rounds),
        "growing": lambda: workload.growing(W, users, rounds),
        "sliding with offset": lambda: workload.sliding(W, users, rounds, offset=True),
        "sliding": lambda: workload.sliding(W, users, rounds, offset=False),
    }
    for kind, draw in kinds.items():
        for connections in CONNECTIONS:
            first, rest = map(requests_of, draw())
            bench.closed(first, connections)
            yield bench.row("returning", kind, W, connections, partial(bench.closed, rest, connections))


def mixed(bench: Bench) -> Iterator[Row]:
    """Both streams last as long as the expensive one took alone. `rate_share` is relative to the rate alone."""
    cheap = CHEAP_CONNECTIONS
    alone = {}
    for shape, connections in ((CHEAP, cheap), *((EXPENSIVE, n) for n in EXPENSIVE_CONNECTIONS)):
        row = bench.cold("mixed", shape, connections)
        alone[shape, connections] = row
        yield row | {"concurrent": "", "rate_share": 1.0}
    for expensive in EXPENSIVE_CONNECTIONS:
        parts = (
            (CHEAP, cheap, f"{expensive} x {EXPENSIVE.candidates}"),
            (EXPENSIVE, expensive, f"{cheap} x {CHEAP.candidates}"),
        )
        seconds = bench.count(EXPENSIVE) / alone[EXPENSIVE, expensive]["per_second"]
        drawn = [bench.new(shape, int(1.5 * seconds * alone[shape, n]["per_second"]) + n) for shape, n, _ in parts]
        outcomes, cost = bench.metered(partial(bench.side_by_side, seconds, drawn, [n for _, n, _ in parts]))
        cost = {
            name: cost[name] for name in ("other_cores", "resident_mb") if name in cost
        }  # the other costs belong to both streams
        for (shape, n, concurrent), outcome in zip(parts, outcomes):
            share = {
                "concurrent": concurrent,
                "rate_share": round(outcome.per_second / alone[shape, n]["per_second"], 3),
            }
            yield (
                describe("mixed", "new", shape, n, "closed")
                | share
                | outcome.summary()
                | describe_answers(outcome.bodies)
                | cost
            )


def open_loops(bench: Bench) -> Iterator[Row]:
    full = bench.cold("open", W, CONNECTIONS[-1])
    yield full
    for load in LOADS:
        requests = bench.new(W, bench.count(W))
        rate = load * full["per_second"]
        offered = {"load": load, "offered_per_second": round(rate, 1)}
        run = partial(open_loop, bench.server.port, requests, rate, OPEN_CONNECTIONS, keep_bodies=True)
        yield bench.row("open", "new", W, OPEN_CONNECTIONS, run, loop="open", **offered)


GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "w": w,
    "neighbours": neighbours,
    "returning": returning,
    "mixed": mixed,
    "open": open_loops,
}
