"""The application in this process, behind the real server on a real socket.

Called by: the fixture `client` and tests with settings of their own. Calls: `slatewise/main.py`, `http/server.py`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from slatewise.bundle.loader import load_rankers
from slatewise.http.server import Server
from slatewise.main import build_app, door_limits
from slatewise.settings import Settings
from tests.support.network import free_port

START_SECONDS = 60


@contextmanager
def serve(settings: Settings) -> Iterator[httpx.Client]:
    """Serve in a thread, and yield a client that ignores the environment's proxies."""
    port = free_port()
    app = build_app(settings, load_rankers(settings.bundles, settings.chosen_variants()))
    server = Server(app, door_limits(settings), 0.0, settings.grace_seconds, host="127.0.0.1", port=port)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the server did not start")
            time.sleep(0.02)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
