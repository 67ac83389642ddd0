"""redis-py's parser of replies, with a limit: a reply that never ends would take memory until its time is over.

Called by: redis-py, for the connections of `client.py`. Calls: redis-py.
"""

from __future__ import annotations

from typing import Any

from redis._parsers import _AsyncRESP2Parser
from redis.exceptions import InvalidResponse

MOST_ELEMENTS = 100_000  # of all arrays of a reply


class BoundedParser(_AsyncRESP2Parser):
    """Refuses a reply of more than `most_bytes` bytes, by the lengths that it announces. The connection is dropped."""

    def __init__(self, socket_read_size: int, most_bytes: int) -> None:
        super().__init__(socket_read_size)
        self.most_bytes = most_bytes
        self.bytes_left = most_bytes
        self.elements_left = MOST_ELEMENTS

    async def read_response(self, disable_decoding: bool = False) -> Any:
        self.bytes_left = self.most_bytes
        self.elements_left = MOST_ELEMENTS
        return await super().read_response(disable_decoding)

    async def _read(self, length: int) -> bytes:
        self.take(length)
        return await super()._read(length)

    async def _readline(self) -> bytes:
        line = await super()._readline()  # StreamReader bounds its length
        self.take(len(line))
        if line[:1] == b"*":
            self.elements_left -= max(0, int(line[1:]))
            if self.elements_left < 0:
                raise InvalidResponse(f"a reply of more than {MOST_ELEMENTS} elements")
        return line

    def take(self, length: int) -> None:
        self.bytes_left -= max(0, length)
        if self.bytes_left < 0:
            raise InvalidResponse(f"a reply of more than {self.most_bytes} bytes")
