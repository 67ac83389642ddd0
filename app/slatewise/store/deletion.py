"""Deletion of a user by the server: the vectors in Redis, and the news of it to the other replicas.

    slatewise:deletions      stream of the users deleted in the last hour, at most about 10,000

Replicas read the stream at each poll, and drop what they keep of these users.
Called by: `lookup.py`, `poll.py`. Calls: `codec.py` and the redis-py client.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

from redis.exceptions import ResponseError

from slatewise import metrics
from slatewise.store.codec import pointer_key, user_key
from slatewise.store.spaces import SpaceKey

STREAM = "slatewise:deletions"
KEPT = 10_000  # entries of the stream, about
KEPT_SECONDS = 3_600
MOST = 1_000  # entries that one poll reads; above it, everything is dropped
STALE_SECONDS = 600.0  # without a poll for so long, entries may be gone
DELETE_SECONDS = 5.0

ALSO_WHILE_WRITING = "if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('SADD', KEYS[2], ARGV[1]) end return 1"
# The bytes of the pointer change, so that replicas empty their caches. See `pointer.py`.
COUNT_DELETION = """
local pointer = redis.call('GET', KEYS[1])
if not pointer then return 0 end
local live, deleted = string.match(pointer, '^([^#]*)#?(%d*)$')
if live then redis.call('SET', KEYS[1], live .. '#' .. string.format('%d', (tonumber(deleted) or 0) + 1)) end
return 1
"""


async def delete_user(client: Any, spaces: Iterable[SpaceKey], user: str) -> None:
    """Delete the vectors of a user in all spaces, also from generations being written, and tell the replicas.

    Raises redis-py's exceptions or TimeoutError. It may be repeated.
    """
    async with asyncio.timeout(DELETE_SECONDS):
        for space in spaces:
            key = pointer_key(*space)
            await client.eval(ALSO_WHILE_WRITING, 2, f"{{{key}}}:writing", f"{{{key}}}:forgotten", user)
            await client.delete(user_key(*space, user))
            await client.eval(COUNT_DELETION, 1, key)
        await client.xadd(STREAM, {"user": user}, maxlen=KEPT)
        await client.expire(STREAM, KEPT_SECONDS)


class Deletions:
    """Follows the stream. `forget` is called with each deleted user, or with `None` if users may have been missed."""

    def __init__(self, client: Any, forget: Callable[[str | None], None]) -> None:
        self.client = client
        self.forget = forget
        self.last = b""  # id of the newest entry that was seen; empty: the stream was never read
        self.read_at = 0.0  # time.monotonic()

    async def read(self) -> None:
        """Read the new entries. Raises redis-py's exceptions, except for a refusal of Redis, which is counted."""
        try:
            entries = await self.new_entries()
        except ResponseError as error:  # of another type, or no permission: the vectors still work
            metrics.REDIS_ERRORS.labels(type(error).__name__).inc()
            return
        now = time.monotonic()
        if len(entries) > MOST or (self.read_at and now - self.read_at > STALE_SECONDS):
            self.forget(None)
        else:
            for _, entry in entries:
                self.forget(entry[b"user"].decode())
        self.read_at = now

    async def new_entries(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """Return the entries after `last`, at most one more than `MOST`; none at the first call."""
        if self.last:
            streams = await self.client.xread({STREAM: self.last}, count=MOST + 1)
            entries: list[tuple[bytes, dict[bytes, bytes]]] = streams[0][1] if streams else []
        else:
            entries = []
        if not self.last or len(entries) > MOST:
            newest = await self.client.xrevrange(STREAM, count=1)
            self.last = newest[0][0] if newest else b"0-0"
        elif entries:
            self.last = entries[-1][0]
        return entries
