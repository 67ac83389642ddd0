"""Clients that attack a server with raw sockets, and a well-behaved client beside them.

Called by: `tests/http/test_door.py`, `loadtest/chaos/door.py`. Calls: http.client and sockets.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

HOST = "127.0.0.1"
ATTACKER = "127.0.0.2"  # Linux has all of 127.0.0.0/8
KIND = b"Content-Type: application/json\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


def head(path: str = "/rerank", headers: bytes = b"", length: int | None = None) -> bytes:
    """The head of a POST; without a length, of a chunked body."""
    framing = b"Transfer-Encoding: chunked\r\n" if length is None else b"Content-Length: %d\r\n" % length
    return b"POST " + path.encode() + b" HTTP/1.1\r\nHost: x\r\n" + KIND + headers + framing + b"\r\n"


class GoodClient:
    """Asks the same ranking again and again, in a thread: `with GoodClient(port, body) as good`.

    seconds: time of each answer. wrong: what went wrong, an answer other than the first one included.
    """

    def __init__(self, port: int, body: dict[str, Any], pause: float = 0.005) -> None:
        self.port = port
        self.body = json.dumps(body).encode()
        self.pause = pause
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self.expected: object = None
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def __enter__(self) -> GoodClient:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.thread.join()

    def run(self) -> None:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=20)
        while not self.stopping.wait(self.pause):
            begin = time.perf_counter()
            try:
                connection.request("POST", "/rerank", self.body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                content = json.loads(answer.read())
            except OSError as error:
                self.wrong.append(type(error).__name__)
                connection.close()
                continue
            self.seconds.append(time.perf_counter() - begin)
            results = content.get("results", content)
            self.expected = self.expected or results
            if answer.status != 200 or results != self.expected:
                self.wrong.append(f"{answer.status}: {str(results)[:200]}")
        connection.close()

    def p99(self) -> float:
        """Seconds."""
        return sorted(self.seconds)[int(0.99 * (len(self.seconds) - 1))]


@contextmanager
def connections(port: int, number: int, address: str = HOST) -> Iterator[list[socket.socket]]:
    """Open sockets from an address of loopback. They are closed at the end."""
    opened = []
    try:
        for _ in range(number):
            one = socket.create_connection((HOST, port), 10, (address, 0))
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            opened.append(one)
        yield opened
    finally:
        for one in opened:
            one.close()


def send(one: socket.socket, data: bytes) -> bool:
    """Send without waiting for ever. Return whether the connection is still open, as far as sending shows."""
    one.settimeout(0.2)
    try:
        one.sendall(data)
    except TimeoutError:
        return True  # the server does not read on
    except OSError:
        return False
    return True


def repeat(seconds: float, step: Callable[[], None], pause: float = 0.05) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        step()
        time.sleep(pause)


def read_all(one: socket.socket, seconds: float = 10.0) -> tuple[bytes, bool]:
    """Read until the server closes the connection. Returns the bytes, and whether it did."""
    received = b""
    end = time.monotonic() + seconds
    with suppress(ConnectionError):
        while True:
            one.settimeout(max(0.01, end - time.monotonic()))
            try:
                part = one.recv(65_536)
            except TimeoutError:
                return received, False
            if not part:
                break
            received += part
    return received, True


def ask_raw(port: int, data: bytes, seconds: float = 10.0) -> tuple[bytes, bool]:
    """Send bytes on a connection of their own, and read until it is closed. Returns as `read_all`."""
    with connections(port, 1) as (one,):
        with suppress(OSError):
            one.settimeout(seconds)
            one.sendall(data)
        return read_all(one, seconds)


def statuses(received: bytes) -> list[int]:
    """The statuses of the answers in a stream."""
    return [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]
