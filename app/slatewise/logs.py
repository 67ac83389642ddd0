"""The log: all records in one format on one stream, standard error. One JSON object for each record, or text.

A record may carry fields, which become members of the object: `log.info("...", extra=fields({"id": "r-1"}))`. A
formatter here can be set on any handler. With `configure`, warnings, uncaught exceptions and the end of a command
(`report`) have the same format.

Called by: `main.py` and `cli.py`; `http/request_log.py` and `http/problems.py` make records with fields. Calls:
nothing.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]
PLAIN = re.compile(r"[\w./:{}-]+", re.ASCII)


def fields(members: Mapping[str, Any]) -> dict[str, Any]:
    """Return the argument `extra` of a call that logs, for a record with these members."""
    return {"fields": members}


def fields_of(record: logging.LogRecord) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(record, "fields", {})
    return found


def message_of(record: logging.LogRecord) -> str:
    """Return the message in one line. Arguments that do not fit the message are shown beside it."""
    try:
        text = record.getMessage()
    except (TypeError, ValueError):
        text = f"{record.msg} {record.args!r}"
    return " ".join(text.split("\n")).strip()


class JsonFormatter(logging.Formatter):
    """One JSON object in one line of ASCII: time, level, logger, message, the fields, and a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message_of(record),
            **fields_of(record),
        }
        if exception := exception_of(record):
            line["exception"] = exception
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, message and the fields as `name=value`, in one line. A traceback follows in lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        parts = [self.formatTime(record), record.levelname, message_of(record)]
        parts += [f"{name}={shown(value)}" for name, value in fields_of(record).items() if value not in (None, "")]
        exception = exception_of(record)
        return " ".join(parts) + (f"\n{exception}" if exception else "")


def exception_of(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[0] is None:
        return ""
    return "".join(traceback.format_exception(*record.exc_info)).rstrip()


def shown(value: Any) -> str:
    """Return the value as in JSON without spaces. Plain texts have no quotes, and lists of them no brackets."""
    if isinstance(value, str) and PLAIN.fullmatch(value):
        return value
    if isinstance(value, list) and all(isinstance(item, str) and PLAIN.fullmatch(item) for item in value):
        return ",".join(value)
    return json.dumps(value, separators=(",", ":"), default=str)


FORMATTERS: dict[Format, type[logging.Formatter]] = {"text": TextFormatter, "json": JsonFormatter}


def configure(style: Format, level: Level, handler: logging.Handler) -> None:
    """Log everything of this process by `handler`: our records from `level` on, libraries, warnings, crashes.

    `debug` is for our records alone: libraries print what they send at that level.
    """
    formatter = FORMATTERS[style]()
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel("INFO" if level == "debug" else level.upper())
    logging.getLogger("slatewise").setLevel(level.upper())
    logging.captureWarnings(True)

    def uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        info = None if error is None else (kind, error, trace)
        print(
            formatter.format(make_record("slatewise", "critical", "uncaught exception", exc_info=info)), file=sys.stderr
        )

    def uncaught_in_thread(found: threading.ExceptHookArgs) -> None:
        if found.exc_type is not SystemExit:
            uncaught(found.exc_type, found.exc_value, found.exc_traceback)

    def unraisable(found: Any) -> None:  # sys.UnraisableHookArgs: in a destructor or a callback
        uncaught(found.exc_type, found.exc_value, found.exc_traceback)

    sys.excepthook = uncaught
    threading.excepthook = uncaught_in_thread
    sys.unraisablehook = unraisable
    COMMAND_STYLE[0] = style


def make_record(logger: str, level: str, message: str, exc_info: Any = None) -> logging.LogRecord:
    number = logging.getLevelNamesMapping()[level.upper()]
    return logging.LogRecord(logger, number, "", 0, message, None, exc_info)


COMMAND_STYLE: list[Format] = ["text"]  # of `report` in this process


def report(text: str) -> None:
    """Write the line with which a command ends, past the log's handler, which may be closed."""
    if COMMAND_STYLE[0] == "json":
        text = JsonFormatter().format(make_record("slatewise", "error", text))
    print(text, file=sys.stderr)
