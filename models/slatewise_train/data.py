"""Build the users' sequences and the catalogue from the tables of a TOML, and split them.

    events: user_id, item_id, timestamp, action?, label_<head>?, slate_id?, position?    one row per event, in any order
    items:  item_id, title?, then the columns that the TOML names as categorical, text or numeric

A column with a question mark is optional; `tables/` reads both tables. The split decides which events training may use,
and which events and users are held out for validation, calibration and evaluation.

Called by: every command that reads training data or a bundle's demo users. Calls: `tables/`, `exposures.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from slatewise.bundle.features import gap_buckets
from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ACTION
from slatewise_train.config import DataConfig, Head, TablesConfig
from slatewise_train.defaults import choose_split
from slatewise_train.exposures import Exposures, add_action_labels, build_exposures, first_held_out, whole_slates
from slatewise_train.split import Split as Split  # for the callers of this module
from slatewise_train.split import split_sequences as split_sequences
from slatewise_train.tables.events import clean_events as clean_events  # for the callers of this module
from slatewise_train.tables.events import read_events
from slatewise_train.tables.files import read_table as read_table
from slatewise_train.tables.history import EVERY, history_rows, history_rule
from slatewise_train.tables.items import clean_items, join_ids, read_items, value_lists, word_lists
from slatewise_train.tables.items import values_of as values_of
from slatewise_train.tables.new_events import join_events

WEEK = 604_800.0
LEAST_ITEMS_OF_WORD = 3
MOST_WORDS = 20_000  # of a text column, the most frequent ones
ARBITRARY_STEP = 0.381966 * WEEK  # the golden section spreads any number of points evenly


@dataclass(frozen=True)
class TrainingVocabulary:
    """Names in the order of their rows. The rows of `items` start at 2, those of actions and fields at 1.

    Row 0 is the unknown name or the missing value; row 1 of the items is the start token.
    """

    items: list[str]
    actions: list[str]
    fields: dict[str, list[str]]  # categorical or text column -> its values


@dataclass(frozen=True)
class Catalogue:
    """The items as I + 2 rows; row 0 is the unknown item, row 1 the start token."""

    vocabulary: TrainingVocabulary
    field_values: dict[str, np.ndarray]  # column -> (I + 2, V) int64, V the most values of one item, 0 is padding
    numeric: np.ndarray  # (I + 2, F) float32, NaN is missing


def build_catalogue(
    items: pl.DataFrame, events: pl.DataFrame, config: DataConfig, known: TrainingVocabulary | None = None
) -> Catalogue:
    """Build the catalogue: the items of the item table, then those that occur in the events alone.

    known: names that keep their rows, of a ranker that is updated; new names follow them.
    """
    seen = events.select(pl.col("item_id").unique(maintain_order=True).cast(pl.String))
    unlisted = seen.join(items, on="item_id", how="anti", maintain_order="left")
    items = pl.concat([items, unlisted], how="diagonal")
    if known is not None:
        first = pl.DataFrame({"item_id": known.items}, schema={"item_id": pl.String})
        others = items.join(first, on="item_id", how="anti", maintain_order="left")
        items = pl.concat([first.join(items, on="item_id", how="left", maintain_order="left"), others], how="diagonal")
    old_fields = {} if known is None else known.fields
    vocabularies = {}
    columns = {}
    for name in config.categorical:
        vocabularies[name], columns[name] = field_rows(value_lists(items[name]), old_fields.get(name, []))
    for name in config.text:
        words = frequent_words(word_lists(items[name]))
        vocabularies[name], columns[name] = field_rows(words, old_fields.get(name, []))
    if "popularity" in config.numeric and "popularity" not in items.columns:
        items = items.with_columns(
            pl.lit(None, pl.Float32).alias("popularity")
        )  # counted later, see `count_popularity`
    numeric = np.full((len(items) + FIRST_ITEM, len(config.numeric)), np.nan, dtype=np.float32)
    for k, name in enumerate(config.numeric):
        numeric[FIRST_ITEM:, k] = items[name].cast(pl.Float32, strict=False).fill_null(float("nan")).to_numpy()
    actions = sorted(events["action"].drop_nulls().unique().cast(pl.String)) if "action" in events.columns else []
    if known is not None:
        actions = list(dict.fromkeys([*known.actions, *actions]))
    return Catalogue(TrainingVocabulary(items["item_id"].to_list(), actions, vocabularies), columns, numeric)


def frequent_words(lists: pl.Series) -> pl.Series:
    """Return each item's words (lists) without rare ones, which would tell the item and nothing of others like it."""
    counts = lists.explode(empty_as_null=False).drop_nulls().value_counts(sort=True, name="items")
    kept = counts.filter(pl.col("items") >= LEAST_ITEMS_OF_WORD).head(MOST_WORDS)[lists.name]
    return lists.list.eval(pl.element().filter(pl.element().is_in(kept.implode())))


