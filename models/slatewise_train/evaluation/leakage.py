"""Look for leaks between training and test events, and for data that inflates a result.

The checks count rows and never name a user, because a report leaves the machine with its bundle.

Called by: `train_command.py`, `export.py`. Calls: `data.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slatewise_train.data import Data, Sequences

LEAST_EVENTS = 3  # users with fewer events are often alike by chance
MIXER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Check:
    """One check: the number of cases that it found, the fact as a sentence, and its meaning for the reader."""

    name: str
    found: int
    fact: str
    meaning: str = ""

    @property
    def line(self) -> str:
        return f"{self.fact} {self.meaning}".strip() if self.found else self.fact


def check_leakage(data: Data) -> list[Check]:
    """Run all checks."""
    return [repeated_targets(data), equal_times(data), time_travel(data), future_events(data), *duplicates(data)]


def share(found: int, total: int) -> str:
    return f"{found:,} of {total:,} ({found / max(1, total):.1%})"


def owners(sequences: Sequences) -> np.ndarray:
    """Return the user of each event (E,)."""
    return np.repeat(np.arange(len(sequences)), np.diff(sequences.offsets))


def tested(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Return the users who have a test event, and the event's row in the sequences."""
    users = np.flatnonzero(data.split.test_lengths)
    return users, data.sequences.offsets[users] + data.split.test_lengths[users]


def repeated_targets(data: Data) -> Check:
    """Count the test events whose item occurs earlier in the same user's events."""
    s = data.sequences
    users, rows = tested(data)
    of = owners(s)
    places = np.arange(len(s.items)) - s.offsets[of]
    before = places < data.split.test_lengths[of]
    rows_count = max(1, int(s.items.max(initial=0)) + 1)
    known = np.unique(of[before] * rows_count + s.items[before])
    found = int(np.isin(users * rows_count + s.items[rows], known).sum())
    return Check(
        "repeated_targets",
        found,
        f"repeated targets: the item of {share(found, len(users))} test events is in the user's history.",
        "For these events no item of the history is removed from the candidates.",
    )


def equal_times(data: Data) -> Check:
    """Count the test events at the time of the event before them: their order is that of the input."""
    users, rows = tested(data)
    found = int((data.sequences.timestamps[rows] == data.sequences.timestamps[rows - 1]).sum())
    return Check(
        "equal_times",
        found,
        f"equal times: {share(found, len(users))} test events have the time of the event before.",
        "The order of the input decides which event is the test event.",
    )


def time_travel(data: Data) -> Check:
    """Count the users whose test event is earlier than one of their training events."""
    s = data.sequences
    users, rows = tested(data)
    of = owners(s)
    latest = np.full(len(s), -np.inf)
    trained = np.arange(len(s.items)) - s.offsets[of] < data.split.train_lengths[of]
    np.fmax.at(latest, of[trained], s.timestamps[trained])  # tables without times have NaN
    found = int((s.timestamps[rows] < latest[users]).sum())
    return Check(
        "time_travel",
        found,
        f"time travel: {share(found, len(users))} test events are earlier than a training event of the same user.",
    )


def future_events(data: Data) -> Check:
    """Count the training events after the median test event of all users (kind `time`: from `test_from` on)."""
    s = data.sequences
    of = owners(s)
    trained = np.arange(len(s.items)) - s.offsets[of] < data.split.train_lengths[of]
    _, rows = tested(data)
    if data.config.kind == "time":
        later = s.timestamps[trained] >= data.config.test_from
        place, meaning = "at or after `test_from`", "Training must not read them."
    else:
        later = s.timestamps[trained] > (np.median(s.timestamps[rows]) if len(rows) else np.inf)
        place = "later than half of the test events"
        meaning = 'The ranker has read the future of other users. `kind = "time"` in [split] prevents this.'
    found = int(later.sum())
    fact = f"future events: {share(found, int(trained.sum()))} training events are {place}."
    return Check("future_events", found, fact, meaning)


def duplicates(data: Data) -> list[Check]:
    """Count users with the events of another user, and rows that repeat user, item, action and time."""
    s = data.sequences
    of = owners(s)
    order = np.lexsort((s.actions, s.items, s.timestamps, of))
    columns = (of, s.timestamps, s.items, s.actions)
    same = np.ones(max(0, len(order) - 1), bool)
    for column in columns:
        ordered = column[order]
        same &= ordered[1:] == ordered[:-1]
    rows = int(same.sum())
    users = copied_users(s)
    long = int((np.diff(s.offsets) >= LEAST_EVENTS).sum())
    return [
        Check(
            "duplicate_users",
            users,
            f"duplicate users: {share(users, long)} users with at least {LEAST_EVENTS} events have the items and times "
            "of another user.",
            "Such a user is trained on and tested.",
        ),
        Check(
            "duplicate_rows",
            rows,
            f"duplicate rows: {share(rows, len(order))} events repeat user, item, action and time.",
        ),
    ]


def copied_users(sequences: Sequences) -> int:
    """Count the users of at least LEAST_EVENTS events whose items and times equal those of an earlier user."""
    lengths = np.diff(sequences.offsets)
    users = np.flatnonzero(lengths >= LEAST_EVENTS)
    if not len(users):
        return 0
    places = np.arange(len(sequences.items)) - sequences.offsets[owners(sequences)]
    events = mixed(sequences.items) ^ mixed(sequences.timestamps.view(np.uint64) + mixed(places))
    sums = np.concatenate([[np.uint64(0)], np.cumsum(mixed(events), dtype=np.uint64)])
    digests = sums[sequences.offsets[1:]] - sums[sequences.offsets[:-1]]
    seen: dict[tuple[int, int], int] = {}
    found = 0
    for user in users.tolist():
        first = seen.setdefault((int(digests[user]), int(lengths[user])), user)
        found += first != user and equal_events(sequences, first, user)
    return found


def equal_events(sequences: Sequences, one: int, other: int) -> bool:
    first, second = (slice(sequences.offsets[user], sequences.offsets[user + 1]) for user in (one, other))
    return bool(
        np.array_equal(sequences.items[first], sequences.items[second])
        and np.array_equal(sequences.timestamps[first], sequences.timestamps[second])
    )


def mixed(values: np.ndarray) -> np.ndarray:
    """Return 64-bit digests of integers, by the finalizer of SplitMix64."""
    x = values.astype(np.uint64) * MIXER
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    return x
