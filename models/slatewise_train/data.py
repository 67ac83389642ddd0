"""Read a table of events and a table of items, build the users' sequences, and split them.

    events: user_id, item_id, timestamp (unix seconds), action?, label_<head>?        one row per event, in any order
    items:  item_id, title?, then the columns that the TOML names as categorical or numeric

A column with a question mark is optional. The split decides which events training may use, and which events and users
are held out for validation, calibration and evaluation.

Called by: every command that reads training data or a bundle's demo users. Calls: polars.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from slatewise.bundle.features import gap_buckets
from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ACTION
from slatewise_train.config import DataConfig, TablesConfig

MULTI_VALUE_SEPARATOR = "|"


def read_table(path: Path) -> pl.DataFrame:
    """Read a Parquet or CSV file, depending on its suffix. Raises ValueError for any other suffix.

    All columns of a CSV file are read as strings; `clean_events` and `clean_items` convert them.
    """
    if path.suffix == ".parquet":
        return pl.read_parquet(path)
    if path.suffix == ".csv":
        return pl.read_csv(path, infer_schema_length=0)
    raise ValueError(f"{path}: a table is .parquet or .csv")


def read_items(tables: TablesConfig) -> pl.DataFrame:
    """Read the table of items; without one in the TOML, return a table without rows."""
    return pl.DataFrame(schema={"item_id": pl.String}) if tables.items is None else read_table(Path(tables.items))


def clean_events(events: pl.DataFrame, max_bad_share: float) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return the usable events in time order, and the number of unusable rows by reason.

    Events with equal times stay in input order. Raises ValueError if a column is missing, or if the share of unusable
    rows is larger than `max_bad_share`.
    """
    missing = {"user_id", "item_id", "timestamp"} - set(events.columns)
    if "slate_id" in events.columns:
        print("events: slate_id is not read; a slate is a user's next events (`slate_size` in [split])")
    if missing:
        raise ValueError(f"events: no column {', '.join(sorted(missing))}")
    events = events.with_columns(
        pl.col("user_id").cast(pl.String),
        pl.col("item_id").cast(pl.String),
        pl.col("timestamp").cast(pl.Float64, strict=False),
        *([pl.col("action").cast(pl.String)] if "action" in events.columns else []),
    )
    no_user = pl.col("user_id").is_null() | (pl.col("user_id") == "")
    no_item = pl.col("item_id").is_null() | (pl.col("item_id") == "")
    time = pl.col("timestamp")
    bad_time = time.is_null() | ~time.is_finite() | (time < 0)
    reasons = {
        "missing user_id": no_user,
        "missing item_id": ~no_user & no_item,
        "bad timestamp": ~no_user & ~no_item & bad_time,
    }
    labels = [c for c in events.columns if c.startswith("label_")]
    if labels:
        number = {c: pl.col(c).cast(pl.Float32, strict=False) for c in labels}
        bad_label = pl.any_horizontal(
            [pl.col(c).is_not_null() & ~number[c].is_in([0.0, 1.0]).fill_null(False) for c in labels]
        )
        reasons["label not 0 or 1"] = ~no_user & ~no_item & ~bad_time & bad_label
    bad = {reason: int(events.select(test.sum()).item() or 0) for reason, test in reasons.items()}
    share = sum(bad.values()) / max(1, len(events))
    if share > max_bad_share:
        raise ValueError(f"events: {share:.1%} of {len(events)} rows cannot be used, limit {max_bad_share:.1%}: {bad}")
    events = events.filter(~pl.any_horizontal(list(reasons.values())))
    events = events.with_columns([pl.col(c).cast(pl.Float32) for c in labels]).sort("timestamp", maintain_order=True)
    return events, {reason: count for reason, count in bad.items() if count}


