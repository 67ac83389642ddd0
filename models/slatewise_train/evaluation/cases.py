"""Build the requests of the evaluation: a history, and the events or the slate that followed it.

Called by: `offline.py`, `calibration.py`, `compression/`. Calls: `data.py`, `exposures.py`, `batches.py`,
`slatewise.bundle.features`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from slatewise.bundle.features import make_candidates, make_history
from slatewise.inference.arrays import Candidates, History
from slatewise.inference.engine import Engine
from slatewise_train.batches import served_window_start
from slatewise_train.data import Data, request_times
from slatewise_train.exposures import Exposures, held_out_slates


@dataclass(frozen=True)
class Case:
    """One request of the evaluation."""

    user: int
    history: History  # the events that a request would read
    seen: np.ndarray  # (n,) item rows of all events before
    time: float  # unix seconds of the last event before, or of the slate that was shown
    upcoming: np.ndarray  # (m,) item rows of the events to predict, or of the slate that was shown
    labels: np.ndarray  # (m, heads)


def make_case(data: Data, user: int, length: int, upcoming: int) -> Case:
    """Return a case: after the user's first `length` events, predict the next `upcoming`.

    The history is the window that the server would read; `seen` has all events.
    """
    s = data.sequences
    start = int(s.offsets[user])
    ahead = slice(start + length, start + length + upcoming)
    time = float(request_times(s.timestamps[start : start + length])[-1])
    return Case(user, *past(data, user, length), time, s.items[ahead], s.labels[ahead])


def past(data: Data, user: int, length: int) -> tuple[History, np.ndarray]:
    """Return the window that the server would read after a user's first events, and the item rows of all of them."""
    s = data.sequences
    start = int(s.offsets[user])
    first = start + served_window_start(length, data.config.history_length)
    read = slice(first, start + length)
    return make_history(s.items[read], s.actions[read], s.timestamps[read]), s.items[start : start + length]


def next_cases(data: Data, users: np.ndarray) -> Iterator[Case]:
    """Yield a case for each user who has a test event and an event before it."""
    for user in users:
        if length := int(data.split.test_lengths[user]):
            yield make_case(data, int(user), length, 1)


def slate_cases(data: Data, users: np.ndarray) -> list[Case]:
    """Return the held-out slates of users with a held-out slate.

    Where the data have slates that were shown, these are all slates of the users after their training events, so a user
    may have several or none. The slates of validation users end before their test event. Without such slates, each user
    has one case: the events right after the training events.
    """
    if data.exposures is not None:
        return shown_cases(data, data.exposures, users)
    return [make_case(data, int(u), int(data.split.train_lengths[u]), data.config.slate_size) for u in users]


def shown_cases(data: Data, exposures: Exposures, users: np.ndarray) -> list[Case]:
    """Return a case for each held-out slate of the users that was shown, by user and time."""
    before = data.split.test_lengths.copy()
    before[data.split.slate_users] = 0  # their last slates have the test event
    times = request_times(exposures.times)
    cases = []
    for s in held_out_slates(exposures, users, data.split.train_lengths, before):
        rows = slice(exposures.offsets[s], exposures.offsets[s + 1])
        user = int(exposures.slate_users[s])
        history, seen = past(data, user, int(exposures.history[s]))
        cases.append(Case(user, history, seen, float(times[s]), exposures.items[rows], exposures.labels[rows]))
    return cases


def candidates_of(engine: Engine, data: Data, rows: np.ndarray, time: float) -> Candidates:
    """Look up items by row (n,), as candidates of a request at a time in unix seconds."""
    return make_candidates(engine.items, rows, data.catalogue.numeric[rows], time)
