"""Describe the tables of a TOML before training: slatewise validate my.toml

The command reads both tables as training does and splits them. It prints counts, shares, times, lengths, density, the
columns and rows that will be ignored, and the split. Warnings name things that training accepts and that are probably
not meant. Exit code 1: training would refuse the tables, and the error says why.

Called by: the command line. Calls: `config.py`, `data.py`, `tables/`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl

from slatewise_train.column_kinds import unused
from slatewise_train.config import Config, read_config
from slatewise_train.data import Data, assemble, split_data
from slatewise_train.defaults import choose_training
from slatewise_train.tables.events import DUPLICATE, LABEL, read_events
from slatewise_train.tables.files import collect, find_files, names_of
from slatewise_train.tables.history import history_rows
from slatewise_train.tables.items import clean_items, read_items

QUANTILES = (0.1, 0.5, 0.9)
SAMPLE = 100_000  # rows that decide about a note
SHORT = 3  # events: one to read, one to train on, one to test
MANY_TIES = 0.5
MANY_UNLISTED = 0.1
MANY_REPEATS = 0.3
MISSING_WORDS = ["null", "nan", "none", "na", "n/a", "undefined", "unknown"]
LISTED = 12  # names on a line


def describe(config: Config) -> Iterator[str]:
    """Yield the lines of the report. Raises OSError or ValueError for tables that training would refuse."""
    strict = config.data.max_bad_share
    events, bad = read_events(config.tables, 1.0)
    unusable = sum(n for reason, n in bad.items() if reason != DUPLICATE)
    rows = len(events) + sum(bad.values())
    yield f"events     {rows:,} rows in {files_of(config.tables.events)}, {len(events):,} used"
    for reason, count in bad.items():
        yield f"           {reason}: {count:,} rows ({share(count, rows)}), left out"
    if unusable > strict * max(1, rows - bad.get(DUPLICATE, 0)):
        read_events(config.tables, strict)  # raises, with an example
    yield from times(events, config)
    yield from missing_words(events)
    yield from actions_and_labels(events)
    yield from ignored_columns(config)
    history = history_rows(events, config.tables)
    yield from ties(events.filter(history), config)
    if shown := len(events) - int(history.sum()):
        yield f"history    {len(events) - shown:,} rows; {shown:,} rows ({share(shown, len(events))}) were only shown"
    if config.data.kind == "time" and config.tables.time_unit == "row":
        raise ValueError('[split] kind = "time" needs times; [data] time_unit = "row" says that there are none')
    items, bad_items = clean_items(read_items(config.tables), config.data)
    for reason, count in bad_items.items():
        yield f"           {reason}: {count:,}"
    catalogue, sequences, exposures = assemble(events, history, items, config.data)
    chosen, split = split_data(sequences, exposures, config.data, config.stated)
    data = Data(chosen, catalogue, sequences, split, bad, exposures)
    yield from lengths(data)
    yield from coverage(data, len(items), config)
    yield from fields_of(data)
    if not split.train_lengths.any():
        raise ValueError("no training events are left: every user needs one event more than the split holds out")
    yield from split_lines(data)
    shown = exposures is not None
    choose_training(config, split.train_lengths, len(catalogue.vocabulary.items), shown)  # prints the chosen values


def files_of(place: str) -> str:
    """Return the path of a table, with the number of files if there are several."""
    count = len(find_files(place))
    return place if count == 1 else f"{count} files of {place}"


def share(count: float, whole: float) -> str:
    """Return a share in per cent."""
    return f"{100 * count / max(1, whole):.3g} %"


def moment(seconds: float) -> str:
    """Return unix seconds as a date and time (UTC)."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def times(events: pl.DataFrame, config: Config) -> Iterator[str]:
    """Describe the range of the times."""
    if config.tables.time_unit == "row":
        yield "times      none: the order of the rows (time_unit)"
        return
    if not len(events):
        return
    first, last = float(events["timestamp"][0]), float(events["timestamp"][-1])
    yield f"times      {moment(first)} to {moment(last)} UTC"
    now = datetime.now(UTC).timestamp()
    if future := int((events["timestamp"] > now + 86_400).sum()):
        yield f"warning: {future:,} events ({share(future, len(events))}) are in the future"
    if early := int((events["timestamp"] < 86_400 * 365).sum()):
        yield f"warning: {early:,} events ({share(early, len(events))}) are in 1970; is time_unit right?"