def clean_items(items: pl.DataFrame, config: DataConfig) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return the usable items and the number of faults by reason.

    Only the first row of each id is used, and numeric columns are converted. Raises ValueError if a column that the
    TOML names is missing.
    """
    derived = {"popularity"}  # counted from the events if the items do not have it
    if missing := {"item_id", *config.categorical, *config.numeric} - derived - set(items.columns):
        raise ValueError(f"items: no column {', '.join(sorted(missing))}")
    items = items.with_columns(pl.col("item_id").cast(pl.String))
    named = items.filter(pl.col("item_id").is_not_null() & (pl.col("item_id") != ""))
    single = named.unique("item_id", keep="first", maintain_order=True)
    bad = {"items: missing item_id": len(items) - len(named), "items: duplicate item_id": len(named) - len(single)}
    for name in set(config.numeric) & set(items.columns):
        number = single[name].cast(pl.Float32, strict=False)
        bad[f"items: {name} is not a number"] = int((single[name].is_not_null() & number.is_null()).sum())
        single = single.with_columns(number.alias(name))
    return single, {reason: count for reason, count in bad.items() if count}


@dataclass(frozen=True)
class TrainingVocabulary:
    """Names in the order of their rows. The rows of `items` start at 2, those of actions and fields at 1.

    Row 0 is the unknown name or the missing value; row 1 of the items is the start token.
    """

    items: list[str]
    actions: list[str]
    fields: dict[str, list[str]]  # categorical column -> its values


@dataclass(frozen=True)
class Catalogue:
    """The items as I + 2 rows; row 0 is the unknown item, row 1 the start token."""

    vocabulary: TrainingVocabulary
    field_values: dict[str, np.ndarray]  # column -> (I + 2, V) int64, V the most values of one item, 0 is padding
    numeric: np.ndarray  # (I + 2, F) float32, NaN is missing


def values_of(column: pl.Series) -> list[list[str]]:
    """Return the values of a categorical column, row by row.

    The column is a list column, or text with values separated by `|`.
    """
    lists = (
        column.cast(pl.List(pl.String))
        if column.dtype == pl.List
        else column.cast(pl.String).str.split(MULTI_VALUE_SEPARATOR)
    )
    return [[value for value in row or () if value] for row in lists.to_list()]


def build_catalogue(items: pl.DataFrame, events: pl.DataFrame, config: DataConfig) -> Catalogue:
    """Build the catalogue: the items of the item table, then those that occur in the events alone."""
    unlisted = events.select("item_id").unique(maintain_order=True).join(items, on="item_id", how="anti")
    items = pl.concat([items, unlisted], how="diagonal")
    vocabularies = {}
    columns = {}
    for name in config.categorical:
        column = values_of(items[name])
        values = sorted({v for row in column for v in row})
        code = {v: k + 1 for k, v in enumerate(values)}
        rows = np.zeros((len(column) + FIRST_ITEM, max([1, *map(len, column)])), dtype=np.int64)
        for k, row in enumerate(column):
            rows[k + FIRST_ITEM, : len(row)] = [code[v] for v in row]
        vocabularies[name] = values
        columns[name] = rows
    if "popularity" in config.numeric and "popularity" not in items.columns:
        items = items.with_columns(
            pl.lit(None, pl.Float32).alias("popularity")
        )  # counted later, see `count_popularity`
    numeric = np.full((len(items) + FIRST_ITEM, len(config.numeric)), np.nan, dtype=np.float32)
    for k, name in enumerate(config.numeric):
        numeric[FIRST_ITEM:, k] = items[name].cast(pl.Float32, strict=False).fill_null(float("nan")).to_numpy()
    actions = sorted(events["action"].drop_nulls().unique().to_list()) if "action" in events.columns else []
    return Catalogue(TrainingVocabulary(items["item_id"].to_list(), actions, vocabularies), columns, numeric)


@dataclass(frozen=True)
class Sequences:
    """The events of all users, concatenated. User u has the rows `offsets[u] : offsets[u + 1]`, oldest first."""

    users: list[str]
    offsets: np.ndarray  # (U + 1,) int64
    items: np.ndarray  # (E,) int64, rows of the catalogue
    actions: np.ndarray  # (E,) int64
    timestamps: np.ndarray  # (E,) float64
    labels: np.ndarray  # (E, heads) float32, NaN if unknown; 1 for heads of kind `next`

    def __len__(self) -> int:
        return len(self.users)

    def of(self, user: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return items, actions, gap buckets (n,) and labels (n, heads) of events first to last - 1, as one window."""
        rows = slice(self.offsets[user] + first, self.offsets[user] + last)
        return self.items[rows], self.actions[rows], gap_buckets(self.timestamps[rows]), self.labels[rows]


def build_sequences(events: pl.DataFrame, vocabulary: TrainingVocabulary, config: DataConfig) -> Sequences:
    """Group clean events (in time order) by user, in order of first appearance. Unknown ids get row 0.

    Raises ValueError if the label column of a head is missing.
    """
    item_row = {item: k + FIRST_ITEM for k, item in enumerate(vocabulary.items)}
    action_row: dict[str | None, int] = {action: k + 1 for k, action in enumerate(vocabulary.actions)}
    users = events["user_id"].unique(maintain_order=True).to_list()
    user_index = {user: k for k, user in enumerate(users)}
    index = np.fromiter(map(user_index.__getitem__, events["user_id"]), dtype=np.int64, count=len(events))
    order = np.argsort(index, kind="stable")
    actions: list[str | None] = events["action"].to_list() if "action" in events.columns else [None] * len(events)
    labels = np.ones((len(events), len(config.heads)), dtype=np.float32)
    for k, head in enumerate(config.heads):
        if head.kind == "label":
            if f"label_{head.name}" not in events.columns:
                raise ValueError(f"events: no column label_{head.name} for the head {head.name}")
            labels[:, k] = events[f"label_{head.name}"].fill_null(float("nan")).to_numpy()
    return Sequences(
        users=users,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(index, minlength=len(users)))]),
        items=np.array([item_row.get(i, 0) for i in events["item_id"]], dtype=np.int64)[order],
        actions=np.array([action_row.get(a, UNKNOWN_ACTION) for a in actions], dtype=np.int64)[order],
        timestamps=events["timestamp"].to_numpy()[order],
        labels=labels[order],
    )


