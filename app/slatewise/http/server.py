"""The listening socket, the signals and uvicorn.

Called by: main.py, with an application whose bundles are loaded. Calls: uvicorn with `connection.py` as its protocol,
`drain.py` and `tls.py`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import resource
import signal
import socket
import time
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
from slatewise.http.drain import CloseWhileDraining, cut_requests, end_connections, stop_accepting
from slatewise.http.tls import HANDSHAKE_TIMEOUT_S, ReloadedContext

log = logging.getLogger("slatewise")
KEPT_DESCRIPTORS = 64  # for files, Redis, refused connections, and what libraries open
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class AddressError(ValueError):
    """The server cannot listen on its address."""


class Server(uvicorn.Server):
    """Drains on SIGTERM and SIGHUP: for `drain_seconds`, /readyz responds with 503 and requests are still served.

    Then the requests in flight are finished, for at most `grace_seconds`, and the exit code is 0. SIGINT skips the
    drain, and the exit code is 130. A second signal ends the requests in flight with 503.
    """

    def __init__(
        self,
        app: FastAPI,
        limits: DoorLimits,
        drain_seconds: float,
        grace_seconds: float,
        tls: ReloadedContext | None = None,
        **options: Any,
    ) -> None:
        """`options` are more of uvicorn's."""
        self.door = Door(within_descriptors(limits))
        config = uvicorn.Config(
            CloseWhileDraining(app),
            http=partial(Connection, self.door),  # type: ignore[arg-type]  # it is called as a class is
            ws="none",
            log_config=None,  # its records go to the handler of main.py
            log_level="warning",
            access_log=False,
            proxy_headers=False,  # the client's address is not used
            server_header=False,
            **options,
        )
        super().__init__(config)
        self.app = app
        self.drain_seconds = drain_seconds
        self.grace_seconds = grace_seconds
        self.tls = tls
        self.is_cut = False
        self.draining_since = -math.inf
        self.exit_code = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.app.state.draining:  # the second signal
            self.is_cut = True
            self.should_exit = True
            return
        self.app.state.draining = True
        self.draining_since = time.monotonic()
        if sig == signal.SIGINT:
            self.exit_code = 128 + sig
            self.should_exit = True
        elif not self.started:
            self.should_exit = True
        else:
            asyncio.get_running_loop().call_later(self.drain_seconds, setattr, self, "should_exit", True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish the requests in flight, then end the application, which writes the events that it accepted."""
        self.app.state.draining = True
        listeners = sockets or [listener for server in self.servers for listener in server.sockets]
        if not self.is_cut:
            await stop_accepting(listeners)
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        if not await end_connections(self.server_state, self.grace_seconds, lambda: self.is_cut, self.draining_since):
            await cut_requests(self.app, self.server_state)
        await self.lifespan.shutdown()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            if self.tls is None:
                await super().startup(sockets)
            else:
                await self.start_tls(sockets or [], self.tls)
        except OSError as error:  # another process began to listen since `bind`
            raise AddressError(str(error)) from error
        scheme = "http" if self.tls is None else "https"
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            log.info("listening on %s://%s:%d", scheme, f"[{host}]" if ":" in host else host, port)

    async def start_tls(self, sockets: list[socket.socket], tls: ReloadedContext) -> None:
        """Listen as uvicorn does, but with a timeout of the handshake: uvicorn has no such option."""
        await super().startup([])  # the lifespan of the application
        connect = partial(
            self.config.http_protocol_class,  # type: ignore[call-arg]  # as uvicorn calls it
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        loop = asyncio.get_running_loop()
        for listener in sockets:
            self.servers.append(
                await loop.create_server(
                    connect,
                    sock=listener,
                    ssl=tls,
                    backlog=self.config.backlog,
                    ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
                    ssl_shutdown_timeout=HANDSHAKE_TIMEOUT_S,
                )
            )


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


def run(
    app: FastAPI,
    listener: socket.socket,
    limits: DoorLimits,
    drain_seconds: float,
    grace_seconds: float,
    tls: ReloadedContext | None = None,
) -> int:
    """Serve until a signal stops the server. Return the exit code of the process."""
    server = Server(app, limits, drain_seconds, grace_seconds, tls)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, server.handle_exit)  # uvicorn sets its handlers later, and none for SIGHUP
    server.run([listener])
    return server.exit_code
