"""Middleware that waits for the body of a request before the application is called.

A request whose body has not arrived therefore takes no place of a whole one, and is not at work. All bodies that are
being read share a number of bytes: above it, an old one of the address that holds most of them is dropped.

Called by: the middleware stack of `app.py`, behind the check of keys. Calls: `body.py` and `door.py`.
"""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slatewise.errors import LATER, BodyTimeout, Overloaded, RankingError
from slatewise.http.body import content_length
from slatewise.http.door import address_of

METHODS = frozenset(("POST", "PUT", "PATCH"))
LEAST_RATE = 1_000  # bytes in a second that a body must arrive with, after a first part of its time
FIRST_PART = 0.5  # of the timeout
BLOCK = 65_536  # bytes
BODIES_AT_ONCE = 16  # bodies of the largest size whose bytes may wait for the rest of them


class PartOfBody:
    """A body that is being read."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.size = 0  # bytes
        self.blocks: list[bytes] = []
        self.last = bytearray()  # pieces may be of one byte, and a buffer of the whole body would move as it grows
        self.timeout = asyncio.timeout(None)
        self.is_dropped = False

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        self.last += piece
        if len(self.last) >= BLOCK:
            self.blocks.append(bytes(self.last))
            self.last = bytearray()

    def drop(self) -> None:
        self.size = 0
        self.blocks = []
        self.last = bytearray()
        self.is_dropped = True
        self.timeout.reschedule(0)  # the past


class WholeBodies:
    """Limits: bytes of one body, seconds for it, and bytes of all bodies that are being read."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, body_timeout_s: float) -> None:
        self.app = app
        self.most = max_body_bytes
        self.seconds = body_timeout_s
        self.most_of_all = BODIES_AT_ONCE * max_body_bytes
        self.bytes_of_all = 0
        self.turns = asyncio.Lock()
        self.parts: dict[PartOfBody, None] = {}  # oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in METHODS:
            return await self.app(scope, receive, send)
        scope.setdefault("entered", time.perf_counter())
        length = content_length(Headers(scope=scope))
        if length is not None and length > self.most:  # refused unread
            return await self.app(scope, receive, send)
        message = await receive()
        error: RankingError | None = None
        if message["type"] == "http.request" and message.get("more_body"):
            try:
                message = await self.read(message, address_of(scope.get("client")), receive)
            except RankingError as refusal:
                error = refusal

        async def replay() -> Message:
            nonlocal message
            if error is not None:
                raise error
            given, message = message, {}
            return given or await receive()

        await self.app(scope, replay, send)

    async def read(self, first: Message, address: str, receive: Receive) -> Message:
        """Return the body as one message, or as much of it as is longer than the limit; or the disconnect.

        Raises BodyTimeout or Overloaded.
        """
        begin = asyncio.get_running_loop().time()
        part = PartOfBody(address)
        self.parts[part] = None
        message = first
        try:
            async with part.timeout:
                while True:
                    piece = message.get("body", b"")
                    part.add(piece)
                    self.bytes_of_all += len(piece)
                    if not message.get("more_body") or part.size > self.most:
                        return {**message, "body": b"".join([*part.blocks, part.last])}
                    if self.bytes_of_all > self.most_of_all:
                        self.drop_oldest()
                    if not part.is_dropped:
                        wait = min(self.seconds, self.seconds * FIRST_PART + part.size / LEAST_RATE)
                        part.timeout.reschedule(begin + wait)
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return message
        except TimeoutError:
            async with self.turns:  # of thousands that end together, one after the other: each has an answer to make
                await asyncio.sleep(0)
            if part.is_dropped:
                raise Overloaded(f"too many bytes of bodies wait for the rest of their bodies: {LATER}") from None
            raise BodyTimeout(
                f"the body did not arrive within {self.seconds:g} seconds, or with less than {LEAST_RATE} bytes in a "
                f"second after the first {self.seconds * FIRST_PART:g}"
            ) from None
        finally:
            self.bytes_of_all -= part.size
            del self.parts[part]

    def drop_oldest(self) -> None:
        """End the reading of a body of the address that holds most bytes: of its larger half, the oldest one."""
        of_address: dict[str, list[PartOfBody]] = {}
        for part in self.parts:
            if part.size:
                of_address.setdefault(part.address, []).append(part)
        parts = max(of_address.values(), key=lambda parts: sum(part.size for part in parts))
        mean = sum(part.size for part in parts) / len(parts)
        oldest = next(part for part in parts if part.size >= mean)
        self.bytes_of_all -= oldest.size
        oldest.drop()
