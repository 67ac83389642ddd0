"""Estimate how long a training still takes, from the seconds of its epochs in this process.

Until an epoch of the last ones has been measured, a few trial steps tell how much longer they take. The first minute
has no estimate: it warms up caches and allocator.

Called by: `train.py`. Calls: `progress.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tqdm import tqdm

from slatewise_train.progress import Progress

FIRST = 60.0  # seconds without an estimate
TRIALS = 2  # pairs of trial steps that are timed, after one pair that is not

Clock = Callable[[], float]  # seconds


def time_ratio(step: Callable[[bool], None], now: Clock = time.perf_counter) -> float:
    """Return how many times as long `step(True)` takes as `step(False)`."""
    seconds = {False: 0.0, True: 0.0}
    for trial in range(1 + TRIALS):
        for kind in seconds:
            begin = now()
            step(kind)
            seconds[kind] += (now() - begin) * (trial > 0)
    return seconds[True] / seconds[False]


def words(seconds: float) -> str:
    """Return a duration in words: 40 s, 12 min, 3.2 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class TimeLeft:
    """Measures the epochs of a training by phase: False before the last epochs, True in them.

    cost: () -> how many times as long an epoch of phase True takes as one before; called at most once.
    """

    def __init__(self, progress: Progress, cost: Callable[[], float], now: Clock = time.perf_counter) -> None:
        self.progress = progress
        self.cost = cost
        self.now = now
        self.begin = self.since = now()  # of the training, and of the current epoch
        self.seconds = {False: 0.0, True: 0.0}  # of whole epochs, validations included
        self.epochs = {False: 0, True: 0}
        self.ratio: float | None = None
        self.said = False

    def end_epoch(self, cascade: bool) -> None:
        """Count an epoch of a phase, which ends now."""
        now = self.now()
        self.seconds[cascade] += now - self.since
        self.epochs[cascade] += 1
        self.since = now

    def step(self, share: float) -> None:
        """Print the estimate in the epoch that lasts beyond the first minute. share: of the epoch that is done."""
        if not self.said and share and self.now() - self.begin >= FIRST:
            tqdm.write(self.text(share))

    def text(self, share: float = 0.0) -> str:
        """Return "about 12 min left", with "at most" if the training may end earlier; empty in the first minute.

        share: of the current epoch that is done; 0 between two epochs.
        """
        before, last = self.progress.epochs_left()
        if self.now() - self.begin < FIRST or not before + last:
            return ""
        self.said = True
        if self.progress.joined is None:
            left = (before - share) * self.each(False, share) + (last * self.each(True, share) if last else 0.0)
        else:
            left = (last - share) * self.each(True, share)
        return f"about {words(left)} left" + (" at most" if self.progress.may_end_early else "")

    def each(self, cascade: bool, share: float) -> float:
        """Return the seconds of an epoch of a phase."""
        seconds, epochs = self.seconds[cascade], float(self.epochs[cascade])
        if share and cascade == (self.progress.joined is not None):
            seconds, epochs = seconds + self.now() - self.since, epochs + share
        if epochs:
            return seconds / epochs
        self.ratio = self.cost() if self.ratio is None else self.ratio
        return self.each(False, share) * self.ratio
