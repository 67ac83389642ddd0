"""Reads the body of a request within limits: bytes as sent, bytes after decompression, and time.

Starlette has no such limits.

Called by: `rank.py`, which parses the bytes. Calls: `errors.py`.
"""

import asyncio
import re
import zlib
from itertools import islice

from starlette.datastructures import Headers
from starlette.requests import Request

from slatewise.errors import BodyTimeout, Invalid, NotJson, TooLarge, UnsupportedType, UpgradeRefused

WINDOW_BITS = {"gzip": 31, "deflate": 15}
SMALL_BODY = 16_384  # bytes; JSON of this size holds the event loop for less than ten milliseconds, whatever it is
LONG_INFLATION = 65_536  # bytes as sent, above which a body is inflated in a thread, which needs no lock of Python
NAME = re.compile(rb'"[ \t\r\n]*:')  # the end of a member's name
MOST_DIGITS = 18  # of a Content-Length; int() refuses very long numbers


def content_coding(headers: Headers, any_type: bool = False) -> str:
    """Return the content coding: identity, gzip or deflate.

    Raises UnsupportedType, also for other types than JSON unless `any_type` is set.
    """
    kind = headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if not any_type and kind != "application/json" and not kind.endswith("+json"):
        form = ", not a form, which curl -d sends without it" if "form" in kind else ""
        raise UnsupportedType(f"the body must be JSON with the header Content-Type: application/json{form}")
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
    body = bytearray()  # a list of pieces of one byte would take fifty times the memory
    try:
        async with asyncio.timeout(timeout_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise TooLarge.body(limit)
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {timeout_seconds:g} seconds") from None
    if not body and "upgrade" in request.headers:  # uvicorn's parser drops the body in this case
        raise UpgradeRefused("the body is lost to the Upgrade header: send plain HTTP/1.1 without it")
    if coding == "identity":
        return bytes(body)
    if len(body) > LONG_INFLATION:
        return await asyncio.to_thread(inflate, bytes(body), coding, limit)
    return inflate(bytes(body), coding, limit)


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


def check_counts(json: bytes, most: int) -> None:
    """Refuse a text with more than `most` values, or a quarter as many lists and objects, before it is parsed.

    A parser makes a Python object of each, and no other request is read meanwhile. Commas and brackets inside texts
    count too: to tell them apart takes longer than parsing. Raises Invalid.
    """
    if len(json) <= SMALL_BODY:
        return
    if json.count(b",") >= most:
        raise Invalid.at("", f"the body has more than {most} values (SLATEWISE_MAX_VALUES)")
    if json.count(b"[") + json.count(b"{") > most // 4:
        raise Invalid.at(
            "", f"the body has more than {most // 4} lists and objects (a quarter of SLATEWISE_MAX_VALUES)"
        )


def check_names(json: bytes, most: int) -> None:
    """Refuse a text with more than `most` members: an unknown one costs more than a value. Raises Invalid."""
    if len(json) > SMALL_BODY and next(islice(NAME.finditer(json), most, None), None) is not None:
        raise Invalid.at("", f"the body has more than {most} members")
