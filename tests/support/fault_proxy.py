"""A TCP proxy in front of a real Redis that injects network faults: delay, silence, refusal, cut replies, garbage,
small pieces, few bytes a second.

With a TLS context it terminates its clients' TLS, for a redis-server that was built without TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class FaultProxy:
    """Change its attributes while it runs; `heal` removes all faults."""

    def __init__(self, upstream: int, delay: Callable[[], float] | float = 0.0) -> None:
        self.upstream = upstream
        self.delay = delay
        self.port = 0
        self.may_speak = asyncio.Event()  # cleared: a black hole that accepts connections and never replies
        self.may_speak.set()
        self.cut = False  # send half of a reply, then reset the connection
        self.piece = 65_536  # largest number of bytes forwarded at once
        self.bytes_per_second = float("inf")
        self.answer: bytes | None = None  # sent instead of Redis' reply
        self.down = False  # reset every new connection
        self.accepted = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.writers: set[asyncio.StreamWriter] = set()

    @property
    def open(self) -> int:
        return len(self.tasks)

    def heal(self) -> None:
        self.delay = 0.0
        self.cut = False
        self.piece = 65_536
        self.bytes_per_second = float("inf")
        self.answer = None
        self.down = False
        self.may_speak.set()

    def reset_all(self) -> None:
        for writer in list(self.writers):
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.accepted += 1
        if self.down:
            writer.transport.abort()
            return
        self.tasks.add(task)
        ends = [writer]
        self.writers.add(writer)
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream)
            ends.append(up_writer)
            await asyncio.gather(self.requests(reader, up_writer), self.replies(up_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self.writers.discard(writer)
            for end in ends:
                end.close()
                with contextlib.suppress(OSError, ssl.SSLError):
                    await end.wait_closed()
            self.tasks.discard(task)

    async def requests(self, reader: asyncio.StreamReader, up_writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            up_writer.write(data)
            await up_writer.drain()
        up_writer.close()

    async def replies(self, up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await up_reader.read(65_536):
            await asyncio.sleep(self.delay() if callable(self.delay) else self.delay)
            await self.may_speak.wait()
            if self.cut:
                writer.write(data[: len(data) // 2])
                await writer.drain()
                writer.transport.abort()
                raise ConnectionResetError
            data = data if self.answer is None else self.answer
            for first in range(0, len(data), self.piece):
                writer.write(data[first : first + self.piece])
                await writer.drain()
                await asyncio.sleep(min(self.piece, len(data) - first) / self.bytes_per_second)
        writer.close()


@asynccontextmanager
async def fault_proxy(
    upstream: int, delay: Callable[[], float] | float = 0.0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy(upstream, delay)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, ssl=tls)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in list(proxy.tasks):
            task.cancel()
        await asyncio.gather(*proxy.tasks, return_exceptions=True)
        await server.wait_closed()
