"""JSON lines on requests: the log of those that were refused, degraded or slow, and the capture of a sample.

Before: `routes.py`, when a request ends. A thread writes, and what it does not get written in time is dropped and counted: a
reader that stands still, or a disk that is full, holds no request up. No line has a user's id or a key in it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import queue
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slatewise import metrics
from slatewise.ranking.pipeline import Call
from slatewise.schemas import RankRequest
from slatewise.settings import Settings

WAITING = 1_000  # lines
PATIENCE_SECONDS = 2.0  # for those that wait when the server ends


class LineWriter:
    """Writes lines in a thread of its own."""

    def __init__(self, kind: str, write: Callable[[str], object]) -> None:
        self.write = write
        self.queue = queue.Queue[Callable[[], str] | None](WAITING)
        self.written, self.dropped = (metrics.LINES.labels(kind, result) for result in ("written", "dropped"))
        self.thread = threading.Thread(target=self.run, name=f"slatewise-{kind}", daemon=True)
        self.thread.start()

    def put(self, line: Callable[[], str]) -> None:
        """Made into text by the thread. Never waits."""
        try:
            self.queue.put_nowait(line)
        except queue.Full:
            self.dropped.inc()

    def run(self) -> None:
        while (line := self.queue.get()) is not None:
            try:
                self.write(line() + "\n")
                self.written.inc()
            except (OSError, ValueError):  # a full disk, a closed pipe
                self.dropped.inc()

    def close(self) -> None:
        try:
            self.queue.put(None, timeout=PATIENCE_SECONDS)
            self.thread.join(PATIENCE_SECONDS)
        except queue.Full:
            pass  # nobody reads; the thread ends with the process


def to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def appending(path: Path, most_bytes: int) -> Callable[[str], None]:
    """Appends to a file that only its owner reads; at half of the bound it becomes `<name>.1`, in place of the one before."""

    def write(text: str) -> None:
        data = text.encode()
        if path.exists() and path.stat().st_size + len(data) > most_bytes // 2:
            path.replace(f"{path}.1")
        with open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(data)

    return write


class RequestLog:
    """What `routes.py` knows of both: `end` is called once a request."""

    def __init__(
        self, log: LineWriter, slow_seconds: float, capture: LineWriter | None, share: float, key: bytes
    ) -> None:
        self.log = log
        self.slow_seconds = slow_seconds
        self.capture = capture
        self.share = share
        self.key = key

    def end(
        self,
        call: Call | None,
        labels: dict[str, str],
        request_id: Callable[[], str | None],
        refusal: str,
        stages: dict[str, float],
        seconds: float,
    ) -> None:
        slow = 0 < self.slow_seconds <= seconds
        degraded = sorted(call.degraded) if call is not None and not refusal else []
        if refusal or degraded or slow:
            reasons = [refusal] * bool(refusal) + degraded + ["slow"] * slow
            identifier = request_id()  # most requests leave no line
            self.log.put(lambda: log_line(call, labels, identifier, reasons, stages, seconds))
        if self.capture is not None and call is not None and not refusal and self.sampled(call.request.user):
            request = call.request
            now = datetime.now(UTC).timestamp()
            self.capture.put(lambda: capture_line(request, now, self.key))

    def sampled(self, user: str | None) -> bool:
        """A user's requests all or none, so that a replay finds histories that grow; of requests without one, as many."""
        if user is None:
            return random.random() < self.share
        return int(pseudonym(user, self.key)[-8:], 16) < self.share * 16**8


def log_line(
    call: Call | None,
    labels: dict[str, str],
    request_id: str | None,
    reasons: list[str],
    stages: dict[str, float],
    seconds: float,
) -> str:
    """`labels` are those of slatewise_requests_total, `reasons` those of slatewise_degraded_total, a refusal's problem type, or `slow`."""
    line: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": request_id,
        "reasons": reasons,
        **labels,
    }
    if call is not None and call.ranker is not None:
        line |= {
            "exit": call.exit,
            "candidates": len(call.request.candidates.item_ids),
            "events": call.history_used,
            "history_cache": call.cache,
        }
        line["meta_embedding"] = None if call.meta is None else call.meta.status
    milliseconds = {stage: round(spent * 1e3, 3) for stage, spent in stages.items()}
    return json.dumps(line | {"stages_ms": milliseconds, "total_ms": round(seconds * 1e3, 3)})


def pseudonym(user: str, key: bytes) -> str:
    """The same for the same user and key, and nothing to be learned from it without the key."""
    return hmac.digest(key, user.encode(), hashlib.sha256).hex()[:32]


def capture_line(request: RankRequest, now: float, key: bytes) -> str:
    """A request as in a bundle's warmup.jsonl: without its id, with the time at which it was ranked, and a pseudonym for the user."""
    user = None if request.user is None else pseudonym(request.user, key)
    changes = {"id": None, "user": user, "request_time": now if request.request_time is None else request.request_time}
    return request.model_copy(update=changes).model_dump_json(exclude_none=True, exclude_defaults=True)


@contextmanager
def open_request_log(settings: Settings) -> Iterator[RequestLog]:
    log = LineWriter("log", to_stdout)
    capture = None
    if settings.capture_file:
        capture = LineWriter("capture", appending(Path(settings.capture_file), int(settings.capture_mb * 2**20)))
    try:
        yield RequestLog(
            log,
            settings.slow_ms / 1e3,
            capture,
            settings.capture_share,
            settings.capture_key.get_secret_value().encode(),
        )
    finally:
        for lines in (log, capture):
            if lines is not None:
                lines.close()