def ties(history: pl.DataFrame, config: Config) -> Iterator[str]:
    """Describe the events of equal times. Rows that were only shown do not count, since a slate has one time."""
    if config.tables.time_unit == "row":
        return
    tied = int(history.select("user_id", "timestamp").is_duplicated().sum())
    yield f"           {share(tied, len(history))} of the events share user and time with another; these keep row order"
    if tied > MANY_TIES * len(history):
        yield "warning: most events have the time of another event, so their order is that of the rows; is it right?"


def missing_words(events: pl.DataFrame) -> Iterator[str]:
    """Warn of ids that are probably the word of a tool for a missing value."""
    for name in ("user_id", "item_id"):
        counts = events[name].value_counts()
        text = counts[name].cast(pl.String)
        for word, count in counts.filter(text.str.to_lowercase().is_in(MISSING_WORDS)).iter_rows():
            yield f"warning: {count:,} events have the {name} {word!r}; leave it empty if it means a missing value"


def actions_and_labels(events: pl.DataFrame) -> Iterator[str]:
    """Describe the values of the actions and of the labels."""
    if "action" in events.columns:
        counts = events["action"].value_counts(sort=True)
        parts = [f"{name or '(missing)'} {share(n, len(events))}" for name, n in counts.head(LISTED).iter_rows()]
        more = f" and {len(counts) - LISTED} more" if len(counts) > LISTED else ""
        yield f"actions    {', '.join(parts)}{more}"
        if len(counts) > 100:
            yield f"warning: {len(counts):,} different actions; an action is a kind of event, such as view or buy"
    for name in sorted(name for name in events.columns if name.startswith(LABEL)):
        ones, zeros = int((events[name] == 1).sum()), int((events[name] == 0).sum())
        unknown = events[name].null_count()
        n = len(events)
        yield f"labels     {name}: 1 {share(ones, n)}, 0 {share(zeros, n)}, unknown {share(unknown, n)}"
        if not ones or not zeros:
            yield f"warning: {name} has one value alone, so a head of it learns nothing"


def ignored_columns(config: Config) -> Iterator[str]:
    """Name the columns that training does not read."""
    labels = {head.name for head in config.data.heads if head.kind == "label"}
    read = {"user_id", "item_id", "timestamp", "action", "slate_id", "position", *(LABEL + name for name in labels)}
    named = set(config.tables.columns.values())
    found = names_of(find_files(config.tables.events, config.tables.separator)[0])
    if unread := [name for name in found if name not in read | named]:
        yield f"ignored    columns of the events: {listed(unread)}"
        if "action" not in [*found, *config.tables.columns]:
            yield from notes(config, unread)
    if config.tables.items is not None:
        used = {"item_id", config.data.title, *config.data.categorical, *config.data.text, *config.data.numeric} | named
        found = names_of(find_files(config.tables.items, config.tables.separator)[0])
        if unread := [name for name in found if name not in used]:
            yield f"ignored    columns of the items: {listed(unread)}"


def notes(config: Config, unread: Sequence[str]) -> Iterator[str]:
    """Note the columns of the events, without an action, that may be the action."""
    files = find_files(config.tables.events, config.tables.separator)[:1]
    sample = collect(files[0].scan().select(unread[:LISTED]).head(SAMPLE), files)
    for name in sample.columns:
        described, may_be_action = unused(sample[name])
        if may_be_action:
            yield f"note: {name}: {described}. If it is the action, add under [columns]: action = {json.dumps(name)}"


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def lengths(data: Data) -> Iterator[str]:
    """Describe the numbers of events of the users."""
    events = np.diff(data.sequences.offsets)
    if not len(events):
        return
    parts = [f"{100 * q:.0f} % have at most {np.quantile(events, q):,.0f}" for q in QUANTILES]
    yield f"users      {len(events):,}; events of a user: {events.min():,} to {events.max():,}, {', '.join(parts)}"
    longest = data.config.history_length
    if long := int((events > longest).sum()):
        yield f"           {long:,} users have more than the {longest} events that a request reads (history_length)"
    if short := int((events < SHORT).sum()):
        yield f"           {short:,} users ({share(short, len(events))}) have fewer than {SHORT} events"
    if events.max() > max(1000, 0.05 * events.sum()) and len(events) > 20:
        user = data.sequences.users[int(events.argmax())]
        yield f"warning: the user {user!r} has {share(events.max(), events.sum())} of all events; is it a person?"


