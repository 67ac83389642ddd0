"""The listening socket, the signals and uvicorn.

Called by: main.py, with an application whose bundles are loaded. Calls: uvicorn with `connection.py` as its protocol.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from slatewise import metrics
from slatewise.http.connection import Connection
from slatewise.http.door import Door, DoorLimits, places

log = logging.getLogger("slatewise")
KEPT_DESCRIPTORS = 64  # for files, Redis, refused connections, and what libraries open
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class AddressError(ValueError):
    """The server cannot listen on its address."""


class Server(uvicorn.Server):
    """Drains on SIGTERM and SIGHUP: for `drain_seconds`, /readyz responds with 503 and requests are still served. Then
    the requests in flight are finished, and the exit code is 0. A second signal skips the wait. SIGINT skips the drain,
    finishes the requests in flight, and exits with 130.
    """

    def __init__(self, app: FastAPI, drain_seconds: float, limits: DoorLimits, **options: Any) -> None:
        """`options` are more of uvicorn's."""
        self.door = Door(within_descriptors(limits))
        config = uvicorn.Config(
            app,
            http=partial(Connection, self.door),  # type: ignore[arg-type]  # it is called as a class is
            ws="none",
            log_config=None,  # its records go to the handler of main.py
            log_level="warning",
            access_log=False,
            proxy_headers=False,  # the client's address is not used
            timeout_graceful_shutdown=30,
            server_header=False,
            **options,
        )
        super().__init__(config)
        self.app = app
        self.drain_seconds = drain_seconds
        self.exit_code = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGINT:
            self.force_exit = self.should_exit  # a second SIGINT does not wait for requests in flight
            self.should_exit = True
            self.exit_code = 128 + sig
        elif self.app.state.draining or not self.started:
            self.should_exit = True
        else:
            self.app.state.draining = True
            asyncio.get_running_loop().call_later(self.drain_seconds, setattr, self, "should_exit", True)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # another process began to listen since `bind`
            raise AddressError(str(error)) from error
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)


def within_descriptors(limits: DoorLimits) -> DoorLimits:
    """Return the limits with as many connections as there are descriptors for, if these are fewer."""
    used = KEPT_DESCRIPTORS
    with suppress(OSError):
        used += len(os.listdir("/dev/fd"))
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = places(limits.max_connections, descriptors, used)
    if most < limits.max_connections:
        log.warning("at most %d connections, not %d: `ulimit -n` is %d", most, limits.max_connections, descriptors)
    metrics.CONNECTIONS_LIMIT.set(most)
    return replace(limits, max_connections=most)


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket, which does not listen yet. Raises AddressError, for example if the port is in use."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise AddressError(
            f"cannot listen on {host}, port {port}: {error.strerror}. "
            "Choose the address with SLATEWISE_HOST (--host) and the port with SLATEWISE_PORT (--port)"
        ) from None
    return listener


def run(app: FastAPI, listener: socket.socket, drain_seconds: float, limits: DoorLimits) -> int:
    """Serve until a signal stops the server. Return the exit code of the process."""
    server = Server(app, drain_seconds, limits)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, server.handle_exit)  # uvicorn sets its handlers later, and none for SIGHUP
    server.run([listener])
    return server.exit_code
