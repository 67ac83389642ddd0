"""Vectors of new items in Redis: one value for each version of a ranker, since another version has other vectors.

    {slatewise:<ranker>:<version>:items}             the newest vectors
    {slatewise:<ranker>:<version>:items}:previous    those before them, for a roll-back

A value is replaced as a whole, so a server reads all vectors of one refresh or none of it. Layout, little-endian:

    header      magic, d, number of items, bytes of the ids, created_at (unix seconds), crc32 of all other bytes
    ids         JSON, a list of strings, UTF-8
    events      int64, (items,): the events that a vector was adapted to
    vectors     float32, (items, d)

Called by: `poll.py` (reads), `admin.py` (roll-back), the refresh job (writes). Calls: `client.py`, `codec.py`.
"""

from __future__ import annotations

import json
import logging
import math
import struct
import zlib
from typing import Any

import numpy as np

from slatewise.bundle.adapted_items import AdaptedItems
from slatewise.store.client import run_script
from slatewise.store.codec import Corrupt, Mismatched

HEADER = struct.Struct("<4sIIIdI")
MAGIC = b"SLWI"
MOST_ITEMS = 100_000  # of one value: 26 MB at width 64
PIECE = 2**20  # bytes of one reply: a long one would hold up the look-ups behind it
REPLACE = (
    "if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('RENAME', KEYS[1], KEYS[2]) end "
    "redis.call('SET', KEYS[1], ARGV[1]) return 1"
)
ROLL_BACK = (
    "if redis.call('EXISTS', KEYS[2]) == 1 then redis.call('RENAME', KEYS[2], KEYS[1]) return 1 end "
    "return redis.call('DEL', KEYS[1])"
)

log = logging.getLogger("slatewise")


def items_key(ranker: str, version: int) -> str:
    return f"{{slatewise:{ranker}:{version}:items}}"


def pack_items(items: AdaptedItems) -> bytes:
    """Encode the vectors. Raises ValueError if a number is not finite, or if there are more than MOST_ITEMS items."""
    if len(items.ids) > MOST_ITEMS:
        raise ValueError(f"{len(items.ids):,} new items; at most {MOST_ITEMS:,} are kept: train a new version")
    if not np.isfinite(items.vectors).all():
        raise ValueError("a number is not finite")
    ids = json.dumps(items.ids).encode()
    body = ids + items.events.astype("<i8").tobytes() + items.vectors.astype("<f4").tobytes()
    start = HEADER.pack(MAGIC, items.vectors.shape[1], len(items.ids), len(ids), items.created_at, 0)[:-4]
    return start + zlib.crc32(body, zlib.crc32(start)).to_bytes(4, "little") + body


def unpack_items(value: bytes, width: int) -> AdaptedItems:
    """Decode a value. Raises Corrupt, or Mismatched if the vectors have another width."""
    if len(value) < HEADER.size:
        raise Corrupt("shorter than a header")
    magic, d, count, size, created_at, crc = HEADER.unpack_from(value)
    start, body = value[: HEADER.size - 4], value[HEADER.size :]
    if magic != MAGIC or len(body) != size + (8 + 4 * d) * count:
        raise Corrupt("not vectors of items")
    if zlib.crc32(body, zlib.crc32(start)) != crc:
        raise Corrupt("checksum differs")
    if d != width:
        raise Mismatched(f"{d} dimensions, expected {width}")
    events = np.frombuffer(body, "<i8", count, size).astype(np.int64)
    vectors = np.frombuffer(body, "<f4", count * d, size + 8 * count).reshape(count, d).astype(np.float32)
    if not np.isfinite(vectors).all() or not math.isfinite(created_at):
        raise Corrupt("a number is not finite")
    vectors.flags.writeable = False  # shared by many requests
    return AdaptedItems(json.loads(body[:size]), vectors, events, created_at)


def write_items(client: Any, ranker: str, version: int, items: AdaptedItems) -> int:
    """Replace the vectors of a version, with a blocking client. Returns the bytes. Raises as `pack_items`."""
    key = items_key(ranker, version)
    value = pack_items(items)
    client.eval(REPLACE, 2, key, f"{key}:previous", value)
    return len(value)


def roll_back_items(client: Any, ranker: str, version: int) -> bool:
    """Return to the vectors before the newest ones, or to none. Returns whether something changed."""
    key = items_key(ranker, version)
    return bool(run_script(client, ROLL_BACK, [key, f"{key}:previous"]))


def read_items(client: Any, ranker: str, version: int, width: int) -> AdaptedItems | None:
    """Read the vectors of a version with a blocking client; `None` without any. Raises Corrupt or Mismatched."""
    value = client.get(items_key(ranker, version))
    return None if value is None else unpack_items(value, width)


class ItemReader:
    """Keeps the newest vectors of one version in memory. A fault leaves those that were read before."""

    def __init__(self, ranker: str, version: int, width: int) -> None:
        self.key = items_key(ranker, version)
        self.name = f"{ranker} {version}"
        self.width = width
        self.header: bytes = b""  # of the value that was read last, also if it was unreadable
        self.items: AdaptedItems | None = None

    async def poll(self, client: Any) -> None:
        """Read the vectors if their header has changed, in pieces. Raises redis-py's exceptions."""
        header = await client.getrange(self.key, 0, HEADER.size - 1)
        if header == self.header:
            return
        value = b""
        while piece := await client.getrange(self.key, len(value), len(value) + PIECE - 1):
            value += piece
            if len(piece) < PIECE:
                break
        if value[: HEADER.size] != header:
            return  # replaced meanwhile: the next poll reads it
        self.header = header
        if not header:
            log.info("redis: no vectors of new items of %s any more", self.name)
            self.items = None
            return
        try:
            self.items = unpack_items(value, self.width)
        except ValueError as error:
            log.warning("redis: vectors of new items of %s are not used: %s", self.name, error)
            return
        log.info("redis: %d vectors of new items of %s", len(self.items.ids), self.name)