def coverage(data: Data, listed_items: int, config: Config) -> Iterator[str]:
    """Describe the items, the density and the repetitions."""
    s = data.sequences
    counts = np.bincount(s.items, minlength=len(data.catalogue.numeric))[2:]
    seen = int((counts > 0).sum())
    unlisted = counts[listed_items:]
    yield f"items      {len(counts):,}, {seen:,} of them in events"
    if config.tables.items is not None:
        never = int((counts[:listed_items] == 0).sum())
        yield f"           listed and in no event: {never:,}; in events and not listed: {len(unlisted):,}"
        if unlisted.sum() > MANY_UNLISTED * max(1, counts.sum()):
            part = share(unlisted.sum(), counts.sum())
            yield f"warning: {part} of the events are of items that the item table lacks; are the ids written alike?"
    if len(s) and seen:
        owners = np.repeat(np.arange(len(s), dtype=np.int64), np.diff(s.offsets))
        pairs = len(np.unique(owners * len(data.catalogue.numeric) + s.items))
        yield f"density    {100 * pairs / (len(s) * seen):.3g} % of user and item pairs"
        repeated = len(s.items) - pairs
        yield f"           {share(repeated, len(s.items))} of the events repeat an item of the same user"
        again = int(((s.items[1:] == s.items[:-1]) & (owners[1:] == owners[:-1])).sum())
        if again > MANY_REPEATS * len(s.items):
            yield f"warning: {share(again, len(s.items))} of the events have the item of the event before"


def fields_of(data: Data) -> Iterator[str]:
    """Describe the columns of the items that the TOML names."""
    for name, rows in data.catalogue.field_values.items():
        n = len(rows) - 2
        known = int((rows[2:] > 0).any(axis=1).sum())
        most = rows.shape[1]
        values = len(data.catalogue.vocabulary.fields[name])
        part = share(known, n)
        yield f"field      {name}: {values:,} values, at most {most} for an item, {part} of the items have one"
        if known and values > 0.5 * known:
            yield f"warning: {name} has nearly as many values as items, so it describes none of them"
        if not known:
            yield f"warning: no item has a value of {name}"
    for k, name in enumerate(data.config.numeric):
        column = data.catalogue.numeric[2:, k]
        known = column[~np.isnan(column)]
        if len(known):
            part = share(len(known), len(column))
            yield f"number     {name}: {known.min():.6g} to {known.max():.6g}, {part} of the items have one"
        elif name != "popularity":
            yield f"warning: no item has a number in {name}"


def split_lines(data: Data) -> Iterator[str]:
    """Describe the split, and the users that it could not find."""
    split, config = data.split, data.config
    trained = int((split.train_lengths > 0).sum())
    yield f"split      {config.kind}: {int(split.train_lengths.sum()):,} events of {trained:,} users train"
    tested = int((split.test_lengths > 0).sum())
    yield f"           test: {tested:,} users; {len(split.next_users):,} users validate the next event"
    if data.exposures is not None:
        sizes = np.diff(data.exposures.offsets)
        yield f"slates     {len(sizes):,} were shown, of {sizes.min()} to {sizes.max()} items"
        yield f"           {len(split.slate_users):,} users have a slate that is held out to evaluate"
    found = {"validation_users": len(split.validation_users)}
    if data.exposures is None:
        found["slate_users"] = len(split.slate_users)
    for name, count in found.items():
        wanted = getattr(config, name)
        yield f"           {name}: {count:,} of the {wanted:,} wanted"
        if count < wanted:
            yield f"warning: {name} finds {count:,} users with a history before a slate of {config.slate_size}"
    if not len(split.next_users):
        yield "warning: no validation users, so nothing is watched during training and nothing is calibrated"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="slatewise validate",
        description="Describe the tables of a TOML before training. Exit code 1: training would refuse them.",
    )
    parser.add_argument("toml", type=Path, help="config of the ranker, for example models/movielens.toml")
    args = parser.parse_args(argv)
    warnings = notes = 0
    for line in describe(read_config(args.toml)):
        warnings += line.startswith("warning")
        notes += line.startswith("note:")
        print(line, flush=True)
    print(f"{args.toml}: training would accept these tables; warnings: {warnings}, notes: {notes}")
