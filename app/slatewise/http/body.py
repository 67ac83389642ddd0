"""A request's body, bounded: in bytes as sent, in bytes once inflated, and in time. Starlette has none of these limits.

Before: the ASGI server. After: `routes.py` hands the bytes to the schema.
"""

import asyncio
import zlib

from starlette.requests import Request

from slatewise.errors import BodyTimeout, NotJson, TooLarge, UnsupportedType, UpgradeRefused

WINDOW_BITS = {"gzip": 31, "deflate": 15}


def check_headers(request: Request, limit: int) -> str:
    """The content coding. Raises UnsupportedType, or TooLarge by the Content-Length alone, before a byte is read."""
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedType("the body must be application/json")
    coding = request.headers.get("content-encoding", "identity").strip().lower() or "identity"
    if coding != "identity" and coding not in WINDOW_BITS:
        raise UnsupportedType(f"Content-Encoding must be one of identity, {', '.join(WINDOW_BITS)}")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise TooLarge(f"the body is longer than {limit} bytes")
    return coding


async def read_body(request: Request, limit: int, timeout_seconds: float) -> bytes:
    """Raises UnsupportedType, TooLarge, BodyTimeout, NotJson (broken coding) or starlette's ClientDisconnect."""
    coding = check_headers(request, limit)
    chunks = []
    size = 0
    try:
        async with asyncio.timeout(timeout_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise TooLarge(f"the body is longer than {limit} bytes")
                chunks.append(chunk)
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {timeout_seconds:g} seconds") from None
    body = b"".join(chunks)
    if not body and "upgrade" in request.headers:  # uvicorn's parser takes what follows for another protocol
        raise UpgradeRefused("the body is lost to the Upgrade header: send plain HTTP/1.1 without it")
    return body if coding == "identity" else inflate(body, coding, limit)


def inflate(body: bytes, coding: str, limit: int) -> bytes:
    """At most `limit` bytes are ever inflated."""
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
