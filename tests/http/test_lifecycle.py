"""Disconnecting clients, slow bodies, overload, and the end of the server."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest

from slatewise import main
from slatewise.bundle.ranker import Ranker
from slatewise.main import build_app
from slatewise.ranking.admission import Admission
from slatewise.settings import Settings
from tests.conftest import DEMO, Tiny
from tests.http.support import (
    ask,
    assert_problem,
    shaped,
    sums,
    wait_for,
)
from tests.support.application import serve
from tests.support.blocked_engine import BlockedMethod
from tests.support.network import free_port


def post_head(length: int) -> bytes:
    """Build the head of a POST to /score with a body of `length` bytes."""
    kind = "Content-Type: application/json"
    return f"POST /score HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: {length}\r\n\r\n".encode()


@pytest.mark.parametrize("method", ["extend", "point"])
def test_disconnect_between_chunks_stops_the_request(
    tiny: Tiny, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The disconnect is counted, the running chunk ends, and the next request is served."""
    with serve(Settings(bundles=tiny.root, threads=1)) as client:
        body = json.dumps(
            shaped(example, 40, 1500, "leaves", "point")
            if method == "point"
            else shaped(example, 128, 600, "leaves", "set")
        ).encode()
        head = post_head(len(body))
        gone = ("slatewise_client_disconnects_total", 'slatewise_requests_total{code="499"')
        before = sums(client, *gone)
        stop = BlockedMethod(method, monkeypatch)
        scored = BlockedMethod("point", monkeypatch) if method == "extend" else None
        with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
            connection.sendall(head + body)
            assert stop.begun.wait(30)
        wait_for(client, gone[0], before[0] + 1)
        wait_for(client, "slatewise_requests_in_flight ", 0)
        assert sums(client, *gone) == [count + 1 for count in before]
        assert sums(client, "slatewise_queue_seconds ") == [0], "its work is done with before its chunk has ended"
        stop.may_end.set()
        wait_for(client, "slatewise_queue_length", 0)
        assert (
            ask(client, {"candidates": {"item_ids": ["1"]}}, exit="dot")["exit"] == "dot"
        )  # on the only thread, so the earlier jobs have ended
        assert stop.calls == 1 and (scored is None or scored.calls == 0)


def test_disconnect_stops_encode(tiny: Tiny, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Settings(bundles=tiny.root, threads=1)) as client:
        history = shaped(example, 128, 1, None, "dot")["history"]
        body = json.dumps({"user": "leaves", "history": history}).encode()
        stop = BlockedMethod("extend", monkeypatch)
        with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
            connection.sendall(post_head(len(body)).replace(b"/score", b"/encode") + body)
            assert stop.begun.wait(30)
        wait_for(client, "slatewise_queue_seconds ", 0)
        wait_for(client, "slatewise_requests_in_flight ", 0)
        stop.may_end.set()
        wait_for(client, "slatewise_queue_length", 0)
        assert stop.calls == 1


def test_server_that_stops_between_chunks_answers_503(
    tiny: Tiny, example: dict[str, Any], ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running, waiting and later requests get 503 if the server does not wait for them."""
    app = build_app(Settings(bundles=tiny.root, threads=1), {"tiny": ranker})
    stop = BlockedMethod("point", monkeypatch)
    admissions: list[Admission] = []

    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            async with app.router.lifespan_context(app):
                running = asyncio.create_task(client.post("/score", json=shaped(example, 0, 1500, None, "point")))
                assert await asyncio.to_thread(stop.begun.wait, 30)
                workers = app.state.pipeline.workers
                admissions.append(app.state.pipeline.admission)
                waiting = [
                    asyncio.create_task(client.post("/score", json=shaped(example, 5, 10, user, "set")))
                    for user in (None, "u", "u")
                ]
                while len(workers.queue) < 2:  # two requests of one user share an encoding  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                end = asyncio.create_task(workers.__aexit__())
                while not workers.stopping:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                stop.may_end.set()
                answers = await asyncio.wait_for(asyncio.gather(running, *waiting), 30)
                await end
                answers.append(await client.post("/score", json=example))
            answers.append(await client.post("/score", json=example))
        return answers

    for answer in asyncio.run(main()):
        assert "stopping" in assert_problem(answer, 503)["detail"]
    assert stop.calls == 1 and admissions[0].in_flight == 0


def test_disconnected_clients_leave_no_running_work(tiny: Tiny, example: dict[str, Any]) -> None:
    with serve(Settings(bundles=tiny.root, threads=1)) as client:
        body = json.dumps(example | {"candidates": {"item_ids": example["candidates"]["item_ids"] * 150}}).encode()
        head = post_head(len(body))
        for _ in range(20):
            with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
                connection.sendall(head + body)
        give_up = time.monotonic() + 20
        for gauge in ("slatewise_requests_in_flight 0.0", "slatewise_queue_seconds 0.0"):
            while gauge not in client.get("/metrics").text:
                assert time.monotonic() < give_up
                time.sleep(0.05)
        ask(client, example)


def test_slow_body_gets_408(tiny: Tiny) -> None:
    with (
        serve(Settings(bundles=tiny.root, body_timeout_s=0.3)) as client,
        socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection,
    ):
        connection.sendall(post_head(100) + b"{")
        connection.settimeout(20)
        assert b" 408 " in connection.recv(1000)


def test_too_many_requests_in_flight_get_429(
    tiny: Tiny, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one request may be in flight: one that is being scored. One whose body does not arrive takes no place."""
    body = json.dumps(shaped(example, 0, 10, None, "point")).encode()
    with (
        serve(Settings(bundles=tiny.root, max_in_flight=1)) as client,
        socket.create_connection((client.base_url.host, client.base_url.port or 80)) as slow,
        socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection,
    ):
        stop = BlockedMethod("point", monkeypatch)
        slow.sendall(post_head(100) + b"{")
        connection.sendall(post_head(len(body)) + body)
        assert stop.begun.wait(20)
        assert sums(client, "slatewise_requests_in_flight ") == [1]
        answer = client.post("/score", json=example)
        assert_problem(answer, 429)
        assert int(answer.headers["Retry-After"]) >= 1
        assert client.get("/livez").status_code == 200
        stop.may_end.set()
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert client.post("/score", json=example).status_code == 200


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.ConnectError:
        return False


def test_sigterm_drains_and_exits_with_0(tiny: Tiny, example: dict[str, Any]) -> None:
    """/readyz answers 503 at once, requests are still served, and then the process ends."""
    port = free_port()
    settings = {"SLATEWISE_BUNDLES": str(tiny.root), "SLATEWISE_PORT": str(port), "SLATEWISE_DRAIN_SECONDS": "2"}
    process = subprocess.Popen(
        [sys.executable, "-m", "slatewise", "serve"],
        env=os.environ | settings,
        cwd=DEMO.parent.parent,
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            give_up = time.monotonic() + 60
            while not answers(client):
                assert time.monotonic() < give_up and process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            while (ready := client.get("/readyz")).status_code == 200:
                assert time.monotonic() < give_up
            assert_problem(ready, 503)
            ask(client, example)
            assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_what_is_loaded_costs_no_garbage_collections(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection over the modules and the rankers would hold the event loop."""
    before = gc.get_freeze_count()
    frozen = []

    def run(app: object, listener: socket.socket, *_: object) -> int:
        listener.close()
        frozen.append(gc.get_freeze_count())
        return 0

    monkeypatch.setattr(main, "run", run)
    try:
        assert main.serve(Settings(bundles=tiny.root, threads=1, port=0)) == 0
        assert frozen[0] > before + 50_000
    finally:
        gc.unfreeze()
