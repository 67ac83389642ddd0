"""R22, R23. Requests over HTTP while Redis fails behind a proxy, or is killed and starts empty.

Every request has to be answered with a ranking within the budget of Redis, and the circuit has to close after the end
of the fault. Latency counts from the time at which a request was due, over a server that has nothing else to do.

Called by: `__main__.py`, and the command line: python -m loadtest.chaos.store. Calls: `bundle.py`, `report.py`, and the
fault proxy of the store's measurements.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loadtest.chaos.bundle import USERS, push_vectors, small_bundles
from loadtest.chaos.report import Row, conclude
from loadtest.client import ask, connect, post
from loadtest.markdown import table
from loadtest.server_process import ServerProcess, exit_on_sigterm
from loadtest.store.faults import FAULTS, ProxyThread, proxy_thread
from slatewise.store.client import connect as connect_redis
from slatewise.store.node import RedisNode
from tests.support.redis_server import run_redis

BUDGET_MS = 20.0
RATE = 100.0  # requests a second
FAULT_SECONDS = 3.0
OPENED_SECONDS = 1.0
CLOSED_SECONDS = 5.0
STALL_MS = 25.0  # what a busy machine may add at the 99th percentile
MORE_CONNECTIONS = 1
POOL = 4 * RedisNode.ROUND_TRIPS


def small_pieces(proxy: Any) -> None:
    proxy.piece = 3


def slow_line(proxy: Any) -> None:
    proxy.piece = 64
    proxy.bytes_per_second = 1_000.0


def error(text: bytes) -> Callable[[Any], None]:
    return lambda proxy: setattr(proxy, "answer", text)


NETWORK = dict(list(FAULTS.items())[1:]) | {
    "pieces of 3 bytes": small_pieces,
    "1,000 bytes a second": slow_line,
    "MOVED": error(b"-MOVED 3999 127.0.0.1:1\r\n"),
    "OOM": error(b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"),
    "READONLY": error(b"-READONLY You can't write against a read only replica.\r\n"),
    "max number of clients": error(b"-ERR max number of clients reached\r\n"),
}


class Redis(NamedTuple):
    """A Redis server: its faults by administration."""

    port: int

    def do(self, *words: str) -> None:
        with connect_redis(f"redis://127.0.0.1:{self.port}/0") as client:
            client.execute_command(*words)


class Answer(NamedTuple):
    due: float  # monotonic seconds
    ms: float
    status: int
    meta: str  # status of the meta-embedding


class Requests:
    """RATE requests a second over several connections, inside its `with` block. A late answer delays no other one."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: list[Answer] = []
        self.failures: list[Exception] = []
        self.stop = threading.Event()
        self.begin = time.monotonic()
        self.threads = [threading.Thread(target=self.work, args=(k, 16)) for k in range(16)]

    def __enter__(self) -> Requests:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def work(self, place: int, every: int) -> None:
        connection = connect(self.port)
        number = place
        try:
            while not self.stop.is_set():
                due = self.begin + number / RATE
                time.sleep(max(0.0, due - time.monotonic()))
                body = {"user": f"u{number % USERS}", "candidates": {"item_ids": ["1", "2", "3"]}}
                status, text = ask(connection, post("/rerank", json.dumps(body).encode()))
                meta = json.loads(text)["meta_embedding"]["status"] if status == 200 else ""
                self.answers.append(Answer(due, (time.monotonic() - due) * 1e3, status, meta))
                number += every
        except Exception as error:
            self.failures.append(error)
        finally:
            connection.close()

    def between(self, begin: float, end: float) -> list[Answer]:
        return [answer for answer in self.answers if begin <= answer.due < end]


class Measured(NamedTuple):
    name: str
    statuses: dict[int, int]
    metas: dict[str, int]
    p99_ms: float
    opened: float | None  # seconds until the circuit was open; None: it stayed closed
    closed: float | None  # seconds from the end of the fault until it was closed; None: not in time
    connections: int  # through the proxy, in the end


def circuit(server: ServerProcess) -> float:
    lines = str(server.get("/metrics")[1]).splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("slatewise_redis_circuit_state "))


