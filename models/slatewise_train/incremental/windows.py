"""The windows of an update: new events to learn from, with the events before them to read.

Called by: `update.py`. Calls: `batches.py`.

A window is a row of (W, 4): user, first event, one past the last event, and the first event that is learned from.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from slatewise_train.batches import packed


def new_windows(since: np.ndarray, lengths: np.ndarray, longest: int) -> np.ndarray:
    """Return windows (W, 4) in which each event from `since` on is learned from once.

    since, lengths: (U,) events of each user before the new ones, and all training events. A window has at most
    `longest` events. A user with more than half of it in new events has several windows, so that each new event has
    at least half a window before it, if the user has so many.
    """
    step = max(1, longest // 2)
    fresh = np.maximum(lengths - since, 0)
    count = -(-fresh // step)
    users = np.repeat(np.arange(len(since)), count)
    part = np.arange(len(users)) - np.repeat(np.cumsum(count) - count, count)
    begin = since[users] + part * step
    end = np.minimum(begin + step, lengths[users])
    return np.stack([users, np.maximum(end - longest, 0), end, begin], axis=1).astype(np.int64)


def replayed_windows(since: np.ndarray, longest: int, events: int, rng: np.random.Generator) -> np.ndarray:
    """Return windows (W, 4) of old events, of users drawn at random, with about as many events as asked for.

    since: (U,) events of each user before the new ones. All events of these windows are learned from.
    """
    users = rng.permutation(np.flatnonzero(since > 0))
    sizes = np.minimum(since[users], longest)
    users = users[: int(np.searchsorted(np.cumsum(sizes), events, side="left")) + 1] if events else users[:0]
    first = rng.integers(0, np.maximum(since[users] - longest, 0) + 1)
    return np.stack([users, first, np.minimum(first + longest, since[users]), first], axis=1).astype(np.int64)


def batches_of(windows: np.ndarray, batch_events: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the windows in batches of similar length and random order, at most `batch_events` each with padding."""
    sizes = windows[:, 2] - windows[:, 1] + 1  # with the start token
    order = np.argsort(sizes * rng.uniform(0.9, 1.1, len(sizes)))
    edges = packed(sizes[order], batch_events)
    for k in rng.permutation(len(edges) - 1):
        yield windows[order[edges[k] : edges[k + 1]]]
