"""Split the users' sequences: events for training, and events and users that are held out.

Called by: `data.py`, `defaults.py`. Calls: `config.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from slatewise_train.config import DataConfig

LEAST_HISTORY = 5  # events before a held-out slate
LEAST_TO_VALIDATE = 2  # events before the test event: one to read, one to predict


class Histories(Protocol):
    """The part of `data.Sequences` that a split reads: user u has the events `offsets[u] : offsets[u + 1]`."""

    @property
    def offsets(self) -> np.ndarray: ...
    @property
    def timestamps(self) -> np.ndarray: ...


def known_events(sequences: Histories, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return each user's events before the test event (U,), and all events (U,).

    A user without a test event has equal numbers.
    """
    lengths = np.diff(sequences.offsets)
    if config.kind != "time":
        return np.maximum(lengths - 1, 0), lengths
    users = np.repeat(np.arange(len(lengths)), lengths)
    return np.bincount(users[sequences.timestamps < config.test_from], minlength=len(lengths)), lengths


@dataclass(frozen=True)
class Split:
    """The number of training events of each user, the test events, and the users with further held-out events."""

    train_lengths: np.ndarray  # (U,) int64, a user's first train_lengths[u] events are for training
    test_lengths: np.ndarray  # (U,) int64, events before the test event; 0 if the user has no test event
    slate_users: np.ndarray  # (S,) int64, with a held-out slate after their training events, to evaluate
    validation_users: np.ndarray  # (V,) int64, with a held-out slate before the test event, to validate and calibrate
    held_out_users: np.ndarray  # (H,) int64, held out completely
    # (N,) int64, with a held-out event right after their training events, to validate heads of kind `next`: the
    # validation users, or, if few users are long enough for a slate, a sample of all users that holds out one event
    next_users: np.ndarray


def split_sequences(sequences: Histories, config: DataConfig) -> Split:
    """Draw the held-out users with the config's seed, among users whose history is long enough.

    A user with a held-out slate keeps five events before it, or as many as the slate has, if these are fewer.
    `leave-one-out`: the test event is a user's last event, the slate the last `slate_size` events.
    `time`: training ends at `test_from`; the test event is a user's first event after that, the slate the first
    `slate_size` events after that.
    """
    known, lengths = known_events(sequences, config)
    if config.kind == "time":
        test_lengths = np.where(known < lengths, known, 0)
        slate_starts = known
    else:
        test_lengths = known
        slate_starts = lengths - config.slate_size
    train_lengths = known.copy()
    rng = np.random.default_rng(config.seed)
    drawn = rng.permutation(np.flatnonzero(known >= config.slate_size + min(LEAST_HISTORY, config.slate_size)))
    slated = drawn[(lengths - slate_starts >= config.slate_size)[drawn]][: config.slate_users]
    others = drawn[~np.isin(drawn, slated)]
    last = config.validation_users + config.held_out_users
    slate_users = np.sort(slated)
    validation_users = np.sort(others[: config.validation_users])
    held_out_users = np.sort(others[config.validation_users : last])
    train_lengths[held_out_users] = 0
    train_lengths[slate_users] = slate_starts[slate_users]
    train_lengths[validation_users] = known[validation_users] - config.slate_size
    next_users = validation_users
    able = known >= LEAST_TO_VALIDATE
    if 2 * len(drawn) < able.sum():  # only the longest histories hold a slate: they do not stand for the others
        able[np.concatenate([slate_users, held_out_users])] = False
        next_users = np.sort(rng.permutation(np.flatnonzero(able))[: config.validation_users])
        single = np.setdiff1d(next_users, validation_users)
        train_lengths[single] = known[single] - 1
    return Split(train_lengths, test_lengths, slate_users, validation_users, held_out_users, next_users)