def until(condition: Callable[[], bool], patience: float) -> float | None:
    """Seconds until the condition holds, or None."""
    begin = time.monotonic()
    while time.monotonic() < begin + patience:
        if condition():
            return time.monotonic() - begin
        time.sleep(0.02)
    return None


class Bench:
    def __init__(self, server: ServerProcess, proxy: ProxyThread, redis: Redis, bundles: Path) -> None:
        self.server, self.proxy, self.redis, self.bundles = server, proxy, redis, bundles

    def measure(self, name: str, begin_fault: Callable[[], object], end_fault: Callable[[], object]) -> Measured:
        with Requests(self.server.port) as requests:
            time.sleep(0.5)
            begin = time.monotonic()
            begin_fault()
            opened = until(lambda: circuit(self.server) != 0, FAULT_SECONDS / 2)
            time.sleep(max(0.0, begin + FAULT_SECONDS - time.monotonic()))
            end = time.monotonic()
            end_fault()
            closed = until(lambda: circuit(self.server) == 0, 2 * CLOSED_SECONDS)
            time.sleep(0.3)
        if requests.failures:
            raise requests.failures[0]
        during = requests.between(begin, end)
        p99 = float(np.quantile([answer.ms for answer in during], 0.99))
        statuses = Counter(answer.status for answer in requests.answers)
        metas = Counter(answer.meta for answer in during)
        print(f"store: {name}: p99 {p99:.1f} ms, {dict(metas)}", file=sys.stderr, flush=True)
        return Measured(name, dict(statuses), dict(metas), p99, opened, closed, self.proxy.proxy.open)

    def network(self) -> Iterator[Measured]:
        yield self.measure("none", lambda: None, lambda: None)
        for name, fault in NETWORK.items():
            begin = partial(self.proxy.loop.call_soon_threadsafe, fault, self.proxy.proxy)
            yield self.measure(name, begin, self.proxy.heal)

    def administration(self) -> Iterator[Measured]:
        redis = self.redis

        def change_password() -> None:
            redis.do("CONFIG", "SET", "requirepass", "secret")
            with connect_redis(f"redis://:secret@127.0.0.1:{redis.port}/0") as client:
                client.client_kill_filter(_type="normal", skipme=True)

        def restore_password() -> None:
            with connect_redis(f"redis://:secret@127.0.0.1:{redis.port}/0") as client:
                client.config_set("requirepass", "")

        def refill() -> None:
            push_vectors(self.bundles, redis.port)

        yield self.measure("password changed", change_password, restore_password)
        yield self.measure("FLUSHALL", lambda: redis.do("FLUSHALL"), refill)
        yield self.measure("CLIENT PAUSE", lambda: redis.do("CLIENT", "PAUSE", "2500", "ALL"), lambda: None)
        yield self.measure("connections killed", lambda: redis.do("CLIENT", "KILL", "TYPE", "normal"), lambda: None)


def rows_of(measured: list[Measured]) -> list[Row]:
    plain = measured[0].p99_ms
    others = measured[1:]
    worst = max(others, key=lambda each: each.p99_ms)
    opened = [each.opened for each in others if each.opened is not None]
    closed = [each.closed for each in others]
    late = [each.name for each in others if each.closed is None or each.closed > CLOSED_SECONDS]
    most = max(each.connections for each in measured)
    requests = sum(sum(each.statuses.values()) for each in measured)
    wrong = {status for each in measured for status in each.statuses} - {200}
    return [
        Row(
            "R22",
            "every request is answered with a ranking",
            f"{requests:,} requests, {len(others)} faults, statuses {sorted({200} | wrong)}",
            not wrong,
        ),
        Row(
            "R22",
            f"added p99 at most the budget of {BUDGET_MS:g} ms, and {STALL_MS:g} ms for the machine",
            f"{worst.p99_ms - plain:.1f} ms ({worst.name})",
            worst.p99_ms - plain <= BUDGET_MS + STALL_MS,
        ),
        Row(
            "R22",
            f"the circuit opens within {OPENED_SECONDS:g} s",
            f"{max(opened):.2f} s",
            max(opened) <= OPENED_SECONDS,
        ),
        Row(
            "R22",
            f"the circuit closes within {CLOSED_SECONDS:g} s",
            f"{max(filter(None, closed), default=0):.2f} s {late or ''}",
            not late,
        ),
        Row(
            "R22",
            f"at most the {POOL} connections of the pool, and in the end as many as before",
            f"{measured[0].connections} before, {most} at most, {measured[-1].connections} in the end",
            most <= POOL and measured[-1].connections <= measured[0].connections + MORE_CONNECTIONS,
        ),
    ]