def field_rows(lists: pl.Series, known: Sequence[str] = ()) -> tuple[list[str], np.ndarray]:
    """Return the sorted values of a column (lists of text), and the rows of each item's values: (I + 2, V) int64.

    known: values that come first, in their order.
    """
    counts = lists.list.len().to_numpy().astype(np.int64)
    values = lists.explode(empty_as_null=False)
    names = values.unique().sort()
    if known:
        names = pl.Series(list(dict.fromkeys([*known, *names.cast(pl.String)])), dtype=pl.String)
    rows = np.zeros((len(lists) + FIRST_ITEM, max(1, int(counts.max(initial=0)))), dtype=np.int64)
    owners = np.repeat(np.arange(len(lists)), counts)
    places = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows[owners + FIRST_ITEM, places] = rows_in(values, names, 1)
    return names.to_list(), rows


def rows_in(names: pl.Series, known: pl.Series, first: int) -> np.ndarray:
    """Return the row of each name (n,) int64: `first` and up in the order of `known`; 0 for another name or null.

    Each distinct name is looked up once.
    """
    table = (
        known.cast(pl.String)
        .to_frame("name")
        .with_columns(pl.int_range(first, first + len(known), dtype=pl.Int64).alias("row"))
    )
    distinct = names.unique(maintain_order=True)
    rows = distinct.cast(pl.String).to_frame("name").join(table, on="name", how="left", maintain_order="left")["row"]
    found = names.to_frame("name").join(
        pl.DataFrame({"name": distinct, "row": rows.fill_null(0)}),
        on="name",
        how="left",
        maintain_order="left",
        nulls_equal=True,
    )
    return found["row"].to_numpy()


def request_times(timestamps: np.ndarray) -> np.ndarray:
    """Return times (n,) for the context of requests: those of the events, or arbitrary ones where they are missing.

    Arbitrary times are spread over the week. A ranker that is trained with them learns that the time tells nothing, so
    a request at any time gets the same order.
    """
    arbitrary = np.arange(len(timestamps)) * ARBITRARY_STEP % WEEK
    return np.where(np.isnan(timestamps), arbitrary, timestamps)


@dataclass(frozen=True)
class Sequences:
    """The events of all users, concatenated. User u has the rows `offsets[u] : offsets[u + 1]`, oldest first."""

    users: list[str]
    offsets: np.ndarray  # (U + 1,) int64
    items: np.ndarray  # (E,) int64, rows of the catalogue
    actions: np.ndarray  # (E,) int64
    timestamps: np.ndarray  # (E,) float64 unix seconds, NaN if missing
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
    users = events["user_id"].unique(maintain_order=True)
    index = rows_in(events["user_id"], users, 0)
    order = np.argsort(index, kind="stable")
    actions = (
        rows_in(events["action"], pl.Series(vocabulary.actions, dtype=pl.String), UNKNOWN_ACTION + 1)
        if "action" in events.columns
        else np.full(len(events), UNKNOWN_ACTION, np.int64)
    )
    labels = np.ones((len(events), len(config.heads)), dtype=np.float32)
    for k, head in enumerate(config.heads):
        if head.kind == "label":
            if f"label_{head.name}" not in events.columns:
                labelled = [name.removeprefix("label_") for name in events.columns if name.startswith("label_")]
                known = f"labels: {', '.join(labelled)}" if labelled else "the events have no column label_..."
                raise ValueError(f"events: no column label_{head.name} for the head {head.name}; {known}")
            labels[:, k] = events[f"label_{head.name}"].fill_null(float("nan")).to_numpy()
    return Sequences(
        users=users.cast(pl.String).to_list(),
        offsets=np.concatenate([[0], np.cumsum(np.bincount(index, minlength=len(users)))]),
        items=rows_in(events["item_id"], pl.Series(vocabulary.items, dtype=pl.String), FIRST_ITEM)[order],
        actions=actions[order],
        timestamps=events["timestamp"].to_numpy()[order],
        labels=labels[order],
    )


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
    exposures: Exposures | None = None  # the slates that users were shown, if the events have them


