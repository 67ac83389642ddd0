"""Capture: writes a sample of the requests to a file in the format of a bundle's `warmup.jsonl`, for replays.

Pseudonyms replace user ids. The sample contains either all requests of a user or none, so that a replay extends
histories as the original traffic did.

Called by: `rank.py` at the end of a request that was ranked, and `app.py`, which opens the capture. Calls:
`line_writer.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from slatewise.http.line_writer import LineWriter
from slatewise.schemas import RankRequest


def appending(path: Path, most_bytes: int) -> Callable[[str], None]:
    """Return a function that appends to a file of mode 600 and renames it to `<name>.1` at half of `most_bytes`."""

    def write(text: str) -> None:
        data = text.encode()
        if path.exists() and path.stat().st_size + len(data) > most_bytes // 2:
            path.replace(f"{path}.1")
        with open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(data)

    return write


class Capture:
    """Captures the requests of a share of the users, and the same share of the requests without a user."""

    def __init__(self, writer: LineWriter, share: float, key: bytes) -> None:
        self.writer = writer
        self.share = share
        self.key = key

    def record(self, request: RankRequest) -> None:
        if self.samples(request.user):
            now = datetime.now(UTC).timestamp()
            self.writer.put(lambda: capture_line(request, now, self.key))

    def samples(self, user: str | None) -> bool:
        if user is None:
            return random.random() < self.share
        return int(pseudonym(user, self.key)[-8:], 16) < self.share * 16**8


def pseudonym(user: str, key: bytes) -> str:
    """Return 32 hexadecimal digits of a keyed hash of the user id, which cannot be inverted without the key."""
    return hmac.digest(key, user.encode(), hashlib.sha256).hex()[:32]


def capture_line(request: RankRequest, now: float, key: bytes) -> str:
    """Render a request as JSON with a pseudonym for the user, and with `now` as the default time.

    Its id is left out, unless it is the seed of an exploration, which a replay then repeats.
    """
    user = None if request.user is None else pseudonym(request.user, key)
    seed = request.id if request.explore else None
    changes = {"id": seed, "user": user, "request_time": now if request.request_time is None else request.request_time}
    return request.model_copy(update=changes).model_dump_json(exclude_none=True, exclude_defaults=True)


@contextmanager
def open_capture(path: Path, most_bytes: int, share: float, key: bytes) -> Iterator[Capture]:
    writer = LineWriter("capture", appending(path, most_bytes))
    try:
        yield Capture(writer, share, key)
    finally:
        writer.close()
