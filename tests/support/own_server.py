"""The application in this process, behind the real server with its drain and TLS.

Called by: `tests/http/test_drain.py`, `tests/http/test_tls.py`. Calls: `slatewise/http/server.py`.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
from fastapi import FastAPI

from slatewise.http.server import Server, bind
from slatewise.http.tls import ReloadedContext
from slatewise.main import door_limits
from slatewise.settings import Settings


class OwnServer:
    """A server in a thread; `signal` is delivered as the operating system would."""

    def __init__(
        self, app: FastAPI, drain: float = 0.0, grace: float = 20.0, tls: ReloadedContext | None = None
    ) -> None:
        listener = bind("127.0.0.1", 0)
        self.port: int = listener.getsockname()[1]
        self.server = Server(app, door_limits(Settings()), drain, grace, tls)
        self.loop: asyncio.AbstractEventLoop

        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            await self.server.serve([listener])

        self.thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self.thread.start()
        give_up = time.monotonic() + 30
        while not self.server.started:
            assert time.monotonic() < give_up and self.thread.is_alive()
            time.sleep(0.01)
        self.pool = ThreadPoolExecutor(4)
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}"

    def signal(self, number: int) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.server.handle_exit, number, None)

    def post(self, body: dict[str, Any]) -> Future[httpx.Response]:
        return self.pool.submit(httpx.post, f"{self.url}/score", json=body, timeout=30, trust_env=False)

    def seconds_to_end(self) -> float:
        begin = time.monotonic()
        self.thread.join(30)
        assert not self.thread.is_alive()
        return time.monotonic() - begin

    def stop(self) -> None:
        for _ in range(2):
            self.signal(signal.SIGINT)
        self.seconds_to_end()
        self.pool.shutdown()
