"""A log that writes at most one line in ten seconds, for what may happen thousands of times.

Called by: `http/door.py`, `store/node.py`. Calls: nothing.
"""

from __future__ import annotations

import logging
import time

SECONDS = 10.0


class RareLog:
    """Writes the first line at once. After it, lines are counted until ten seconds have passed."""

    def __init__(self, log: logging.Logger) -> None:
        self.log = log
        self.next = 0.0  # time.monotonic() from which a line may be written
        self.left_out = 0

    def warning(self, message: str, *values: object) -> None:
        self.write(logging.WARNING, message, *values)

    def write(self, level: int, message: str, *values: object) -> None:
        now = time.monotonic()
        if now < self.next:
            self.left_out += 1
            return
        if self.left_out:
            message += "; %d such lines were left out"
            values = (*values, self.left_out)
        self.next = now + SECONDS
        self.left_out = 0
        self.log.log(level, message, *values)
