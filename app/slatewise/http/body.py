"""Reads the body of a request within limits: bytes as sent, bytes after decompression, and time.

Starlette has no such limits.

Called by: `rank.py`, which parses the bytes. Calls: `errors.py`.
"""

import asyncio
import zlib

from starlette.datastructures import Headers
from starlette.requests import Request

from slatewise.errors import BodyTimeout, NotJson, TooLarge, UnsupportedType, UpgradeRefused

WINDOW_BITS = {"gzip": 31, "deflate": 15}
MOST_DIGITS = 18  # of a Content-Length; int() refuses very long numbers


def content_coding(headers: Headers, any_type: bool = False) -> str:
    """Return the content coding: identity, gzip or deflate.

    Raises UnsupportedType, also for other types than JSON unless `any_type` is set.
    """
    kind = headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if not any_type and kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedType("the body must be application/json")
    coding = headers.get("content-encoding", "identity").strip().lower() or "identity"
    if coding != "identity" and coding not in WINDOW_BITS:
        raise UnsupportedType(f"Content-Encoding must be one of identity, {', '.join(WINDOW_BITS)}")
    return coding


def content_length(headers: Headers) -> int | None:
    """Return the Content-Length in bytes, at most 10**18; `None` if it is missing or not a number."""
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()):
        return None
    return int(length) if len(length) <= MOST_DIGITS else 10**MOST_DIGITS


async def read_body(request: Request, coding: str, limit: int, timeout_seconds: float) -> bytes:
    """Read and decompress the body.

    Raises TooLarge, BodyTimeout, NotJson (broken coding), UpgradeRefused or ClientDisconnect.
    """
    chunks = []
    size = 0
    try:
        async with asyncio.timeout(timeout_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise TooLarge.body(limit)
                chunks.append(chunk)
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {timeout_seconds:g} seconds") from None
    body = b"".join(chunks)
    if not body and "upgrade" in request.headers:  # uvicorn's parser drops the body in this case
        raise UpgradeRefused("the body is lost to the Upgrade header: send plain HTTP/1.1 without it")
    return body if coding == "identity" else inflate(body, coding, limit)


def inflate(body: bytes, coding: str, limit: int) -> bytes:
    """Decompress a body. Raises TooLarge after `limit` bytes, and NotJson for a broken stream."""
    inflater = zlib.decompressobj(WINDOW_BITS[coding])
    try:
        result = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise NotJson(f"the body is not {coding}") from error
    if len(result) > limit:
        raise TooLarge(f"the inflated body is longer than {limit} bytes")
    if not inflater.eof or inflater.unused_data:
        raise NotJson(f"the body is not one whole {coding} stream")
    return result
