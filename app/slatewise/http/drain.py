"""The end of connections: a server that stops loses no request that a client has sent.

    SIGTERM --- drain: all is served, answers carry `Connection: close` --- no new connections --- what is left ends

HTTP/1.1 lets a server close a connection only where it knows that no request is on its way: behind an answer that says
so, or after a long silence. So every answer of the drain says so. A connection that was silent for the whole drain, and
at least a second, is idle, and is closed. One that was just accepted has a request under way, and is waited for.

Called by: `server.py`. Calls: `connection.py`.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send
from uvicorn.server import ServerState

from slatewise.http.connection import Connection

HANDSHAKE_SECONDS = 0.1  # for the handshakes that have begun, and for the queue of accepted connections
SILENT_SECONDS = 1.0  # after which a connection without a request is closed: since the drain began, or since it is new
LOOK_SECONDS = 0.02  # between two looks at the connections
LAST_ANSWERS_SECONDS = 1.0  # for the answers 503 of requests that are cut

SO_ATTACH_FILTER = 26  # of Linux: socket(7)
# For the TCP header of each packet: kept if the flag ACK is set, dropped otherwise. So a listening socket answers no
# further SYN, while handshakes that have begun are completed.
NO_NEW_HANDSHAKES = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x10), (0x06, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0))


class CloseWhileDraining:
    """Adds `Connection: close` to the answers while the application drains; the server then closes the connection."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and self.app.state.draining:
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        await self.app(scope, receive, send_last if scope["type"] == "http" else send)


async def stop_accepting(listeners: Iterable[socket.socket]) -> None:
    """Let no new connection begin, and let the event loop accept all that have begun: a close would reset them."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in NO_NEW_HANDSHAKES))
    program = struct.pack("HP", len(NO_NEW_HANDSHAKES), ctypes.addressof(code))
    for listener in listeners:
        # The event loop's sockets set no options; a duplicate is the same socket to the kernel.
        with socket.socket(fileno=os.dup(listener.fileno())) as same, suppress(OSError):
            # Elsewhere than on Linux, a connection that begins within the next milliseconds may be reset.
            same.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    await asyncio.sleep(HANDSHAKE_SECONDS)


async def end_connections(
    state: ServerState, seconds: float, is_cut: Callable[[], bool], draining_since: float = -math.inf
) -> bool:
    """Wait until all requests have ended; close the idle connections. False: not within `seconds`, or `is_cut()`.

    draining_since: by `time.monotonic`.
    """
    begin = time.monotonic()
    while state.connections or state.tasks:
        now = time.monotonic()
        if now - begin > seconds or is_cut():
            return False
        close_silent(state.connections, now - draining_since > SILENT_SECONDS, now - begin > SILENT_SECONDS)
        await asyncio.sleep(LOOK_SECONDS)
    return True


def close_silent(connections: Iterable[Any], idle: bool, new: bool) -> None:
    """Close the connections that wait for a request, unless bytes of one have arrived: the event loop reads them.

    idle: those whose last request was answered. new: those that never had one.
    """
    silent = [
        c for c in connections if isinstance(c, Connection) and c.is_idle and (idle if c.cycle is not None else new)
    ]
    poll = select.poll()
    by_descriptor = {c.transport.get_extra_info("socket").fileno(): c for c in silent if not c.transport.is_closing()}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    has_bytes = {descriptor for descriptor, _ in poll.poll(0)}
    for descriptor, connection in by_descriptor.items():
        if descriptor not in has_bytes:
            connection.transport.close()


async def cut_requests(app: FastAPI, state: ServerState) -> None:
    """End all requests now: those that rank get 503, and connections that remain are closed."""
    if app.state.pipeline is not None:
        app.state.pipeline.workers.stop()
    await end_connections(state, LAST_ANSWERS_SECONDS, lambda: False)
    for task in list(state.tasks):
        task.cancel()
    for connection in list(state.connections):
        connection.transport.abort()
    await asyncio.sleep(0)
