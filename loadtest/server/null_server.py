"""The cheapest server: answers every request with a fixed body, to load the machine with the client alone.

    python -m loadtest.server.null_server PORT BYTES

Called by: `overhead.py`. Calls: uvloop.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop


class Fixed(asyncio.Protocol):
    """One connection, without pipelining. A request has a Content-Length or no body."""

    def __init__(self, body: bytes) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.answer = head.encode() + body
        self.received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            lines = bytes(self.received[:end]).lower().split(b"\r\n")
            length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
            if len(self.received) < end + 4 + length:
                return
            del self.received[: end + 4 + length]
            self.transport.write(self.answer)


async def serve(port: int, size: int) -> None:
    body = b'"' + b"0" * (size - 2) + b'"'
    server = await asyncio.get_running_loop().create_server(lambda: Fixed(body), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