@dataclass(frozen=True)
class Split:
    """The number of training events of each user, the test events, and the users with further held-out events."""

    train_lengths: np.ndarray  # (U,) int64, a user's first train_lengths[u] events are for training
    test_lengths: np.ndarray  # (U,) int64, events before the test event; 0 if the user has no test event
    slate_users: np.ndarray  # (S,) int64, with a held-out slate after their training events, to evaluate
    validation_users: np.ndarray  # (V,) int64, with a held-out slate before the test event, to validate and calibrate
    held_out_users: np.ndarray  # (H,) int64, held out completely


def split_sequences(sequences: Sequences, config: DataConfig) -> Split:
    """Draw the held-out users with the config's seed, among users with five events before the held-out slate.

    `leave-one-out`: the test event is a user's last event, the slate the last `slate_size` events.
    `time`: training ends at `test_from`; the test event is a user's first event after that, the slate the first
    `slate_size` events after that.
    """
    lengths = np.diff(sequences.offsets)
    if config.kind == "time":
        users = np.repeat(np.arange(len(sequences)), lengths)
        known = np.bincount(users[sequences.timestamps < config.test_from], minlength=len(sequences))
        test_lengths = np.where(known < lengths, known, 0)
        slate_starts = known
    else:
        known = np.maximum(lengths - 1, 0)
        test_lengths = known
        slate_starts = lengths - config.slate_size
    train_lengths = known.copy()
    drawn = np.random.default_rng(config.seed).permutation(np.flatnonzero(known >= config.slate_size + 5))
    slated = drawn[(lengths - slate_starts >= config.slate_size)[drawn]][: config.slate_users]
    others = drawn[~np.isin(drawn, slated)]
    last = config.validation_users + config.held_out_users
    slate_users = np.sort(slated)
    validation_users = np.sort(others[: config.validation_users])
    held_out_users = np.sort(others[config.validation_users : last])
    train_lengths[held_out_users] = 0
    train_lengths[slate_users] = slate_starts[slate_users]
    train_lengths[validation_users] = known[validation_users] - config.slate_size
    return Split(train_lengths, test_lengths, slate_users, validation_users, held_out_users)


def training_events(sequences: Sequences, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return user (n,) and item row (n,) of each event that training may see."""
    users = np.repeat(np.arange(len(sequences)), split.train_lengths)
    firsts = np.cumsum(split.train_lengths) - split.train_lengths
    rows = sequences.offsets[users] + np.arange(len(users)) - firsts[users]
    return users, sequences.items[rows]


def count_popularity(catalogue: Catalogue, sequences: Sequences, split: Split, config: DataConfig) -> None:
    """Fill the numeric column `popularity` in place, if the TOML names it and the item table does not have it.

    It is log10(1 + training events of the item).
    """
    if "popularity" not in config.numeric:
        return
    column = catalogue.numeric[FIRST_ITEM:, config.numeric.index("popularity")]
    if np.isnan(column).all():
        _, seen = training_events(sequences, split)
        column[:] = np.log10(1 + np.bincount(seen, minlength=len(catalogue.numeric))[FIRST_ITEM:])


@dataclass(frozen=True)
class Data:
    """A data set, ready for training and evaluation."""

    config: DataConfig
    catalogue: Catalogue
    sequences: Sequences
    split: Split
    bad_rows: dict[str, int]  # unusable rows, by reason


def load_data(config: DataConfig, tables: TablesConfig) -> Data:
    """Read the tables and split them. Raises OSError or ValueError for files that are not such tables."""
    events, bad_rows = clean_events(read_table(Path(tables.events)), config.max_bad_share)
    items, bad_items = clean_items(read_items(tables), config)
    bad_rows |= bad_items
    if bad_rows:
        print(f"unusable rows, left out: {bad_rows}")
    catalogue = build_catalogue(items, events, config)
    sequences = build_sequences(events, catalogue.vocabulary, config)
    split = split_sequences(sequences, config)
    if not split.train_lengths.any():
        raise ValueError("no training events are left: every user needs one event more than the split holds out")
    count_popularity(catalogue, sequences, split, config)
    return Data(config, catalogue, sequences, split, bad_rows)
