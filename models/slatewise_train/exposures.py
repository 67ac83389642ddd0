"""Group the rows of the events that were shown together, and decide which of these slates training may use.

A slate is the rows of one user with one `slate_id`. Without that column it is the rows of one user with one timestamp,
if one of them was only shown. Rows of one slate with the same item are one item: a log has a row for its impression,
and later one for its click. A slate is shown after the events of the user's history that are older than its first row.

Called by: `data.py`, which builds the columns; `shown.py` and `evaluation/cases.py` read the slates. Calls: polars.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import polars as pl

SHORTEST = 2  # items of a slate; one item alone has no neighbour to compare with
LONGEST = 300  # items of a slate; of a longer one, the chosen items and the first of the others stay


@dataclass(frozen=True)
class Exposures:
    """Slates that users were shown. Slate s has the rows offsets[s] : offsets[s + 1], in order of position.

    Slates are sorted by user, then by time. Items without a position are in the order of their rows.
    """

    slate_users: np.ndarray  # (S,) int64, index in `Sequences.users`
    history: np.ndarray  # (S,) int64, events of the user's history before the slate
    until: np.ndarray  # (S,) int64, events of the user's history up to the slate's last row, that time included
    times: np.ndarray  # (S,) float64 unix seconds of the first row, NaN if missing
    offsets: np.ndarray  # (S + 1,) int64
    items: np.ndarray  # (R,) int64, rows of the catalogue
    positions: np.ndarray  # (R,) int64, 1 for the first, 0 if unknown
    labels: np.ndarray  # (R, heads) float32, NaN if unknown; for heads of kind `next` 1 if the item was chosen, else 0
    training: np.ndarray  # (S,) bool, slates that training may use

    def rows(self, slate: int) -> slice:
        return slice(int(self.offsets[slate]), int(self.offsets[slate + 1]))

    def first_held_out(self, users: np.ndarray) -> np.ndarray:
        """Return each user's first slate that training does not use, -1 without one: (n,) -> (n,)."""
        slates = np.flatnonzero(~self.training)
        places = np.searchsorted(self.slate_users[slates], users)
        found = np.append(slates, -1)[places]
        return np.where((found >= 0) & (self.slate_users[found] == users), found, -1)


def shown_rows(rows: pl.DataFrame, has_slate_id: bool) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return one row for each item of each slate, sorted by slate and position, and counts of what is left out.

    rows: user, item (int64 rows), order (int64, of the rows in time), timestamp, chosen (bool), position (int64, 0 if
    unknown), label_0, label_1, ... (float32, NaN if unknown), and slate_id if the table has it; without it the rows of
    one user with one order are a slate. The result has the columns slate (int64, numbered by user and time), user,
    item, chosen, position, labels, start and end (first and last order of the slate) and time (of the first row).
    """
    key = ["user", "slate_id" if has_slate_id else "order"]
    labels = [name for name in rows.columns if name.startswith("label_")]
    known = [pl.col(name).fill_nan(None).max().alias(name) for name in labels]
    slates = rows.group_by(key).agg(
        pl.col("order").min().alias("start"),
        pl.col("order").max().alias("end"),
        pl.col("timestamp").min().alias("time"),
        pl.col("item").n_unique().alias("count"),
        (~pl.col("chosen")).any().alias("shown"),
    )
    wanted = pl.col("count") >= SHORTEST
    if not has_slate_id:
        wanted = wanted & pl.col("shown")
    short = slates.filter((pl.col("count") < SHORTEST) & pl.col("shown")).height
    long = slates.filter(wanted & (pl.col("count") > LONGEST)).height
    slates = slates.filter(wanted).sort("user", "start", "end", *key[1:]).with_row_index("slate")
    items = (
        rows.join(slates.select(*key, "slate", "start", "end", "time"), on=key, how="inner", maintain_order="left")
        .group_by("slate", "item", maintain_order=True)
        .agg(
            pl.col("user", "start", "end", "time").first(),
            pl.col("chosen").any(),
            pl.col("position").filter(pl.col("position") > 0).min().fill_null(0),
            *known,
        )
    )
    place = pl.when(pl.col("position") > 0).then(pl.col("position")).otherwise(2**62)
    if long:
        kept = (pl.col("chosen").not_(), place, pl.int_range(pl.len()))
        items = items.with_columns(pl.struct(*kept).rank("ordinal").over("slate").alias("rank"))
        items = items.filter(pl.col("rank") <= LONGEST).drop("rank")
    items = items.sort("slate", place, maintain_order=True).with_columns(pl.col("slate").cast(pl.Int64))
    left_out = {"slates of a single item": short, f"slates cut to {LONGEST} items": long}
    return items, {reason: n for reason, n in left_out.items() if n}


def group_slates(items: pl.DataFrame, heads: int, event_users: np.ndarray, event_orders: np.ndarray) -> Exposures:
    """Build `Exposures` from the result of `shown_rows`, all for training.

    heads: number of labels; event_users, event_orders: (E,) user and order of the history's events, sorted by both.
    """
    slate = items["slate"].to_numpy()
    firsts = np.flatnonzero(np.diff(slate, prepend=-1))
    users = items["user"].to_numpy()[firsts]
    # one sorted key for all users, so that a single search counts the older events of every slate
    span = 2 + max(int(event_orders.max(initial=0)), int(items["end"].max() or 0))  # type: ignore[arg-type]
    keys = event_users * span + event_orders
    begin = np.searchsorted(keys, users * span)
    labels = [items[f"label_{k}"].cast(pl.Float32).fill_null(float("nan")).to_numpy() for k in range(heads)]
    return Exposures(
        slate_users=users,
        history=np.searchsorted(keys, users * span + items["start"].to_numpy()[firsts]) - begin,
        until=np.searchsorted(keys, users * span + items["end"].to_numpy()[firsts], side="right") - begin,
        times=items["time"].to_numpy()[firsts],
        offsets=np.append(firsts, len(items)),
        items=items["item"].to_numpy(),
        positions=items["position"].to_numpy(),
        labels=np.stack(labels, axis=1) if heads else np.zeros((len(items), 0), np.float32),
        training=np.ones(len(firsts), bool),
    )


def for_training(
    exposures: Exposures, train_lengths: np.ndarray, held_out_users: np.ndarray, latest: float | None
) -> Exposures:
    """Mark the slates that training may use: those without any event that is held out, at or before their last row.

    train_lengths: (U,) events of each user that training uses; held_out_users: users without any training; latest: unix
    seconds from which on nothing is for training, None without such a time.
    """
    users = exposures.slate_users
    training = (exposures.until <= train_lengths[users]) & ~np.isin(users, held_out_users)
    if latest is not None:
        training &= exposures.times < latest
    return dataclasses.replace(exposures, training=training)