def assemble(
    events: pl.DataFrame,
    is_history: pl.Series,
    items: pl.DataFrame,
    config: DataConfig,
    known: TrainingVocabulary | None = None,
) -> tuple[Catalogue, Sequences, Exposures | None]:
    """Build the catalogue, the sequences and the slates of clean tables, and print how many slates there are.

    The catalogue has the items of all events; the actions and the sequences are those of the history. known: as in
    `build_catalogue`.
    """
    items, events = join_ids(items, events)
    if not is_history.all():  # without shown rows, such a label would have one value
        events = add_action_labels(events, is_history, config.heads)
    taken = events.filter(is_history)
    if "action" in events.columns:
        events = events.with_columns(pl.when(is_history).then(pl.col("action")).alias("action"))
    catalogue = build_catalogue(items, events, config, known)
    sequences = build_sequences(taken, catalogue.vocabulary, config)
    users = rows_in(events["user_id"], pl.Series(sequences.users, dtype=pl.String), 1) - 1
    others = rows_in(events["user_id"], events["user_id"].unique(maintain_order=True), 1)
    users = np.where(users < 0, -others, users)  # one negative number for each user without history
    rows = rows_in(events["item_id"], pl.Series(catalogue.vocabulary.items, dtype=pl.String), FIRST_ITEM)
    exposures, counts = build_exposures(events, is_history, users, rows, config.heads)
    if counts:
        print(f"slates that are left out or cut: {counts}")
    if exposures is not None:
        print(f"{len(exposures)} slates were shown, with {len(exposures.items)} items")
    return catalogue, sequences, exposures


def taken_events(events: pl.DataFrame, stated: Sequence[str], heads: tuple[Head, ...], place: str) -> pl.DataFrame:
    """Return the history in clean events of another table than that of the training: of a demo, or of a refresh.

    stated: `history_actions` of the training. The rule and the labels are those of the training, but the table may be a
    part without some of the actions. Raises ValueError for a missing column.
    """
    rows = events.with_columns(history_rule(stated, events.columns, place).alias("is_history"))["is_history"]
    if stated and EVERY not in stated:
        events = add_action_labels(events, rows, heads)
        if "action" in events.columns:  # rows without the action of a head do not tell its label
            labels = {f"label_{head.name}" for head in heads if head.kind == "label"}
            events = events.with_columns(
                pl.lit(None, pl.Float32).alias(name) for name in sorted(labels - set(events.columns))
            )
    return events.filter(rows)


def split_data(
    sequences: Sequences, exposures: Exposures | None, config: DataConfig, stated: frozenset[str] | None
) -> tuple[DataConfig, Split]:
    """Choose what the TOML leaves out of `[split]`, and split the sequences.

    With slates that users were shown, a held-out event holds out the slate that it was chosen from, and no further
    events are held out for slates. The slate users are then all users with a held-out slate, but those who validate.
    """
    if exposures is None:
        config = choose_split(config, stated, sequences)
        return config, split_sequences(sequences, config)
    config = choose_split(
        dataclasses.replace(config, slate_size=1),
        None if stated is None else stated | {"split.slate_size"},
        sequences,
    )
    split = split_sequences(sequences, config)
    lengths = whole_slates(exposures, split.train_lengths)
    able = np.flatnonzero(first_held_out(exposures, np.arange(len(sequences)), lengths) >= 0)
    validation = np.intersect1d(np.union1d(split.validation_users, split.next_users), able)
    others = np.setdiff1d(able, np.concatenate([validation, split.held_out_users]))
    return config, dataclasses.replace(
        split,
        train_lengths=lengths,
        slate_users=others,
        validation_users=validation,
        next_users=split.next_users[lengths[split.next_users] > 0],
    )


def load_data(
    config: DataConfig,
    tables: TablesConfig,
    stated: frozenset[str] | None = None,
    *,
    known: TrainingVocabulary | None = None,
    new: pl.DataFrame | None = None,
) -> Data:
    """Read the tables and split them. Raises OSError or ValueError for files that are not such tables.

    stated: keys of the TOML, as in `Config.stated`; the others of `[split]` are chosen from the tables. None: no key is
    chosen. known: as in `build_catalogue`; new: clean events beside those of the TOML, from `read_new_events`.
    """
    events, bad_rows = read_events(tables, config.max_bad_share)
    if new is not None:
        events = join_events(events, new)
    items, bad_items = clean_items(read_items(tables), config)
    bad_rows |= bad_items
    if bad_rows:
        print(f"rows and values that are left out: {bad_rows}")
    is_history = history_rows(events, tables)
    if shown := len(events) - int(is_history.sum()):
        print(f"{shown} of {len(events)} rows were only shown, and are no history (history_actions in [data])")
    if config.kind == "time" and tables.time_unit == "row":
        raise ValueError('[split] kind = "time" needs times; [data] time_unit = "row" says that there are none')
    catalogue, sequences, exposures = assemble(events, is_history, items, config, known)
    config, split = split_data(sequences, exposures, config, stated)
    if not split.train_lengths.any():
        raise ValueError("no training events are left: every user needs one event more than the split holds out")
    count_popularity(catalogue, sequences, split, config)
    return Data(config, catalogue, sequences, split, bad_rows, exposures)
