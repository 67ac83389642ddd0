"""The limits of a body: type, coding, bytes as sent, bytes after decompression, and time."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request

from slatewise.errors import BodyTimeout, Invalid, NotJson, TooLarge, UnsupportedType
from slatewise.http.body import SMALL_BODY, check_counts, check_names, inflate
from slatewise.http.rank import read_admitted
from slatewise.ranking.admission import Admission
from tests.ranking.support import request_limits

LIMIT = 1_000
Receive = Callable[[], Awaitable[dict[str, object]]]


def request_of(receive: Receive, headers: dict[str, str]) -> Request:
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/rerank",
        "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in headers.items()],
    }
    return Request(scope, receive)


def chunked(*chunks: bytes) -> Receive:
    messages: list[dict[str, object]] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    rest = iter(messages)

    async def receive() -> dict[str, object]:
        return next(rest)

    return receive


async def unread() -> dict[str, object]:
    raise AssertionError("the body was read")


def read(receive: Receive, limit: int = LIMIT, timeout: float = 60, **headers: str) -> bytes:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    admission = Admission(request_limits(max_body_bytes=limit, body_timeout_s=timeout))
    return asyncio.run(read_admitted(request_of(receive, named), admission))


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=utf-8", "application/problem+json", None]
)
def test_json_body_is_returned_as_sent(kind: str | None) -> None:
    headers = {} if kind is None else {"content_type": kind}
    assert read(chunked(b'{"a"', b"", b": 1}"), **headers) == b'{"a": 1}'


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/jsonp",
        "multipart/form-data; boundary=json",
        "json",
        "",
    ],
)
def test_other_content_type_is_refused_without_reading(kind: str) -> None:
    with pytest.raises(UnsupportedType):
        read(unread, content_type=kind)


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "x"])
def test_unknown_content_coding_is_refused_without_reading(coding: str) -> None:
    with pytest.raises(UnsupportedType, match=r"gzip.*deflate"):
        read(unread, content_encoding=coding)


@pytest.mark.parametrize(
    ("coding", "encode"),
    [("identity", bytes), ("", bytes), ("gzip", gzip.compress), ("GZIP", gzip.compress), (" deflate ", zlib.compress)],
)
def test_known_content_coding_is_decompressed(coding: str, encode: Callable[[bytes], bytes]) -> None:
    body = b'{"a": 1}' * 100
    assert read(chunked(encode(body)), content_encoding=coding) == body


@pytest.mark.parametrize("length", [str(LIMIT + 1), "1" + "0" * 18, "9" * 5_000], ids=len)  # int() refuses the last one
def test_content_length_over_limit_is_refused_without_reading(length: str) -> None:
    with pytest.raises(TooLarge, match=str(LIMIT)):
        read(unread, content_length=length)


@pytest.mark.parametrize("length", ["", "-1", "1e9", "x", "\u00b2"])
def test_content_length_that_is_no_number_is_ignored(length: str) -> None:
    assert read(chunked(b"{}"), content_length=length) == b"{}"


def test_body_one_byte_over_the_limit_is_refused() -> None:
    assert len(read(chunked(b" " * LIMIT), content_length=str(LIMIT))) == LIMIT
    with pytest.raises(TooLarge):
        read(chunked(b" " * LIMIT, b" "))


def test_chunked_body_is_read_up_to_the_limit_only() -> None:
    sent = 0

    async def endless() -> dict[str, object]:
        nonlocal sent
        sent += 1
        return {"type": "http.request", "body": b" " * 100, "more_body": True}

    with pytest.raises(TooLarge):
        read(endless)
    assert sent == LIMIT // 100 + 1


def test_wrong_content_length_does_not_raise_the_limit() -> None:
    with pytest.raises(TooLarge):
        read(chunked(b" " * (LIMIT + 1)), content_length="1")


@pytest.mark.parametrize(("coding", "encode"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_limit_applies_to_decompressed_bytes_too(coding: str, encode: Callable[[bytes], bytes]) -> None:
    assert len(read(chunked(encode(b" " * LIMIT)), content_encoding=coding)) == LIMIT
    with pytest.raises(TooLarge, match="inflated"):
        read(chunked(encode(b" " * (LIMIT + 1))), content_encoding=coding)


def test_gzip_bomb_is_refused_in_little_memory() -> None:
    bomb = gzip.compress(bytes(64 * 2**20))
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            inflate(bomb, "gzip", 100_000)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200), st.data())
def test_truncated_gzip_body_is_refused(body: bytes, data: st.DataObject) -> None:
    whole = gzip.compress(body)
    kept = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(NotJson):
        inflate(whole[:kept], "gzip", LIMIT)


@pytest.mark.parametrize(("coding", "encode"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
@pytest.mark.parametrize("garbage", [b"\0", b"garbage", gzip.compress(b"{}", mtime=0)])
def test_bytes_after_the_compressed_stream_are_refused(
    coding: str, encode: Callable[[bytes], bytes], garbage: bytes
) -> None:
    with pytest.raises(NotJson):
        read(chunked(encode(b"{}") + garbage), content_encoding=coding)


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"\x1f\x8b", zlib.compress(b"{}"), gzip.compress(b"{}", mtime=0)[:-1] + b"\1"]
)
def test_body_in_undeclared_coding_is_refused(body: bytes) -> None:
    with pytest.raises(NotJson):
        read(chunked(body), content_encoding="gzip")


@given(st.binary(max_size=300), st.integers(0, 300))
def test_inflate_random_bodies_returns_all_or_refuses(body: bytes, limit: int) -> None:
    for coding, encoded in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body))):
        if len(body) > limit:
            with pytest.raises(TooLarge):
                inflate(encoded, coding, limit)
        else:
            assert inflate(encoded, coding, limit) == body


def test_stalled_body_times_out() -> None:
    sent: list[int] = []

    async def stalling() -> dict[str, object]:
        if sent:
            await asyncio.Event().wait()
        sent.append(1)
        return {"type": "http.request", "body": b"{", "more_body": True}

    with pytest.raises(BodyTimeout, match=r"0\.02 seconds"):
        read(stalling, timeout=0.02)


def test_timeout_applies_to_the_whole_body() -> None:
    async def drip() -> dict[str, object]:
        await asyncio.sleep(0.005)
        return {"type": "http.request", "body": b" ", "more_body": True}

    with pytest.raises(BodyTimeout):
        read(drip, limit=10**9, timeout=0.1)


def test_disconnect_raises_client_disconnect() -> None:
    async def gone() -> dict[str, object]:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        read(gone)


@pytest.mark.parametrize(
    ("json", "text"),
    [
        (b"[" + b"1," * 20_000 + b"1]", "more than 20000 values"),
        (b"[" + b"[]," * 5_000 + b"[]]" + b" " * 2_000, "more than 5000 lists and objects"),
        (b'{"a":' * 5_001, "more than 5000 lists and objects"),
        (b"[" * 20_000, "more than 5000 lists and objects"),
    ],
)
def test_body_of_too_many_values_is_refused_unparsed(json: bytes, text: str) -> None:
    with pytest.raises(Invalid, match=text):
        check_counts(json, 20_000)
    check_counts(json, 80_000)
    check_counts(json[:SMALL_BODY], 1)


@pytest.mark.parametrize("end", [b'":', b'" :', b'"\n\t :'])
def test_members_are_counted_however_they_are_spaced(end: bytes) -> None:
    json = b"{" + b",".join(b'"a' + end + b"1" for _ in range(3_000)) + b"}"
    with pytest.raises(Invalid, match="more than 2999 members"):
        check_names(json, 2_999)
    check_names(json, 3_000)
