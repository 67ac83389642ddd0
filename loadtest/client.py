"""A load generator with little CPU use of its own: raw sockets, and requests serialized before the clock starts.

    closed loop   each connection sends its next request when the previous answer has arrived
    open loop     requests arrive at a fixed rate, independent of the server; latency counts from the arrival time

Called by: every measurement over HTTP. Calls: nothing.
"""

from __future__ import annotations

import itertools
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

TIMEOUT_SECONDS = 60.0
NO_CONTENT = 204  # has neither a body nor a Content-Length


@dataclass
class Outcome:
    """The answers of one run, in the order of completion. `latencies` and `seconds` (the whole run) are in seconds."""

    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    bodies: list[bytes] = field(default_factory=list)  # of answers with status 200, if `keep_bodies` was set
    seconds: float = 0.0

    def quantile(self, q: float) -> float:
        values = sorted(self.latencies)
        return values[min(len(values) - 1, int(q * len(values)))]

    @property
    def per_second(self) -> float:
        return len(self.latencies) / self.seconds

    def summary(self) -> dict[str, Any]:
        return {
            "requests": len(self.latencies),
            "statuses": dict(self.statuses),
            "per_second": round(self.per_second, 1),
            **{f"p{q}_ms": round(self.quantile(q / 100) * 1e3, 2) for q in (50, 95, 99)},
        }


def post(path: str, body: bytes, user: str | None = None, key: str = "") -> bytes:
    """Return the bytes of an HTTP/1.1 request; `user` also goes into X-User-ID, which a load balancer can hash."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    head += f"X-User-ID: {user}\r\n" if user else ""
    head += f"Authorization: Bearer {key}\r\n" if key else ""
    return (head + "\r\n").encode() + body


def ask(connection: socket.socket, request: bytes) -> tuple[int, bytes]:
    """Status and body of one answer. Raises OSError if the connection ends early or Content-Length is missing."""
    connection.sendall(request)
    data = b""
    while b"\r\n\r\n" not in data:
        data += receive(connection)
    head, _, rest = data.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    status = int(lines[0].split()[1])
    length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), None)
    if status == NO_CONTENT:
        length = 0
    if length is None:
        raise OSError("an answer without Content-Length")
    parts = [rest]
    missing = length - len(rest)
    while missing > 0:
        parts.append(receive(connection))
        missing -= len(parts[-1])
    return status, b"".join(parts)


def receive(connection: socket.socket) -> bytes:
    data = connection.recv(1 << 18)
    if not data:
        raise OSError("the server closed the connection")
    return data


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def drive(port: int, turns: Iterable[tuple[float | None, bytes]], connections: int, keep_bodies: bool) -> Outcome:
    """Send all requests in order, shared between the connections. Raises the first error of any connection.

    turns: (arrival in seconds after the start, or None for at once; request).
    """
    sockets = [connect(port) for _ in range(connections)]
    left = iter(turns)
    lock = threading.Lock()  # a generator cannot be advanced by two threads at once
    answers: list[tuple[float, int, bytes]] = []
    failures: list[Exception] = []

    def work(connection: socket.socket) -> None:
        try:
            while not failures:
                with lock:
                    turn = next(left, None)
                if turn is None:
                    return
                due, request = turn
                asked = time.perf_counter() if due is None else begin + due
                time.sleep(max(0.0, asked - time.perf_counter()))
                status, body = ask(connection, request)
                answers.append((time.perf_counter() - asked, status, body if keep_bodies and status == 200 else b""))
        except Exception as error:  # raised again in the caller's thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(connection,)) for connection in sockets]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    for connection in sockets:
        connection.close()
    if failures:
        raise failures[0]
    latencies, statuses, bodies = [list(column) for column in zip(*answers)] or [[], [], []]
    return Outcome(latencies, Counter(statuses), list(filter(None, bodies)), seconds)


def closed_loop(port: int, requests: Iterable[bytes], connections: int, keep_bodies: bool = False) -> Outcome:
    return drive(port, ((None, request) for request in requests), connections, keep_bodies)


def open_loop(
    port: int,
    requests: Iterable[bytes],
    per_second: float,
    connections: int = 64,
    seed: int = 0,
    keep_bodies: bool = False,
) -> Outcome:
    """Poisson arrivals. While all connections are busy, a request waits here; its latency includes the wait."""
    rng = random.Random(seed)
    due = itertools.accumulate(rng.expovariate(per_second) for _ in itertools.count())
    return drive(port, zip(due, requests), connections, keep_bodies)


def limit_time(seconds: float, requests: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the requests until `seconds` after the first one."""
    end = None
    for request in requests:
        now = time.perf_counter()
        end = end or now + seconds
        if now >= end:
            return
        yield request
