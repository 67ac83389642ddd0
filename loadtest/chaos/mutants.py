"""Requests with random changes, for every route: they must end, and without an error of the server.

Called by: `door.py`. Calls: asyncio.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter

AT_ONCE = 200  # connections
END_SECONDS = 15.0
PATHS = (
    "/rerank",
    "/score",
    "/v1/rerank",
    "/v2/rerank",
    "/tei/rerank",
    "/personalize-ranking",
    "/rank/movielens",
    "/events",
    "/feedback",
    "/encode",
    "/v2/models/movielens/infer",
    "/nothing",
)
BODY = (
    b'{"user":"u","candidates":{"item_ids":["1","2"]},"history":{"item_ids":["3"]},"query":"u","documents":["1"],'
    b'"texts":["1"],"userId":"u","inputList":["1"],"campaignArn":"a/movielens","items":[{"id":"1"}]}'
)
LINES = (
    b"Host: y",
    b"Content-Length: 5",
    b"Content-Length: 99999999999999999999",
    b"Transfer-Encoding: chunked",
    b"Content-Encoding: gzip",
    b"Expect: 100-continue",
    b"Connection: close",
    b"Connection: Upgrade\r\nUpgrade: websocket",
    b"X-User-ID: \xff",
    b"Inference-Header-Content-Length: 7",
    b"A: " + b"b" * 40_000,
)
PIECES = (b"\0", b"\r\n", b"\n", b"[" * 500, b"\xff\xfe", b"%00", b"9" * 50, b'"', b"{}", b"\r\n\r\n", b"../", b": ")


def mutant(numbers: random.Random) -> bytes:
    """A request with one to three changes."""
    path = numbers.choice(PATHS).encode()
    headers = [b"Host: x", b"Content-Type: application/json", b"Content-Length: %d" % len(BODY)]
    for _ in range(numbers.choice((0, 0, 1, 2))):
        headers.insert(numbers.randrange(len(headers) + 1), numbers.choice(LINES))
    method = numbers.choice((b"POST", b"POST", b"POST", b"GET", b"DELETE", b"OPTIONS", b"PUT", b"BREW"))
    data = bytearray(method + b" " + path + b" HTTP/1.1\r\n" + b"\r\n".join(headers) + b"\r\n\r\n" + BODY)
    for _ in range(numbers.choice((0, 1, 1, 2, 3))):
        at = numbers.randrange(len(data))
        change = numbers.randrange(4)
        if change == 0:
            data[at] = numbers.randrange(256)
        elif change == 1:
            del data[at : at + numbers.choice((1, 2, 20))]
        elif change == 2:
            data[at:at] = numbers.choice(PIECES)
        else:
            data[at:at] = data[at : at + numbers.randrange(100)]
    return bytes(data)


async def send_one(port: int, data: bytes, counts: Counter[int]) -> str:
    """Send a mutant, and a good request that ends the connection. Returns what is wrong with the answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    try:
        async with asyncio.timeout(END_SECONDS):
            writer.write(data + b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            received = await reader.read(-1)
    except TimeoutError:
        return f"no end after {END_SECONDS:g} s: {data!r}"
    except OSError:
        pass  # reset: closed as well
    finally:
        writer.close()
    statuses = [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]
    counts.update(statuses)
    return f"{max(statuses)}: {data!r}" if max(statuses, default=0) >= 500 else ""


async def send_all(port: int, number: int) -> tuple[list[str], Counter[int]]:
    numbers = random.Random(0)
    counts: Counter[int] = Counter()
    faults: list[str] = []
    left = iter(range(number))

    async def work() -> None:
        for _ in left:
            if fault := await send_one(port, mutant(numbers), counts):
                faults.append(fault)

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return faults, counts


def send_mutants(port: int, number: int) -> tuple[list[str], Counter[int]]:
    """Send so many requests. Returns what went wrong, and the number of answers of each status."""
    return asyncio.run(send_all(port, number))
