"""Build the requests of the evaluation: a history, and the events or the slate that followed it. Score their items.

Called by: `offline.py`, `calibration.py`, `interactions.py`, `compression/`. Calls: `data.py`, `batches.py`,
`slatewise.bundle.features`, `inference/engine.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from slatewise.bundle.features import make_candidates, make_history
from slatewise.inference.arrays import Candidates, History, HistoryState, PointScores, join
from slatewise.inference.engine import Engine
from slatewise_train.batches import served_window_start
from slatewise_train.data import Data, request_times
from slatewise_train.exposures import first_held_out
from slatewise_train.rankers.base import EXITS

CATALOGUE_CHUNK = 1_024  # candidates in one call of `point`: its intermediate arrays stay in the processor's cache


@dataclass(frozen=True)
class Case:
    """One request of the evaluation."""

    user: int
    history: History  # the events that a request would read
    seen: np.ndarray  # (n,) item rows of all events before
    time: float  # unix seconds of the last event before
    upcoming: np.ndarray  # (m,) item rows of the events to predict
    labels: np.ndarray  # (m, heads)


def make_case(data: Data, user: int, length: int, upcoming: int) -> Case:
    """Return a case: after the user's first `length` events, predict the next `upcoming`.

    The history is the window that the server would read; `seen` has all events.
    """
    s = data.sequences
    start = int(s.offsets[user])
    first = start + served_window_start(length, data.config.history_length)
    read = slice(first, start + length)
    ahead = slice(start + length, start + length + upcoming)
    history = make_history(s.items[read], s.actions[read], s.timestamps[read])
    seen = s.items[start : start + length]
    times = request_times(s.timestamps[start : start + max(1, length)])  # without a history, that of the first event
    time = float(times[-1])
    return Case(user, history, seen, time, s.items[ahead], s.labels[ahead])


def next_cases(data: Data, users: np.ndarray) -> Iterator[Case]:
    """Yield a case for each user who has a test event and an event before it."""
    for user in users:
        if length := int(data.split.test_lengths[user]):
            yield make_case(data, int(user), length, 1)


def slate_cases(data: Data, users: np.ndarray) -> list[Case]:
    """Return a case for each user. The slate to predict is the held-out one, right after the training events.

    It is the slate that the user was shown, if the data have such slates; users without a held-out one have no case.
    """
    if data.exposures is None:
        return [make_case(data, int(u), int(data.split.train_lengths[u]), data.config.slate_size) for u in users]
    slates = first_held_out(data.exposures, users, data.split.train_lengths)
    return [shown_case(data, int(slate)) for slate in slates[slates >= 0]]


def shown_case(data: Data, slate: int) -> Case:
    """Return the case of a slate that a user was shown, after the events of the history that are older."""
    exposures = data.exposures
    assert exposures is not None
    case = make_case(data, int(exposures.slate_users[slate]), int(exposures.history[slate]), 0)
    rows = slice(int(exposures.offsets[slate]), int(exposures.offsets[slate + 1]))
    time = float(request_times(exposures.times[slate : slate + 1])[0])
    return dataclasses.replace(case, time=time, upcoming=exposures.items[rows], labels=exposures.labels[rows])


def exits_of(engine: Engine) -> list[str]:
    return [exit for exit in EXITS if exit in engine.sessions]


def state_of(engine: Engine, case: Case) -> HistoryState:
    """Return the encoded history of a case."""
    return engine.extend(engine.start, case.history) if len(case.history) else engine.start


def point_of_many(engine: Engine, candidates: Candidates, meta: np.ndarray, state: HistoryState) -> PointScores:
    """Return the exit `point` of a catalogue of candidates, in chunks. meta: (M,); state: of `state_of`."""
    chunks = [slice(k, k + CATALOGUE_CHUNK) for k in range(0, len(candidates), CATALOGUE_CHUNK)]
    return join([engine.point(candidates, meta, state, rows) for rows in chunks])


def score_exits(engine: Engine, candidates: Candidates, meta: np.ndarray, state: HistoryState) -> dict[str, np.ndarray]:
    """Return the probabilities (n, heads) of candidates by exit. meta: (M,); state: of `state_of`.

    It gives the results of `engine.score` for each exit, and runs each graph once.
    """
    point = engine.point(candidates, meta, state)
    scores = {"dot": engine.dot(candidates, state), "point": point.probabilities}
    return scores | ({"set": engine.set(point)} if "set" in engine.sessions else {})


def candidates_of(engine: Engine, data: Data, rows: np.ndarray, time: float) -> Candidates:
    """Look up items by row (n,), as candidates of a request at a time in unix seconds."""
    return make_candidates(engine.items, rows, data.catalogue.numeric[rows], time)
