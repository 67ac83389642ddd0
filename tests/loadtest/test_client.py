"""The load generator: closed and open loop over raw sockets."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from loadtest.client import Outcome, ask, closed_loop, connect, limit_time, open_loop, post


def answer(body: bytes = b"{}", status: int = 200) -> bytes:
    return f"HTTP/1.1 {status} OK\r\nserver: test\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def listening(reply: Callable[[socket.socket, bytes], bool]) -> Iterator[int]:
    """A server that calls `reply` with each request's body until it says False; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def talk(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            while line := stream.readline():
                length = 0
                while line.strip():
                    if line.lower().startswith(b"content-length:"):
                        length = int(line[15:])
                    line = stream.readline()
                if not reply(connection, stream.read(length)):
                    return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def echo(connection: socket.socket, body: bytes) -> bool:
    connection.sendall(answer(body))
    return True


def test_ask_joins_an_answer_sent_in_pieces() -> None:
    def in_pieces(connection: socket.socket, body: bytes) -> bool:
        data = answer(body)
        for k in range(0, len(data), 7):  # cuts the head, the blank line and the body
            connection.sendall(data[k : k + 7])
            time.sleep(0.001)
        return True

    with listening(in_pieces) as port, connect(port) as connection:
        for body in (b"", b"x", b'{"a": "' + b"y" * 60 + b'"}'):
            assert ask(connection, post("/rerank", body)) == (200, body)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort"])
def test_ask_raises_when_the_connection_closes(sent: bytes) -> None:
    def hang_up(connection: socket.socket, _: bytes) -> bool:
        connection.sendall(sent)
        return False

    with listening(hang_up) as port:
        with connect(port) as connection, pytest.raises(OSError, match="closed the connection"):
            ask(connection, post("/rerank", b"{}"))
        with pytest.raises(OSError, match="closed the connection"):  # raised in the caller's thread
            closed_loop(port, [post("/rerank", b"{}")] * 3, 2)


def test_ask_raises_without_content_length() -> None:
    def endless(connection: socket.socket, _: bytes) -> bool:
        connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")
        return True

    with (
        listening(endless) as port,
        connect(port) as connection,
        pytest.raises(OSError, match="without Content-Length"),
    ):
        ask(connection, post("/rerank", b"{}"))


def test_closed_loop_sends_each_request_once() -> None:
    seen: list[bytes] = []

    def some_fail(connection: socket.socket, body: bytes) -> bool:
        seen.append(body)
        connection.sendall(answer(body, 503 if body == b"3" else 200))
        return True

    bodies = [str(k).encode() for k in range(20)]
    with listening(some_fail) as port:
        outcome = closed_loop(port, [post("/rerank", body) for body in bodies], 4, keep_bodies=True)
        assert sorted(seen) == sorted(bodies)
        assert dict(outcome.statuses) == {200: 19, 503: 1}
        assert sorted(outcome.bodies) == sorted(set(bodies) - {b"3"})
        assert len(outcome.latencies) == 20
        assert closed_loop(port, (post("/rerank", body) for body in bodies), 4).bodies == []  # a generator works, too


def test_open_loop_latency_counts_from_arrival() -> None:
    pause = 0.05

    def slow(connection: socket.socket, body: bytes) -> bool:
        time.sleep(pause)
        return echo(connection, body)

    with listening(slow) as port:
        outcome = open_loop(
            port, [post("/rerank", b"{}")] * 5, per_second=1e6, connections=1
        )  # all due at once, one connection
    for k, latency in enumerate(outcome.latencies):
        assert latency >= (k + 1) * pause - 1e-3


def test_open_loop_waits_for_each_arrival() -> None:
    with listening(echo) as port:
        outcome = open_loop(port, [post("/rerank", b"{}")] * 10, per_second=100, connections=2)
    assert outcome.seconds >= 0.03  # with this seed, the tenth arrives at the earliest then
    assert len(outcome.latencies) == 10


def test_limit_time_ends_after_its_seconds() -> None:
    taken = []
    for request in limit_time(0.05, itertools.repeat(b"")):
        taken.append(request)
        time.sleep(0.02)
    assert 1 <= len(taken) <= 3
    assert list(limit_time(60, [b"a", b"b"])) == [b"a", b"b"]


def test_summary_has_rate_and_quantiles() -> None:
    outcome = Outcome([k / 1e3 for k in range(100, 0, -1)], seconds=2.0)
    outcome.statuses[200] = 100
    assert outcome.summary() == {
        "requests": 100,
        "statuses": {200: 100},
        "per_second": 50.0,
        "p50_ms": 51.0,
        "p95_ms": 96.0,
        "p99_ms": 100.0,
    }
