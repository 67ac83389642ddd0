"""Nobody is let in who stops everybody: each attack on a real server, with a well-behaved client beside it."""

from __future__ import annotations

import gzip
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loadtest.server_process import ServerProcess
from tests.conftest import Tiny
from tests.support.attacks import (
    ATTACKER,
    GET,
    GoodClient,
    ask_raw,
    connections,
    head,
    read_all,
    repeat,
    send,
    statuses,
)
from tests.support.network import free_port

BODY = b'{"candidates":{"item_ids":["1","2"]}}'
CLOSED_WITHIN = 8.0  # seconds, on a busy machine; the timeouts below are of one second
CHUNKED = b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[ServerProcess]:
    settings = {
        "BUNDLES": str(tiny.root),
        "THREADS": "1",
        "MAX_IN_FLIGHT": "4",
        "MAX_CONNECTIONS": "40",
        "HEADER_TIMEOUT_S": "1",
        "BODY_TIMEOUT_S": "1",
        "KEEP_ALIVE_S": "1",
        "WRITE_TIMEOUT_S": "1",
        "DRAIN_SECONDS": "0",
    }
    with ServerProcess(settings) as process:
        yield process


def single(*lines: bytes, body: bytes = BODY) -> bytes:
    headers = b"".join(line + b"\r\n" for line in lines)
    return head(headers=headers, length=len(body)) + body


