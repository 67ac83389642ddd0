"""The work in progress, in predicted seconds of a thread, and how long a new request would take beside it.

The threads serve requests in turns (`inference/workers.py`), so a request waits for the others only as long as it is
served itself: of each other one, for the work left, and at most for as much as its own work.

Called by: `admission.py`, `plan.py`. Calls: `inference/workers.py` for a type.
"""

from __future__ import annotations

import time
from math import inf
from typing import Any

import numpy as np

from slatewise.inference.workers import Job

SLIP_STEP = 0.05


class Running:
    """An admitted request, from its admission to the end of its work."""

    def __init__(self, seconds: float, due: float | None) -> None:
        self.predicted = seconds  # for all of its work
        self.due = due  # time.perf_counter() at which it must be done
        self.ran = 0.0  # in jobs that have ended
        self.job: Job[Any] | None = None  # the present one
        self.expected_at = inf  # time.perf_counter() at which it would be done by the prediction

    @property
    def left(self) -> float:
        """Seconds of work that are left, by the prediction."""
        ran = self.ran if self.job is None else self.ran + self.job.ran
        return max(0.0, self.predicted - ran)

    def expect(self, seconds: float) -> None:
        """Correct the prediction: this much work is left."""
        self.predicted = self.ran + seconds

    def end_job(self) -> None:
        if self.job is not None:
            self.ran += self.job.ran
            self.job = None


class Load:
    """All running requests. Lives on the event loop."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.running: set[Running] = set()
        self.slip = 0.0  # mean seconds by which requests end later than predicted: waits that are not for threads

    def begin(self, running: Running) -> None:
        running.expected_at = time.perf_counter() + self.duration(running.predicted)
        self.running.add(running)

    def end(self, running: Running) -> None:
        running.end_job()
        self.running.discard(running)
        late = time.perf_counter() - running.expected_at
        self.slip = max(0.0, self.slip + SLIP_STEP * (late - self.slip))

    def backlog(self) -> float:
        """Seconds until the work in progress is done."""
        return sum(other.left for other in self.running) / self.threads

    def wait(self, seconds: float) -> float:
        """Seconds that a new request with so much work would wait for others, if they were just as many all the time.

        Of the others, the whole work counts: under load, new ones take the place of those that end.
        """
        return sum(min(other.predicted, seconds) for other in self.running) / self.threads

    def duration(self, seconds: float) -> float:
        """Seconds until a new request with so much work would be done, if it were the last one.

        It has one thread at a time.
        """
        return max(seconds, (sum(min(other.left, seconds) for other in self.running) + seconds) / self.threads)

    def delays(self, seconds: float) -> bool:
        """Return whether a new request with so much work makes another one late that would be in time without it."""
        due = np.array([np.inf if other.due is None else other.due for other in self.running])
        if not np.isfinite(due).any():
            return False
        left = np.array([other.left for other in self.running])
        order = np.argsort(left)
        left, remaining = left[order], due[order] - time.perf_counter()
        ahead = np.cumsum(left) + left * np.arange(len(left) - 1, -1, -1)  # its own work is part of it
        without = np.maximum(left, ahead / self.threads)
        beside = np.maximum(left, (ahead + np.minimum(left, seconds)) / self.threads)
        return bool(((without <= remaining) & (beside > remaining)).any())
