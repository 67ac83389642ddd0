"""Clients that keep their connections and ask without a pause, and tell lost requests from refused connections.

Called by: `tests/http/test_drain.py` and `loadtest/chaos`. Calls: asyncio's streams, so that each byte is seen.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Outcomes by time of the request's begin, in seconds of `time.monotonic`.

    A request is accepted once its connection is: then an answer must follow. refused: the connection was not accepted.
    """

    answered: list[tuple[float, int]] = field(default_factory=list)  # begin, status
    lost: list[str] = field(default_factory=list)
    refused: int = 0
    closes_announced: int = 0
    closes_unannounced: int = 0  # a kept connection ended without an answer that says so

    def statuses(self) -> set[int]:
        return {status for _, status in self.answered}


@dataclass
class Clients:
    """`count` clients of one server. `pause`: seconds between an answer and the next request of a client."""

    port: int
    head: bytes  # of each request, up to the blank line and without Content-Length
    body: Callable[[int], bytes]  # by the number of the request
    count: int = 8
    pause: float = 0.0
    context: ssl.SSLContext | None = None
    tally: Tally = field(default_factory=Tally)
    stopping: bool = False
    sent: int = 0

    async def run(self) -> Tally:
        """Ask until `stopping`, or until the server refuses connections to all."""
        await asyncio.gather(*(self.ask_on() for _ in range(self.count)))
        return self.tally

    async def ask_on(self) -> None:
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while not self.stopping:
            begin = time.monotonic()
            if streams is None:
                try:
                    streams = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context)
                except (ConnectionRefusedError, TimeoutError):
                    self.tally.refused += 1
                    return
                except OSError as error:
                    self.tally.lost.append(f"connect: {error!r}")
                    return
            reader, writer = streams
            body = self.body(self.sent)
            self.sent += 1
            request = self.head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
            try:
                writer.write(request)
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
                length = int(head.lower().split(b"content-length:")[1].split()[0])
                await asyncio.wait_for(reader.readexactly(length), 60)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                self.tally.lost.append(repr(error))
                writer.close()
                streams = None
                continue
            self.tally.answered.append((begin, int(head.split()[1])))
            if b"connection: close" in head.lower():
                self.tally.closes_announced += 1
                writer.close()
                streams = None
            if self.pause:
                await asyncio.sleep(self.pause)
                if streams is not None and reader.at_eof():
                    self.tally.closes_unannounced += 1
                    writer.close()
                    streams = None
        if streams is not None:
            streams[1].close()
