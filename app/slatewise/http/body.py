"""The body of a request, limited in bytes as sent, in bytes after decompression, and in time.

Starlette has no such limits.

Called by: `rank.py`, which parses the bytes. Calls: nothing of ours but the errors.
"""

import asyncio
import zlib

from starlette.datastructures import Headers
from starlette.requests import Request

from slatewise.errors import BodyTimeout, NotJson, TooLarge, UnsupportedType, UpgradeRefused

WINDOW_BITS = {"gzip": 31, "deflate": 15}
MOST_DIGITS = 18  # of a Content-Length that is converted; int() refuses very long ones


def content_coding(headers: Headers) -> str:
    """The content coding: identity, gzip or deflate. Raises UnsupportedType, also for a body that is not JSON."""
    kind = headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedType("the body must be application/json")
    coding = headers.get("content-encoding", "identity").strip().lower() or "identity"
    if coding != "identity" and coding not in WINDOW_BITS:
        raise UnsupportedType(f"Content-Encoding must be one of identity, {', '.join(WINDOW_BITS)}")
    return coding


def content_length(headers: Headers) -> int | None:
    """The Content-Length in bytes; `None` if it is missing or not a number. Lengths of 10**18 and more are equal."""
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()):
        return None
    return int(length) if len(length) <= MOST_DIGITS else 10**MOST_DIGITS


async def read_body(request: Request, coding: str, limit: int, timeout_seconds: float) -> bytes:
    """The decompressed body. Raises TooLarge, BodyTimeout, NotJson (broken coding) or ClientDisconnect."""
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
    """The decompressed body. Stops after `limit` bytes and raises TooLarge; raises NotJson for a broken stream."""
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
