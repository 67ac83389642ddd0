"""The end of a server under load: every accepted request is answered, within the grace period."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import polars
import pytest

from loadtest.server_process import ServerProcess
from slatewise.bundle.loader import load_rankers
from slatewise.bundle.ranker import Ranker
from slatewise.inference import workers
from slatewise.inference.engine import Engine
from slatewise.main import build_app
from slatewise.settings import Settings
from tests.conftest import DEMO
from tests.http.support import assert_problem
from tests.support.blocked_engine import BlockedMethod
from tests.support.kept_alive import Clients, Tally
from tests.support.own_server import OwnServer

HEAD = b" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LEAST = 200  # answers before the signal


@pytest.fixture(scope="module")
def rankers() -> dict[str, Ranker]:
    return load_rankers(DEMO, ("fp32",))


@pytest.fixture(scope="module")
def body(rankers: dict[str, Ranker]) -> dict[str, Any]:
    return rankers["movielens"].manifest.example


# Under load, in a process


async def load_and_signal(server: ServerProcess, clients: Clients, number: int) -> Tally:
    """Send the signal after `LEAST` answers. Return when no connection is accepted any more."""
    running = asyncio.create_task(clients.run())
    while len(clients.tally.answered) < LEAST:
        await asyncio.sleep(0.01)
        assert not running.done(), clients.tally
    server.process.send_signal(number)
    return await asyncio.wait_for(running, 60)


@pytest.mark.parametrize(("number", "pause"), [(signal.SIGTERM, 0.0), (signal.SIGHUP, 0.02)])
def test_signal_under_load_loses_no_request(body: dict[str, Any], number: int, pause: float) -> None:
    """Twelve clients with kept connections, during the whole drain and beyond its end."""
    content = json.dumps(body).encode()
    with ServerProcess(
        {"VARIANTS": "fp32", "THREADS": "1", "DRAIN_SECONDS": "0.4", "MAX_QUEUE_MS": "1000000"}
    ) as server:
        clients = Clients(server.port, b"POST /score" + HEAD, lambda _: content, 12, pause)
        tally = asyncio.run(load_and_signal(server, clients, number))
        assert server.process.wait(20) == 0
    assert tally.lost == []
    assert tally.statuses() == {200}
    assert tally.closes_announced > 12, "the answers of the drain say that the connection ends"
    assert tally.closes_unannounced == 0
    assert tally.refused == 12


def test_accepted_events_are_written_at_the_end(tmp_path: Path) -> None:
    settings = {"VARIANTS": "fp32", "THREADS": "1", "DRAIN_SECONDS": "0.2", "EVENTS_DIR": str(tmp_path)}
    with ServerProcess(settings) as server:
        clients = Clients(
            server.port, b"POST /events" + HEAD, lambda k: json.dumps({"user": f"u{k}", "item_id": "1"}).encode()
        )
        tally = asyncio.run(load_and_signal(server, clients, signal.SIGTERM))
        assert server.process.wait(20) == 0
    assert tally.lost == [] and tally.statuses() == {202}
    assert list(tmp_path.glob(".journal-*")) == []
    files = [polars.read_parquet(path) for path in tmp_path.glob("events-*.parquet")]
    assert len({user for table in files for user in table["user_id"]}) == len(tally.answered) > LEAST


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)])
def test_signal_while_libraries_load_ends_quietly(number: int, code: int) -> None:
    """In a container the server is the first process, which has no default handlers."""
    process = subprocess.Popen([sys.executable, "-m", "slatewise", "serve", "--port", "0"], stderr=subprocess.PIPE)
    status = Path(f"/proc/{process.pid}/status")
    try:
        give_up = time.monotonic() + 30
        while not int(status.read_text().split("SigCgt:")[1].split()[0], 16) >> (signal.SIGHUP - 1) & 1:
            assert time.monotonic() < give_up and process.poll() is None
        process.send_signal(number)
        assert process.communicate(timeout=30)[1] == b""
        assert process.returncode == code
    finally:
        process.kill()
        process.wait()


# Requests and connections at the end, in this process


@pytest.fixture
def start(rankers: dict[str, Ranker]) -> Iterator[Callable[[float, float], OwnServer]]:
    servers = []

    def open_server(drain: float, grace: float) -> OwnServer:
        app = build_app(Settings(bundles=DEMO, threads=1), rankers)
        servers.append(OwnServer(app, drain, grace))
        return servers[-1]

    yield open_server
    for stopping in servers:
        stopping.stop()


Start = Callable[[float, float], OwnServer]


def test_running_request_is_finished_at_the_end(
    start: Start, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = start(0.0, 20.0)
    blocked = BlockedMethod("point", monkeypatch)
    running = stopping.post(body)
    assert blocked.begun.wait(20)
    stopping.signal(signal.SIGTERM)
    with pytest.raises((httpx.ConnectError, httpx.ConnectTimeout)):
        while True:  # until nobody listens
            httpx.get(f"{stopping.url}/livez", timeout=0.5, trust_env=False)
    blocked.may_end.set()
    answer = running.result(20)
    assert answer.status_code == 200 and answer.headers["connection"] == "close"
    assert stopping.seconds_to_end() < 10 and stopping.server.exit_code == 0


@pytest.mark.parametrize("by", ["grace", "signal"])
def test_grace_or_second_signal_cuts_requests(
    start: Start, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """The waiting and the running request get 503; a chunk that never ends holds nobody."""
    stopping = start(0.0, 0.3 if by == "grace" else 20.0)
    monkeypatch.setattr(workers, "JOIN_SECONDS", 0.2)
    blocked = BlockedMethod("point", monkeypatch)
    running = [stopping.post(body)]
    assert blocked.begun.wait(20)
    running.append(stopping.post(body))
    while not stopping.server.app.state.pipeline.workers.queue:
        time.sleep(0.01)
    stopping.signal(signal.SIGTERM)
    if by == "signal":
        stopping.signal(signal.SIGTERM)
    assert "stopping" in assert_problem(running[1].result(20), 503)["detail"]
    assert stopping.seconds_to_end() < 10
    with pytest.raises(httpx.TransportError):
        running[0].result(20)  # its chunk did not end
    blocked.may_end.set()


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        yield connection


def get_alive(connection: socket.socket) -> bytes:
    """Send a request. Return its answer, of which the body is JSON."""
    connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        part = connection.recv(4096)
        assert part, answer
        answer += part
    return answer


def test_new_connection_at_the_end_is_answered(start: Start) -> None:
    """Accepted, but without a request yet: the request is on its way."""
    stopping = start(0.0, 20.0)
    with connected(stopping.port) as late, connected(stopping.port) as silent, connected(stopping.port) as idle:
        assert b"connection: close" not in get_alive(idle)
        stopping.signal(signal.SIGTERM)
        assert idle.recv(1) == b"", "an idle connection is closed at the end of the drain"
        assert b"connection: close" in get_alive(late)
        assert late.recv(1) == b""
        assert silent.recv(1) == b"", "a connection without a request is closed soon"
    assert stopping.seconds_to_end() < 10


def test_queue_of_the_listener_is_served(start: Start) -> None:
    """The event loop is busy while connections are made: they wait in the kernel when the signal comes."""
    stopping = start(0.0, 20.0)
    asyncio.run_coroutine_threadsafe(hold_loop(0.3), stopping.loop)
    time.sleep(0.1)
    connections = [socket.create_connection(("127.0.0.1", stopping.port), timeout=20) for _ in range(20)]
    stopping.signal(signal.SIGTERM)
    for connection in connections:
        with connection:
            assert b"200 OK" in get_alive(connection)
    assert stopping.seconds_to_end() < 10


async def hold_loop(seconds: float) -> None:
    time.sleep(seconds)  # noqa: ASYNC251 - on purpose


# A crash of the engine


@pytest.mark.parametrize("fault", [MemoryError("no memory"), RuntimeError("crash"), KeyError("x")])
@pytest.mark.parametrize("method", ["extend", "point"])
def test_crashed_inference_harms_its_caller_alone(
    start: Start, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fault: Exception, method: str
) -> None:
    """The caller gets 500, a request beside it its scores, and the next request of the same user as well."""
    stopping = start(0.0, 20.0)
    own = body | {"user": f"crash-{method}-{type(fault).__name__}"}
    original = getattr(Engine, method)
    crashes = iter([True])

    def crash(*given: Any, **named: Any) -> Any:
        if next(crashes, False):
            raise fault
        return original(*given, **named)

    expected = stopping.post(body | {"user": "unknown"}).result(20).json()["results"]
    monkeypatch.setattr(Engine, method, crash)
    assert_problem(stopping.post(own).result(20), 500)
    for _ in range(2):
        answer = stopping.post(own).result(20)
        assert answer.status_code == 200 and answer.json()["results"] == expected
    pipeline = stopping.server.app.state.pipeline
    assert pipeline.admission.in_flight == 0 and not pipeline.admission.load.running
    assert all(thread.is_alive() for thread in pipeline.workers.threads)
