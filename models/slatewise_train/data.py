"""Two tables in, training sequences out: the data contract (bring your own).

Before: Parquet or CSV files, or `movielens.py`. After: `train.py` and `evaluate.py`.

    events: user_id, item_id, timestamp (unix seconds), action?, label_<head>?        one row an event, any order
    items:  item_id, title?, then the columns that the TOML names as categorical or numeric
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl

from slatewise.bundle.features import gap_buckets
from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ACTION
from slatewise_train.config import DataConfig, Head

MULTI_VALUE_SEPARATOR = "|"
T = TypeVar("T")


def from_table(kind: type[T], table: dict, where: str, /, **given: Any) -> T:
    """A dataclass from a table of the TOML and what else is given. Raises ValueError with the names it does not know."""
    known = {f.name for f in fields(kind)} - given.keys()
    if unknown := table.keys() - known:
        raise ValueError(f"[{where}] has unknown {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return kind(**given, **table)


def read_config(path: Path) -> tuple[DataConfig, dict]:
    """The data part of a TOML as a dataclass, and the whole TOML as a dict."""
    toml = tomllib.loads(path.read_text())
    heads = tuple(Head(name, h["kind"], float(h["weight"])) for name, h in toml["heads"].items())
    for head in heads:
        if head.kind not in ("next", "label"):
            raise ValueError(f"{path}: [heads.{head.name}] kind must be 'next' or 'label', not {head.kind!r}")
    items = toml.get("items", {})
    config = from_table(
        DataConfig,
        toml.get("split", {}),
        "split",
        name=toml["name"],
        heads=heads,
        title=items.get("title", "title"),
        categorical=tuple(items.get("categorical", ())),
        numeric=tuple(items.get("numeric", ())),
    )
    if config.kind not in ("leave-one-out", "time"):
        raise ValueError(f"{path}: [split] kind must be 'leave-one-out' or 'time', not {config.kind!r}")
    return config, toml


def read_table(path: Path) -> pl.DataFrame:
    """A Parquet or CSV file, by its suffix. CSV columns come as strings: `clean_events` gives them their types."""
    if path.suffix == ".parquet":
        return pl.read_parquet(path)
    if path.suffix == ".csv":
        return pl.read_csv(path, infer_schema_length=0)
    raise ValueError(f"{path}: a table is .parquet or .csv")


def clean_events(events: pl.DataFrame, max_bad_share: float) -> tuple[pl.DataFrame, dict[str, int]]:
    """Usable events in time order (ties in input order), and how many rows could not be used, by reason.

    Raises ValueError where a column is missing or more than `max_bad_share` of the rows cannot be used.
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
    """Usable items, the first row of each id, numbers as numbers; and how many rows or numbers could not be used, by reason.

    Raises ValueError where a column that the TOML names is missing.
    """
    derived = {"popularity"}  # counted from the events where the items do not give it
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
class Vocabulary:
    """Names and their rows. Rows of `items` start at 2 (0 is unknown, 1 the start token), of all others at 1."""

    items: list[str]
    actions: list[str]
    fields: dict[str, list[str]]  # categorical column -> its values


@dataclass(frozen=True)
class Catalogue:
    """The items as arrays; row 0 is the unknown item, row 1 the start token."""

    vocabulary: Vocabulary
    field_values: dict[str, np.ndarray]  # column -> (I + 2, most values of one item) int64, 0 is "none" or padding
    numeric: np.ndarray  # (I + 2, F) float32, NaN is missing


def values_of(column: pl.Series) -> list[list[str]]:
    """The values of a categorical column, row by row: a list column's, or those between `|`."""
    lists = (
        column.cast(pl.List(pl.String))
        if column.dtype == pl.List
        else column.cast(pl.String).str.split(MULTI_VALUE_SEPARATOR)
    )
    return [[value for value in row or () if value] for row in lists.to_list()]


def build_catalogue(items: pl.DataFrame, events: pl.DataFrame, config: DataConfig) -> Catalogue:
    """All listed items, then those that only the events name, as rows."""
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
    return Catalogue(Vocabulary(items["item_id"].to_list(), actions, vocabularies), columns, numeric)


@dataclass(frozen=True)
class Sequences:
    """All users' events end to end. User u's are the rows `offsets[u] : offsets[u + 1]`, oldest first."""

    users: list[str]
    offsets: np.ndarray  # (U + 1,) int64
    items: np.ndarray  # (E,) int64, rows of the catalogue
    actions: np.ndarray  # (E,) int64
    timestamps: np.ndarray  # (E,) float64
    labels: np.ndarray  # (E, heads) float32, NaN where not known; 1 for heads of kind `next`

    def __len__(self) -> int:
        return len(self.users)

    def of(self, user: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Items, actions, gap buckets, labels of events first..last-1 of a user, as one window."""
        rows = slice(self.offsets[user] + first, self.offsets[user] + last)
        return self.items[rows], self.actions[rows], gap_buckets(self.timestamps[rows]), self.labels[rows]


def build_sequences(events: pl.DataFrame, vocabulary: Vocabulary, config: DataConfig) -> Sequences:
    """Clean events (in time order) as arrays, grouped by user in order of first appearance; unknown ids get row 0."""
    item_row = {item: k + FIRST_ITEM for k, item in enumerate(vocabulary.items)}
    action_row = {action: k + 1 for k, action in enumerate(vocabulary.actions)}
    users = events["user_id"].unique(maintain_order=True).to_list()
    user_index = {user: k for k, user in enumerate(users)}
    index = np.fromiter(map(user_index.__getitem__, events["user_id"]), dtype=np.int64, count=len(events))
    order = np.argsort(index, kind="stable")
    actions = events["action"].to_list() if "action" in events.columns else [None] * len(events)
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
    """How many of a user's first events training may see, where the test event stands, and who is held out further.

    `slate_users` have a whole slate right behind their training events that training does not see; so have
    `validation_users`, before the test event: on these the training is watched and the calibration fitted.
    """

    train_lengths: np.ndarray  # (U,) int64
    test_lengths: np.ndarray  # (U,) int64, events before the one to predict; 0: the user has none
    slate_users: np.ndarray  # (S,) int64
    validation_users: np.ndarray  # (V,) int64
    held_out_users: np.ndarray  # (H,) int64, of whom training sees nothing


def split_sequences(sequences: Sequences, config: DataConfig) -> Split:
    """Who is held out, drawn with the config's seed; users too short for a slate and five events before it are passed over.

    `leave-one-out`: the test event is a user's last, the slate the last `slate_size`. `time`: training ends at
    `test_from`; the test event is a user's first from then on, the slate the first `slate_size`.
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
    """(user, item row) of every event that training may see."""
    users = np.repeat(np.arange(len(sequences)), split.train_lengths)
    firsts = np.cumsum(split.train_lengths) - split.train_lengths
    rows = sequences.offsets[users] + np.arange(len(users)) - firsts[users]
    return users, sequences.items[rows]


def count_popularity(catalogue: Catalogue, sequences: Sequences, split: Split, config: DataConfig) -> None:
    """Fill the numeric column `popularity`, where named and not given: log10(1 + training events of the item)."""
    if "popularity" not in config.numeric:
        return
    column = catalogue.numeric[FIRST_ITEM:, config.numeric.index("popularity")]
    if np.isnan(column).all():
        _, seen = training_events(sequences, split)
        column[:] = np.log10(1 + np.bincount(seen, minlength=len(catalogue.numeric))[FIRST_ITEM:])
