"""Build the slates that users were shown from the rows of the events, and split them.

A row of the events that makes no history was only shown (`tables/history.py` has the rule). It is a negative of its
slate and never an event of the user. A slate has the rows of one user with one `slate_id`. Without that column, it has
the rows of one user with one timestamp, if one of them was only shown.

    user_id  item_id  timestamp  action      slate_id  position
    u        a        100        impression  r1        1           the slate r1 shows a and b
    u        b        100        impression  r1        2
    u        b        130        click       r1                    the user took b: rows of one item become one

Called by: `data.py`, `shown.py`, `evaluation/cases.py`. Calls: `config.py`, `tables/events.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from slatewise_train.config import Head
from slatewise_train.tables.events import NO_POSITION

LONGEST = 300  # items of a slate
SINGLE = "slates of one item"
CUT = f"slates cut to {LONGEST} items"
NO_HISTORY = "slates of users without history"
KEY = ["user", "slate"]


@dataclass(frozen=True)
class Exposures:
    """Slates that users were shown, by user and time. Slate s has the rows `offsets[s] : offsets[s + 1]`.

    The rows of a slate are in order of position, then of input. An item is in a slate once.
    """

    slate_users: np.ndarray  # (S,) int64, index in Sequences.users
    history: np.ndarray  # (S,) int64, events of the user's history before the slate
    ends: np.ndarray  # (S,) int64, events of the user's history up to the last row of the slate
    times: np.ndarray  # (S,) float64 unix seconds of the first row, NaN if missing
    offsets: np.ndarray  # (S + 1,) int64
    items: np.ndarray  # (R,) int64, rows of the catalogue
    positions: np.ndarray  # (R,) int64, 1 for the first; 0 unknown
    labels: np.ndarray  # (R, heads) float32, NaN if unknown; heads of kind `next`: 1 if the item was taken, else 0

    def __len__(self) -> int:
        return len(self.slate_users)


def add_action_labels(events: pl.DataFrame, is_history: pl.Series, heads: tuple[Head, ...]) -> pl.DataFrame:
    """Add label columns that logs of actions leave out. A head `click` learns from the action `click`.

    The label is 1 for rows of that action, 0 for rows that were only shown, and unknown for other rows.
    """
    if "action" not in events.columns:
        return events
    action = pl.col("action").cast(pl.String)
    names = set(events["action"].drop_nulls().unique().cast(pl.String))
    missing = [h.name for h in heads if h.kind == "label" and f"label_{h.name}" not in events.columns]
    return events.with_columns(
        pl.when(action == name)
        .then(pl.lit(1.0, pl.Float32))
        .when(~is_history)
        .then(pl.lit(0.0, pl.Float32))
        .alias(f"label_{name}")
        for name in missing
        if name in names
    )


def build_exposures(
    events: pl.DataFrame, is_history: pl.Series, users: np.ndarray, items: np.ndarray, heads: tuple[Head, ...]
) -> tuple[Exposures | None, dict[str, int]]:
    """Build the slates of clean events (in time order), and count those that are left out or cut, by reason.

    users: (n,) index of each row's user, a negative number of its own for a user without history; items: (n,) row in
    the catalogue. Of a slate with more than 300 items, those stay that were taken or have a label of 1, then the first
    ones. Returns None if there are no slates. Raises ValueError for a position below 1, and for slates of which no item
    was ever taken.
    """
    rows = slate_rows(events, is_history, users, items, heads)
    if rows is None:
        return None, {}
    labels = [f"label_{head.name}" for head in heads if head.kind == "label"]
    rows = rows.group_by([*KEY, "item"], maintain_order=True).agg(
        pl.col("rank").min().alias("first"),
        pl.col("rank").max().alias("last"),
        pl.col("time", "position", "row").min(),
        pl.col("taken", *labels).max(),
    )
    length = pl.len().over(KEY)
    counts = {
        SINGLE: rows.select((length == 1).sum()).item(),
        NO_HISTORY: rows.filter((length > 1) & (pl.col("user") < 0)).select(KEY).n_unique(),
        CUT: rows.filter((length > LONGEST) & (pl.col("user") >= 0)).select(KEY).n_unique(),
    }
    rows = rows.filter((length > 1) & (pl.col("user") >= 0))
    counts = {reason: count for reason, count in counts.items() if count}
    if not len(rows):
        return None, counts
    liked = pl.any_horizontal("taken", *((pl.col(name) == 1).fill_null(False) for name in labels))
    if not rows.select(liked.any()).item():
        raise ValueError(
            "events: no item of a slate was ever taken; rows of history_actions need the slate_id of the slate that "
            "they were taken from (without slate_id: its timestamp)"
        )
    place = pl.struct(~liked, pl.col("position").fill_null(LONGEST), "row").rank("ordinal").over(KEY)
    rows = rows.filter((length <= LONGEST) | (place <= LONGEST))
    return arrange(rows, events, is_history, users, heads), counts


def slate_rows(
    events: pl.DataFrame, is_history: pl.Series, users: np.ndarray, items: np.ndarray, heads: tuple[Head, ...]
) -> pl.DataFrame | None:
    """Return the rows of slates, an item maybe more than once, or None if the events have no slates.

    Columns: user, slate, item, rank (of the time, or of the row where times are missing), time, position, taken, row,
    and the labels of the heads. Raises ValueError for a position below 1.
    """
    labels = [f"label_{head.name}" for head in heads if head.kind == "label"]
    named = "slate_id" in events.columns and events["slate_id"].null_count() < len(events)
    if not named and is_history.all():
        return None
    if not named and events["timestamp"].is_nan().any():
        raise ValueError('events: shown rows without times need a slate_id; [data] time_unit = "row" has no times')
    position = (
        events["position"] if "position" in events.columns else pl.repeat(None, len(events), dtype=pl.Int64, eager=True)
    )
    if len(wrong := position.filter(position < 1)):
        example = f"for example {wrong[0]}" if wrong[0] > NO_POSITION else "such as text or a fraction"
        raise ValueError(
            f"events: {len(wrong)} rows have a position below 1 or no whole number, {example}; positions count from 1, "
            "and an unknown position is left empty"
        )
    rows = events.select(
        user=pl.lit(pl.Series(users, dtype=pl.Int64)),
        slate=pl.col("slate_id") if named else pl.col("timestamp"),
        item=pl.lit(pl.Series(items, dtype=pl.Int64)),
        rank=pl.lit(time_ranks(events)),
        time="timestamp",
        position=pl.lit(position),
        taken=pl.lit(is_history),
        row=pl.int_range(pl.len(), dtype=pl.Int64),
        **{name: pl.col(name) for name in labels},
    )
    return rows.filter(pl.col("slate").is_not_null() if named else (~pl.col("taken")).any().over(KEY))


def time_ranks(events: pl.DataFrame) -> pl.Series:
    """Return the rank of each row's time (n,) int64, equal for equal times. Missing times: the number of the row."""
    if events["timestamp"].is_nan().any():
        return pl.int_range(len(events), dtype=pl.Int64, eager=True)
    return events["timestamp"].rank("dense").cast(pl.Int64)


