"""Request log: one JSON line for each request that was refused, degraded or slow, without user ids and keys.

A thread writes the lines. Lines that are not written in time are dropped and counted, so that a stalled reader or a
full disk delays no request.

Called by: `rank.py`, at the end of a request, and `capture.py` for the writer. Calls: the metrics.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from slatewise import metrics
from slatewise.ranking.trace import Trace

WAITING = 1_000  # lines that may wait for the writer
PATIENCE_SECONDS = 2.0  # for the lines that wait at the end of the server


class LineWriter:
    """Writes lines in its own thread."""

    def __init__(self, kind: str, write: Callable[[str], object]) -> None:
        self.write = write
        self.queue = queue.Queue[Callable[[], str] | None](WAITING)
        self.written, self.dropped = (metrics.LINES.labels(kind, result) for result in ("written", "dropped"))
        self.thread = threading.Thread(target=self.run, name=f"slatewise-{kind}", daemon=True)
        self.thread.start()

    def put(self, line: Callable[[], str]) -> None:
        """Queue a line, which the thread renders. Never waits."""
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
            pass  # the reader has stalled; the thread ends with the process


def to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@dataclass(frozen=True)
class Outcome:
    """The end of a request."""

    labels: dict[str, str]  # of slatewise_requests_total
    refusal: str  # last part of the problem type; empty for a ranking
    degraded: tuple[str, ...]
    seconds: float


class RequestLog:
    """Selects the requests to log. Requests of `slow_seconds` and more are slow; 0: no request is."""

    def __init__(self, writer: LineWriter, slow_seconds: float) -> None:
        self.writer = writer
        self.slow_seconds = slow_seconds

    def record(
        self, outcome: Outcome, trace: Trace, candidates: int | None, request_id: Callable[[], str | None]
    ) -> None:
        """Called once for each request. `candidates`: their number; `None` if the request was not parsed."""
        slow = 0 < self.slow_seconds <= outcome.seconds
        if not (outcome.refusal or outcome.degraded or slow):
            return
        reasons = [outcome.refusal] * bool(outcome.refusal) + list(outcome.degraded) + ["slow"] * slow
        identifier = request_id()
        self.writer.put(lambda: log_line(outcome, trace, candidates, identifier, reasons))


def log_line(outcome: Outcome, trace: Trace, candidates: int | None, request_id: str | None, reasons: list[str]) -> str:
    line: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": request_id,
        "reasons": reasons,
        **outcome.labels,
    }
    if trace.ranker is not None:
        line |= {
            "exit": trace.exit,
            "candidates": candidates,
            "events": trace.events,
            "history_cache": trace.cache,
            "meta_embedding": trace.meta,
        }
    milliseconds = {stage: round(spent * 1e3, 3) for stage, spent in trace.timings.seconds.items()}
    return json.dumps(line | {"stages_ms": milliseconds, "total_ms": round(outcome.seconds * 1e3, 3)})


@contextmanager
def open_request_log(slow_seconds: float) -> Iterator[RequestLog]:
    """A log to standard output."""
    writer = LineWriter("log", to_stdout)
    try:
        yield RequestLog(writer, slow_seconds)
    finally:
        writer.close()
