"""The server's own log, on standard error. Nobody waits for it: a reader that stops reading would stop the server.

Called by: `main.py`. Calls: `line_writer.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from slatewise.http.line_writer import LineWriter, to_stream


class QueuedHandler(logging.Handler):
    """Hands records to a writer, whose thread renders and writes them."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self.writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        self.writer.put(lambda: self.format(record))


@contextmanager
def open_server_log() -> Iterator[logging.Handler]:
    """Yield the handler for all records. Leaving the context waits for lines that were not written, but not long."""
    writer = LineWriter("server", to_stream("stderr"))
    handler = QueuedHandler(writer)
    try:
        yield handler
    finally:
        logging.getLogger().removeHandler(handler)
        writer.close()
