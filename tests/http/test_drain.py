"""The end of a server under load: every accepted request is answered, within the grace period."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from slatewise.bundle.ranker import Ranker
from slatewise.http.server import Server
from slatewise.main import build_app
from slatewise.settings import Settings
from tests.conftest import Tiny
from tests.support.blocked_engine import BlockedMethod
from tests.support.kept_alive import Clients, Tally
from tests.support.network import free_port
from loadtest.server_process import ServerProcess

HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LEAST = 200  # requests before the signal


@contextmanager
def served(tiny: Tiny, **settings: str) -> Iterator[ServerProcess]:
    given = {"BUNDLES": str(tiny.root), "VARIANTS": "fp32", "THREADS": "1", **settings}
    with ServerProcess(given) as server:
        yield server


async def load_and_stop(server: ServerProcess, body: bytes, signals: list[int], pause: float) -> Tally:
    """Send the signals, 0.1 s apart, after `LEAST` answers. Return when no connection is accepted any more."""
    clients = Clients(server.port, HEAD, body, count=12, pause=pause)
    running = asyncio.create_task(clients.run())
    while len(clients.tally.answered) < LEAST:
        await asyncio.sleep(0.01)
        assert not running.done(), clients.tally
    for number in signals:
        server.process.send_signal(number)
        await asyncio.sleep(0.1)
    return await asyncio.wait_for(running, 60)


@pytest.mark.parametrize(("number", "pause"), [(signal.SIGTERM, 0.0), (signal.SIGHUP, 0.02)])
def test_signal_under_load_loses_no_request(tiny: Tiny, example: dict[str, Any], number: int, pause: float) -> None:
    """Twelve clients on kept connections, during the whole drain and beyond its end."""
    with served(tiny, DRAIN_SECONDS="0.5") as server:
        tally = asyncio.run(load_and_stop(server, json.dumps(example).encode(), [number], pause))
        assert server.process.wait(20) == 0
    assert tally.lost == []
    assert tally.statuses() == {200}
    assert tally.closes_announced > 12, "the answers of the drain say that the connection ends"
    assert tally.closes_unannounced == 0
    assert tally.refused == 12
