"""Encodes and decodes stored vectors, and names the Redis keys.

    slatewise:<ranker>:<space>:generations       "7,6,5": live generations, newest first; "7,6,5#3": 3 users deleted
    slatewise:<ranker>:<space>:emb:{<user>}      hash; field: generation; value: header and vector

A vector is stored as float32, as float16, or as int8 with one float32 scale.
Called by: `generations.py`, `pointer.py`, `poll.py`, `lookup.py`, `push.py`. Calls: numpy, zlib.
"""

from __future__ import annotations

import contextlib
import math
import struct
import zlib

import numpy as np

from slatewise.inference.arrays import Float32

HEADER = struct.Struct(
    "<4sBxHdQI"
)  # magic, dtype, dim, created_at (unix seconds), generation, crc32 of all other bytes
MAGIC = b"SLWM"
DTYPES = {"float32": 0, "float16": 1, "int8": 2}
FLOAT32 = DTYPES["float32"]
INT8 = DTYPES["int8"]


class Corrupt(ValueError):
    """The bytes are not a stored value, or were changed."""


class Mismatched(ValueError):
    """The value is intact, but has another size or another generation than expected."""


def pack(vector: Float32, generation: int, created_at: float, dtype: str = "float32") -> bytes:
    """Encode one (M,) vector; see `pack_many`."""
    return pack_many(vector[None], generation, created_at, dtype)[0]


def pack_many(vectors: Float32, generation: int, created_at: float, dtype: str = "float32") -> list[bytes]:
    """Encode (users, M) vectors to one value each, little-endian, with a checksum; `created_at` in unix seconds.

    Raises ValueError if a number is not finite or too large for the dtype.
    """
    code = DTYPES[dtype]
    dim = vectors.shape[1]
    if not np.isfinite(vectors).all():
        raise ValueError("a number is not finite")
    if code == INT8:
        scales = (np.abs(vectors).max(axis=1, initial=0.0) / 127).astype("<f4")  # (users,)
        steps = np.divide(vectors, scales[:, None], out=np.zeros(vectors.shape, np.float32), where=scales[:, None] > 0)
        body = np.hstack(
            [scales[:, None].view(np.uint8), np.clip(np.rint(steps), -127, 127).astype(np.int8).view(np.uint8)]
        )
    else:
        with np.errstate(over="ignore"):
            body = vectors.astype("<f4" if code == FLOAT32 else "<f2")
        if not np.isfinite(body).all():
            raise ValueError(f"a number is too large for {dtype}")
    header = HEADER.pack(MAGIC, code, dim, created_at, generation, 0)
    start = header[:-4]
    end = zlib.crc32(header)
    return [start + zlib.crc32(row, end).to_bytes(4, "little") + row for row in map(bytes, body)]


def check(value: bytes) -> tuple[int, int, float, int]:
    """Verify the checksum of a stored value. Return (dtype, dim, created_at, generation). Raises Corrupt."""
    if not isinstance(value, bytes) or len(value) < HEADER.size:
        raise Corrupt("shorter than a header")
    magic, code, dim, created_at, generation, crc = HEADER.unpack_from(value)
    if magic != MAGIC or code not in DTYPES.values():
        raise Corrupt("not a vector")
    if len(value) != HEADER.size + (4 * dim, 2 * dim, 4 + dim)[code]:
        raise Corrupt(f"{len(value)} bytes")
    if zlib.crc32(value[: HEADER.size - 4] + bytes(4) + value[HEADER.size :]) != crc:  # header padding included
        raise Corrupt("checksum differs")
    return code, dim, created_at, generation


def unpack(value: bytes, dim: int) -> tuple[Float32, int, float]:
    """Decode a value to (vector (dim,), generation, created_at). Raises Corrupt, or Mismatched for another size."""
    code, found, created_at, generation = check(value)
    if code == INT8:
        scale = np.frombuffer(value, "<f4", 1, HEADER.size)
        vector = scale * np.frombuffer(value, np.int8, found, HEADER.size + 4).astype(np.float32)
    else:
        vector = np.frombuffer(value, "<f4" if code == FLOAT32 else "<f2", found, HEADER.size).astype(np.float32)
    if not np.isfinite(vector).all() or not math.isfinite(created_at):
        raise Corrupt("a number is not finite")
    if found != dim:
        raise Mismatched(f"{found} dimensions, expected {dim}")
    return vector, generation, created_at


def renumbered(value: bytes, generation: int) -> bytes:
    """Copy a stored value to another generation number, with vector and age unchanged. Raises Corrupt."""
    code, dim, created_at, _ = check(value)
    header = HEADER.pack(MAGIC, code, dim, created_at, generation, 0)
    body = value[HEADER.size :]
    return header[:-4] + zlib.crc32(body, zlib.crc32(header)).to_bytes(4, "little") + body


def first_readable(values: list[bytes | None], generation: int) -> bytes | None:
    """Return the first value that is not corrupt, copied to the given generation, or `None`."""
    for value in values:
        if value is not None:
            with contextlib.suppress(Corrupt):
                return renumbered(value, generation)
    return None


def pointer_key(ranker: str, space: str) -> str:
    return f"slatewise:{ranker}:{space}:generations"


def user_key(ranker: str, space: str, user: str) -> str:
    return f"slatewise:{ranker}:{space}:emb:{{{user}}}"


def metadata_key(ranker: str, space: str) -> str:
    """Return the key of a hash with one field per generation: JSON with `created_at`, kind and size."""
    return f"{{{pointer_key(ranker, space)}}}:about"


def read_pointer(value: bytes | None) -> tuple[list[int], int]:
    """Decode a pointer to (live generations, number of deleted users). Entries that are not numbers are skipped."""
    listed, _, deleted = (value or b"").decode("ascii", "replace").partition("#")
    live = [int(g) for g in listed.split(",") if g.isdecimal() and str(int(g)) == g and int(g) < 2**64]
    return live, int(deleted) if deleted.isdecimal() else 0
