"""Request log: one JSON line for each request that was refused, degraded or slow, without user ids and keys.

Called by: `rank.py` at the end of a request, and `app.py`, which opens the log. Calls: `line_writer.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from slatewise.http.line_writer import LineWriter, to_stream
from slatewise.ranking.trace import Trace


@dataclass(frozen=True)
class Outcome:
    """The outcome of a request, as the log shows it."""

    labels: dict[str, str]  # labels of slatewise_requests_total
    refusal: str  # slug of the error; empty for a ranking
    degraded: tuple[str, ...]
    seconds: float


class RequestLog:
    """Selects the requests to log. Requests of at least `slow_seconds` are slow; with 0, no request counts as slow."""

    def __init__(self, writer: LineWriter, slow_seconds: float) -> None:
        self.writer = writer
        self.slow_seconds = slow_seconds

    def record(
        self, outcome: Outcome, trace: Trace, candidates: int | None, request_id: Callable[[], str | None]
    ) -> None:
        """Log the request if it is selected. `candidates` is their number, or `None` if the request was not parsed."""
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
            "events": trace.history.used,
            "history_cache": trace.history.cache,
            "meta_embedding": trace.meta,
        }
    milliseconds = {stage: round(spent * 1e3, 3) for stage, spent in trace.timings.seconds.items()}
    return json.dumps(line | {"stages_ms": milliseconds, "total_ms": round(outcome.seconds * 1e3, 3)})


@contextmanager
def open_request_log(slow_seconds: float) -> Iterator[RequestLog]:
    """Open a request log that writes to standard output."""
    writer = LineWriter("log", to_stream("stdout"))
    try:
        yield RequestLog(writer, slow_seconds)
    finally:
        writer.close()
