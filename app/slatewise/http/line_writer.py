"""Writes lines to a file or stream in a thread of its own, so that a stalled reader or a full disk delays no request.

Lines that are not written in time are dropped and counted.

Called by: `request_log.py`, `capture.py` and `server_log.py`. Calls: `metrics.py`.
"""

from __future__ import annotations

import io
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Literal

from slatewise import metrics

WAITING = 1_000  # lines that may wait for the writer
PATIENCE_SECONDS = 2.0  # time to write the queued lines when the server ends


class LineWriter:
    """Writes lines in its own thread."""

    def __init__(self, kind: str, write: Callable[[str], object]) -> None:
        self.write = write
        self.queue = queue.Queue[Callable[[], str] | None](WAITING)
        self.written, self.dropped = (metrics.LINES.labels(kind, result) for result in ("written", "dropped"))
        self.thread = threading.Thread(target=self.run, name=f"slatewise-{kind}", daemon=True)
        self.thread.start()

    def put(self, line: Callable[[], str]) -> None:
        """Queue a line, or drop it if the queue is full. Never blocks. The thread calls `line` to render it."""
        try:
            self.queue.put_nowait(line)
        except queue.Full:
            self.dropped.inc()

    def run(self) -> None:
        while (line := self.queue.get()) is not None:
            try:
                self.write(line() + "\n")
                self.written.inc()
            except Exception:  # a full disk, a closed stream, a line that cannot be rendered: the next one may do
                self.dropped.inc()

    def close(self) -> None:
        try:
            self.queue.put(None, timeout=PATIENCE_SECONDS)
            self.thread.join(PATIENCE_SECONDS)
        except queue.Full:
            pass  # the reader has stalled; the thread ends with the process


def to_stream(name: Literal["stdout", "stderr"]) -> Callable[[str], None]:
    """Return a function that writes to the stream without Python's buffer.

    A thread that is stuck while it holds the lock of that buffer would end the interpreter with an abort.
    """

    def write(text: str) -> None:
        stream = getattr(sys, name)  # None if it was closed at the start
        try:
            descriptor = stream.fileno()
        except io.UnsupportedOperation:  # a stream in memory
            stream.write(text)
            return
        data = text.encode(errors="backslashreplace")
        while data:
            data = data[os.write(descriptor, data) :]

    return write