def as_markdown(measured: list[Measured]) -> str:
    titles = ("fault", "p99 ms", "opened s", "closed s", "connections", "meta-embeddings during the fault")
    seconds = lambda value: "" if value is None else f"{value:.2f}"  # noqa: E731
    rows = [
        (each.name, f"{each.p99_ms:.1f}", seconds(each.opened), seconds(each.closed), each.connections, each.metas)
        for each in measured
    ]
    return table(titles, rows)


@contextmanager
def bench(redis_port: int) -> Iterator[Bench]:
    bundles = small_bundles()
    redis = Redis(redis_port)
    push_vectors(bundles, redis_port)
    with ExitStack() as stack:
        proxy = stack.enter_context(proxy_thread(redis_port))
        settings = {
            "BUNDLES": str(bundles),
            "REDIS_URL": f"redis://127.0.0.1:{proxy.proxy.port}/0",
            "REDIS_TIMEOUT_MS": str(BUDGET_MS),
            "EMBEDDING_CACHE_S": "0",
            "DRAIN_SECONDS": "0",
        }
        yield Bench(stack.enter_context(ServerProcess(settings)), proxy, redis, bundles)


def restart(home: Path) -> list[Row]:
    """R23: Redis is killed, starts empty, and is filled while requests go on."""
    with ExitStack() as first:
        port = first.enter_context(run_redis(home))
        with bench(port) as running, Requests(running.server.port) as requests:
            time.sleep(1)
            first.close()  # SIGKILL
            killed = time.monotonic()
            time.sleep(2)
            with run_redis(home, port):
                closed = until(lambda: circuit(running.server) == 0, 2 * CLOSED_SECONDS)
                push_vectors(running.bundles, port)
                filled = time.monotonic()
                time.sleep(2.5)
                end = time.monotonic()
        after = requests.between(filled + 1.5, end)
        hits = sum(answer.meta == "hit" for answer in after) / max(1, len(after))
        statuses = Counter(answer.status for answer in requests.answers if answer.due >= killed)
    return [
        Row(
            "R23",
            "no request fails while Redis is killed, starts empty and is filled",
            str(dict(statuses)),
            set(statuses) == {200} and not requests.failures,
        ),
        Row(
            "R23",
            "the hit rate recovers",
            f"{hits:.0%} from 1.5 s after the filling; circuit closed after {closed or -1:.2f} s",
            hits > 0.95,
        ),
    ]


def unknown_host() -> Row:
    """The name of Redis' machine cannot be resolved, from the start on."""
    url = "redis://redis.invalid:6379/0"
    settings = {"BUNDLES": str(small_bundles()), "REDIS_URL": url, "DRAIN_SECONDS": "0"}
    with ServerProcess(settings) as server, Requests(server.port) as requests:
        time.sleep(3)
    statuses = Counter(answer.status for answer in requests.answers)
    p99 = float(np.quantile([answer.ms for answer in requests.answers], 0.99))
    number = f"{dict(statuses)}, p99 {p99:.1f} ms"
    return Row("R22", "an unknown host of Redis: every request is answered", number, set(statuses) == {200})


def main() -> int:
    exit_on_sigterm()
    with tempfile.TemporaryDirectory() as name, run_redis(Path(name)) as port, bench(port) as running:
        measured = [*running.network(), *running.administration()]
    with tempfile.TemporaryDirectory() as name:
        rows = [*rows_of(measured), unknown_host(), *restart(Path(name))]
    return conclude(rows, as_markdown(measured))


if __name__ == "__main__":
    sys.exit(main())