def arrange(
    rows: pl.DataFrame, events: pl.DataFrame, is_history: pl.Series, users: np.ndarray, heads: tuple[Head, ...]
) -> Exposures:
    """Sort the rows into slates, and count the events of the history before each slate and up to its end."""
    slates = (
        rows.group_by(KEY, maintain_order=True)
        .agg(pl.col("first", "time", "row").min(), pl.col("last").max(), pl.len().alias("length"))
        .sort("user", "first", "row")
        .with_row_index("number")
    )
    rows = rows.join(slates.select(*KEY, "number"), on=KEY).sort("number", "position", "row", nulls_last=True)
    owners = slates["user"].to_numpy()
    past = is_history.to_numpy()
    ranks = time_ranks(events).to_numpy()
    step = int(ranks.max()) + 1  # user * step + rank: sorted by user, then by time
    happened = np.sort(users[past] * step + ranks[past])
    begin = np.searchsorted(happened, owners * step)
    labels = np.empty((len(rows), len(heads)), np.float32)
    for k, head in enumerate(heads):
        column = rows["taken"] if head.kind == "next" else rows[f"label_{head.name}"].fill_null(float("nan"))
        labels[:, k] = column.cast(pl.Float32).to_numpy()
    return Exposures(
        slate_users=owners,
        history=np.searchsorted(happened, owners * step + slates["first"].to_numpy()) - begin,
        ends=np.searchsorted(happened, owners * step + slates["last"].to_numpy(), side="right") - begin,
        times=slates["time"].to_numpy(),
        offsets=np.concatenate([[0], np.cumsum(slates["length"].to_numpy().astype(np.int64))]),
        items=rows["item"].to_numpy(),
        positions=rows["position"].fill_null(0).to_numpy(),
        labels=labels,
    )


def whole_slates(exposures: Exposures, train_lengths: np.ndarray) -> np.ndarray:
    """Return lengths (U,) of training events that cut no slate: each has all of its chosen items, or none.

    An event that was chosen from the slate of a held-out event is held out with it. Its slate could not be measured
    otherwise, because training would know one of its items. A user who would keep no event keeps all, and such a slate
    is then in no set.
    """
    lengths = train_lengths.copy()
    while True:
        limit = lengths[exposures.slate_users]
        cut = (exposures.history < limit) & (exposures.ends > limit)
        if not cut.any():
            return np.where(lengths > 0, lengths, train_lengths)
        np.minimum.at(lengths, exposures.slate_users[cut], exposures.history[cut])


def training_slates(exposures: Exposures, train_lengths: np.ndarray) -> np.ndarray:
    """Return the slates that training may use (n,) int64, ascending. train_lengths: (U,) of the split.

    Such a slate was shown before the user's last training event, and no event up to its end is held out. So it has
    neither the item of a test event as an item that was taken, nor a label of a held-out slate.
    """
    limit = train_lengths[exposures.slate_users]
    return np.flatnonzero((exposures.history < limit) & (exposures.ends <= limit))


def first_held_out(exposures: Exposures, users: np.ndarray, train_lengths: np.ndarray) -> np.ndarray:
    """Return the first slate of each user after the training events: (n,), -1 without one. train_lengths: (U,)."""
    slates = np.flatnonzero(exposures.history >= train_lengths[exposures.slate_users])
    found = np.append(slates, -1)[np.searchsorted(exposures.slate_users[slates], users)]
    return np.where((found >= 0) & (exposures.slate_users[found] == users), found, -1)
