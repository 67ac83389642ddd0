"""Request log: one line for each request that was refused, degraded or slow, without user ids and keys.

At level `debug` it has a line for every request of a hot route.

Called by: `rank.py` at the end of a request, and `app.py`, which opens the log. Calls: `line_writer.py`, and `logs.py`
for the format.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from slatewise.http.line_writer import LineWriter, to_stream
from slatewise.http.trace_context import TraceContext
from slatewise.logs import FORMATTERS, Format, Level, fields, make_record
from slatewise.ranking.trace import Trace


@dataclass(frozen=True)
class Outcome:
    """The outcome of a request, as the log and its span show it."""

    labels: dict[str, str]  # labels of slatewise_requests_total
    refusal: str  # slug of the error; empty for a ranking
    degraded: tuple[str, ...]
    seconds: float
    candidates: int | None  # their number; `None` if the request was not parsed

    @property
    def failed(self) -> bool:
        return self.labels["code"].startswith("5")


class RequestLog:
    """Selects the requests to log. Requests of at least `slow_seconds` are slow; with 0, no request counts as slow."""

    def __init__(self, writer: LineWriter, slow_seconds: float, style: Format, level: Level) -> None:
        self.writer = writer
        self.slow_seconds = slow_seconds
        self.formatter = FORMATTERS[style]()
        self.level = logging.getLevelNamesMapping()[level.upper()]

    def record(
        self, outcome: Outcome, trace: Trace, request_id: Callable[[], str | None], context: TraceContext | None
    ) -> None:
        """Log the request if it is selected. `context` has the ids of its span, or those that the caller sent."""
        slow = 0 < self.slow_seconds <= outcome.seconds
        level = level_of(outcome, slow)
        if logging.getLevelNamesMapping()[level.upper()] < self.level:
            return
        reasons = [outcome.refusal] * bool(outcome.refusal) + list(outcome.degraded) + ["slow"] * slow
        identifier = request_id()
        record = make_record("slatewise.requests", level, "request")
        self.writer.put(lambda: self.render(record, members(outcome, trace, identifier, reasons, context)))

    def render(self, record: logging.LogRecord, line: dict[str, Any]) -> str:
        record.__dict__.update(fields(line))
        return self.formatter.format(record)


def level_of(outcome: Outcome, slow: bool) -> Level:
    """Errors of the server are `error`; degraded and slow answers are `warning`; mistakes of the client are `info`."""
    if outcome.failed:
        return "error"
    if outcome.degraded or slow:
        return "warning"
    return "info" if outcome.refusal else "debug"


def members(
    outcome: Outcome, trace: Trace, request_id: str | None, reasons: list[str], context: TraceContext | None
) -> dict[str, Any]:
    line: dict[str, Any] = {"id": request_id}
    if context is not None:
        line |= context.ids()
    line |= {"reasons": reasons, **outcome.labels}
    if trace.ranker is not None:
        line |= {
            "exit": trace.exit,
            "candidates": outcome.candidates,
            "events": trace.history.used,
            "history_cache": trace.history.cache,
            "meta_embedding": trace.meta,
        }
    milliseconds = {stage: round(spent * 1e3, 3) for stage, spent in trace.timings.seconds.items()}
    return line | {"stages_ms": milliseconds, "total_ms": round(outcome.seconds * 1e3, 3)}


@contextmanager
def open_request_log(slow_seconds: float, style: Format, level: Level) -> Iterator[RequestLog]:
    """Open a request log that writes to standard error."""
    writer = LineWriter("log", to_stream("stderr"))
    try:
        yield RequestLog(writer, slow_seconds, style, level)
    finally:
        writer.close()