STREAMS = {  # name -> bytes, statuses of the answers
    "two requests": (GET * 2, [200, 200]),
    "two rankings": (single() * 2, [200, 200]),
    "chunks with extension and trailer": (head() + CHUNKED.replace(b"\r\n", b";a=b\r\n", 1) + b"A: b\r\n\r\n", [200]),
    "a request behind chunks": (head() + CHUNKED + b"\r\n" + GET, [200]),
    "HTTP/1.0": (b"GET /livez HTTP/1.0\r\n\r\n", [200]),
    "absolute form": (b"GET http://x/livez HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
    "expect": (single(b"Expect: 100-continue"), [100, 200]),
    "equal header twice": (single(b"X-User-ID: a", b"X-User-ID: a"), [200]),
    "body of a GET": (GET.replace(b"\r\n\r\n", b"\r\nContent-Length: 4\r\n\r\nabcd") + GET, [200, 200]),
    "h2c": (GET.replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"), [200]),
    "length and chunks": (head(headers=b"Content-Length: 3\r\n") + b"0\r\n\r\n" + GET, [400]),
    "two lengths": (head(headers=b"Content-Length: 3\r\n", length=4) + b"abcd", [400]),
    "chunks in HTTP/1.0": (head().replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n" + GET, [400]),
    "space before the colon": (head().replace(b"Encoding:", b"Encoding :") + b"0\r\n\r\n" + GET, [400]),
    "unknown transfer coding": (head().replace(b"chunked", b"xchunked") + b"0\r\n\r\n" + GET, [400]),
    "two users": (single(b"X-User-ID: a", b"x-user-id: b"), [400]),
    "two request ids": (single(b"X-Request-ID: a", b"X-Request-ID: b"), [400]),
    "two keys": (single(b"Authorization: Bearer a", b"Authorization: Bearer b"), [400]),
    "two types": (single(b"Content-Type: text/plain"), [400]),
    "two hosts": (single(b"Host: x"), [400]),
    "no host": (b"GET /livez HTTP/1.1\r\n\r\n", [400]),
    "folded header": (GET.replace(b"\r\n\r\n", b"\r\nA: b\r\n c\r\n\r\n"), [400]),
    "line feeds alone": (b"GET /livez HTTP/1.1\nHost: x\n\n", [400]),
    "zero byte": (GET.replace(b"\r\n\r\n", b"\r\nA: b\0c\r\n\r\n"), [400]),
    "preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", [400]),
    "length of 23 digits": (head(length=10**22), [400]),
    "101 headers": (GET.replace(b"\r\n\r\n", b"\r\n" + b"a: b\r\n" * 100 + b"\r\n"), [431]),
    "long path": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", [431]),
    "long trailer": (head() + b"0\r\nA: " + b"b" * 1_000_000, [400]),
    "long body": (head(length=10**9) + b" " * 1_000_000, [413]),
}


@pytest.mark.parametrize("name", STREAMS)
def test_stream_gets_these_answers_and_is_closed(server: ServerProcess, name: str) -> None:
    data, expected = STREAMS[name]
    received, is_closed = ask_raw(server.port, data, CLOSED_WITHIN)
    assert statuses(received) == expected, received[:500]
    assert is_closed
    if expected[-1] >= 400:
        assert b"application/problem+json" in received and b"connection: close" in received.lower()


def test_long_chunked_body_is_refused(server: ServerProcess) -> None:
    received, is_closed = ask_raw(server.port, head() + b"100000\r\n" + b" " * 2**20 + b"\r\n0\r\n\r\n", CLOSED_WITHIN)
    assert statuses(received) == [413] and is_closed


@pytest.mark.parametrize("size", [1, 7])
def test_request_in_small_pieces_is_answered(server: ServerProcess, size: int) -> None:
    data = single()
    with connections(server.port, 1) as (one,):
        for start in range(0, len(data), size):
            assert send(one, data[start : start + size])
        received, _ = read_all(one, CLOSED_WITHIN)
    assert statuses(received) == [200]


def endless_header(port: int, opened: list[socket.socket]) -> None:
    for one in opened:
        send(one, GET[:-2] + b"A: ")
    repeat(0.5, lambda: [send(one, b"a" * 100_000) for one in opened][:0] or None)


def trickled_header(port: int, opened: list[socket.socket]) -> None:
    repeat(1.5, lambda: [send(one, b"GET"[:1]) for one in opened][:0] or None, 0.1)


def one_byte_of_a_body(port: int, opened: list[socket.socket]) -> None:
    for one in opened:
        send(one, head(length=100) + b"{")
    time.sleep(0.5)


def trickled_body(port: int, opened: list[socket.socket]) -> None:
    for one in opened:
        send(one, head())
    repeat(1.5, lambda: [send(one, b"1\r\n \r\n") for one in opened][:0] or None, 0.1)


def silence(port: int, opened: list[socket.socket]) -> None:
    time.sleep(0.5)


def idle_after_an_answer(port: int, opened: list[socket.socket]) -> None:
    for one in opened:
        send(one, GET)
    time.sleep(0.5)


def requests_without_reading(port: int, opened: list[socket.socket]) -> None:
    """The page of the documentation is the longest answer that needs no key."""
    for one in opened:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        send(one, GET.replace(b"/livez", b"/openapi.json") * 300)
    time.sleep(2.0)


def small_lists_in_gzip(port: int, opened: list[socket.socket]) -> None:
    content = b'{"candidates":{"item_ids":["1"],"fields":{"a":[' + b"[]," * 320_000 + b"[]]}}}"
    zipped = gzip.compress(content)
    for one in opened:
        send(one, head(headers=b"Content-Encoding: gzip\r\n", length=len(zipped)) + zipped)
        assert b" 422 " in one.recv(4_096)


ATTACKS = {
    endless_header: 10,
    trickled_header: 20,
    one_byte_of_a_body: 30,
    trickled_body: 20,
    silence: 200,  # five times the limit of connections
    idle_after_an_answer: 200,
    requests_without_reading: 4,
    small_lists_in_gzip: 10,
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_good_client_is_answered_beside_an_attack(
    server: ServerProcess, example: dict[str, Any], attack: Callable[[int, list[socket.socket]], None]
) -> None:
    """The attacker's connections, from another address, are closed by their deadline."""
    with GoodClient(server.port, example, pause=0.02) as good:
        while not good.seconds:
            time.sleep(0.01)
        with connections(server.port, ATTACKS[attack], ATTACKER) as opened:
            attack(server.port, opened)
            assert server.get("/livez")[0] == 200
            assert all(read_all(one, CLOSED_WITHIN)[1] for one in opened)
    assert len(good.seconds) > 10
    assert not good.wrong


@pytest.mark.parametrize("stream", ["unread", "closed"])
def test_nobody_needs_to_read_the_logs(tiny: Tiny, stream: str) -> None:
    """Each junk request writes a line: more than a pipe holds."""
    port = free_port()
    command = [sys.executable, "-m", "slatewise", "serve", "--port", str(port), "--bundles", str(tiny.root)]
    command += ["--drain-seconds", "0"]
    if stream == "closed":
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    with subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            give_up = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < give_up
                    time.sleep(0.05)
            junk = single(body=b"!")
            for _ in range(10):
                received, _ = ask_raw(port, junk * 150 + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), 30)
                assert statuses(received) == [400] * 150 + [200]
            assert b'result="dropped"' in ask_raw(port, b"GET /metrics HTTP/1.0\r\n\r\n")[0]
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
