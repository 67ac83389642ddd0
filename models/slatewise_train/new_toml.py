"""Write a TOML for tables that it has not seen before: slatewise init events.parquet [items.csv] [--out my.toml]

The command recognises common names of columns, the unit of the times, labels, actions, and the columns of the items
that are categorical or numeric. A comment in the TOML gives the reason of each choice. Read it, change it, then run
`slatewise validate`.

Called by: the command line. Calls: `tables/`, `config.py`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from slatewise_train.config import NAME, parse_config
from slatewise_train.tables import columns, times
from slatewise_train.tables.events import LABEL
from slatewise_train.tables.files import TableFile, collect, describe_separator, find_files, names_of
from slatewise_train.tables.history import BY_LABEL, SHOWN

SAMPLE = 100_000  # rows that decide about columns
MOST_ACTIONS = 100  # a column with more values is no action
MOST_VALUES = 5_000  # of a categorical column
FEW_NUMBERS = 20  # a numeric column with at most this many values is categorical
LONG_TEXT = 40  # characters: the mean of a column of descriptions
RATINGS = ("rating", "score", "stars", "overall")
TITLES = ("title", "name", "itemname", "productname", "itemtitle")


@dataclass
class Toml:
    """Lines of the tables that are not always there."""

    data: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)


def quoted(text: str) -> str:
    """Return text as a TOML string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def plain(text: str) -> str:
    """Return text for a comment: one line of at most 40 printable characters."""
    return "".join(c if c.isprintable() else " " for c in text)[:40]


def sample_of(files: Sequence[TableFile]) -> pl.DataFrame:
    """Return the first rows of a table. Columns of CSV files are text."""
    return collect(files[0].scan().head(SAMPLE), list(files[:1]))


def events_part(place: str, toml: Toml) -> None:
    """Recognise the columns of the events. Raises ValueError if there are no columns of users and items."""
    files = find_files(place)
    found = names_of(files[0])
    sample = sample_of(files)
    if told := describe_separator(files[0]):
        toml.data.append(f"# {told.removeprefix(str(files[0]) + ': ')}; this is found by itself")
    named: dict[str, str] = {}
    for name in ("user_id", "item_id", "timestamp", "action", "slate_id", "position"):
        free = [column for column in found if column not in named.values()]
        column = columns.guess(name, free)
        if column is not None and (name != "action" or is_action(sample[column])):
            named[name] = column
    columns.require(named, ["user_id", "item_id"], found, place)
    toml.columns.extend(f"{name} = {quoted(column)}" for name, column in named.items() if name != column)
    toml.data.extend(time_lines(sample, named.get("timestamp")))
    labels = dict(label_columns(sample, set(named.values())))
    for name, column in labels.items():
        if column != LABEL + name:
            toml.columns.append(f"{LABEL}{name} = {quoted(column)}")
        toml.heads.append(
            f'[heads.{quoted(name)}]  # the column {plain(column)} has 0 and 1\nkind = "label"\nweight = 0.5'
        )
    toml.data.extend(history_lines(sample, named, labels))
    for column in found:
        if columns.plain(column) in RATINGS and column not in [*named.values(), *labels.values()]:
            toml.data.append(
                f"# {plain(column)} is not read; for a head, add a column label_like with 1 for good ratings"
            )


def is_action(column: pl.Series) -> bool:
    """Whether a column has few different values of text."""
    return not column.dtype.is_nested() and column.n_unique() <= MOST_ACTIONS and not column.dtype.is_temporal()


def time_lines(sample: pl.DataFrame, column: str | None) -> Iterator[str]:
    """Yield the lines about the times."""
    if column is None:
        yield 'time_unit = "row"  # no column of times was found, so the order of the rows counts'
        return
    values = sample[column]
    if times.typed_seconds(column, values.dtype) is not None:
        yield f"# {plain(column)} has the type {values.dtype}, so it needs no time_unit"
    elif times.is_iso(values):
        yield f"# {plain(column)} has ISO 8601 times such as {shown(values)}; times without a zone are UTC"
    elif values.dtype.is_nested() or values.dtype.is_temporal():
        yield f"# {plain(column)} has the type {values.dtype}, which is no time: write unix seconds before you train"
    else:
        numbers = values.cast(pl.String, strict=False).str.strip_chars().cast(pl.Float64, strict=False)
        unit = times.other_unit(numbers, None)
        if unit in times.PER_SECOND:
            yield f"time_unit = {quoted(unit)}  # {plain(column)} has values such as {shown(values)}"
        elif unit == "date":
            yield f"# {plain(column)} has dates such as {shown(values)}: write them as 2026-01-31 before you train"
        else:
            yield f"# {plain(column)} has unix seconds such as {shown(values)}"


def shown(values: pl.Series) -> str:
    """Return the first value of a column, for a comment of one line."""
    known = values.drop_nulls().head(1)
    return plain(str(known.cast(pl.String, strict=False)[0])) if len(known) else "(none)"


def label_columns(sample: pl.DataFrame, taken: set[str]) -> Iterator[tuple[str, str]]:
    """Yield name and column of each label: a column whose values are 0 and 1."""
    for column in sample.columns:
        values = sample[column].drop_nulls()
        if column in taken or values.dtype.is_nested() or values.dtype.is_temporal() or not len(values):
            continue
        known = set(values.cast(pl.String, strict=False).str.to_lowercase().unique().drop_nulls())
        if known <= {"0", "1", "0.0", "1.0", "true", "false"} and len(known) == 2:
            yield re.sub(r"\W+", "_", column.removeprefix(LABEL)), column


def history_lines(sample: pl.DataFrame, named: dict[str, str], labels: dict[str, str]) -> Iterator[str]:
    """Yield the lines about the rows that make history."""
    slates = "slate_id" in named and sample[named["slate_id"]].null_count() < len(sample)
    if "action" in named:
        actions = sample[named["action"]].drop_nulls().cast(pl.String).value_counts(sort=True)
        every = [name for name in actions.to_series() if name]
        taken = [name for name in every if name.lower() not in SHOWN]
        described = ", ".join(
            f"{plain(name)} {100 * n / len(sample):.0f} %" for name, n in actions.head(10).iter_rows()
        )
        yield f"# actions: {described}"
        if len(taken) < len(every) or slates:
            yield f"history_actions = [{', '.join(map(quoted, taken))}]  # the other rows were only shown"
    elif labels:
        name = next(iter(labels))
        yield (
            f"history_actions = [{quoted(BY_LABEL + name)}]  # rows with {plain(labels[name])} = 1. "
            '["*"] if every row is an event of the user, and no item was only shown'
        )
    elif slates:
        yield '# history_actions = ["*"]  # the rows have slates: say which of them are events of the user'


def items_part(place: str, toml: Toml, item_column: str | None) -> None:
    """Recognise the columns of the items."""
    files = find_files(place)
    found = names_of(files[0])
    sample = sample_of(files)
    own = item_column if item_column in found else "item_id" if "item_id" in found else columns.guess("item_id", found)
    columns.require({"item_id": own} if own else {}, ["item_id"], found, place)
    if own not in ("item_id", item_column):
        raise ValueError(
            f"{place}: the ids stand in the column {own}; name it {item_column or 'item_id'}, as in the events"
        )
    title = next((name for name in found if columns.plain(name) in TITLES), None)
    if title and title != "title":
        toml.items.append(f"title = {quoted(title)}")
    categorical, numeric = [], ["popularity"]
    for name in found:
        if name in (own, title, "popularity"):
            continue
        kind, reason = kind_of(sample[name])
        toml.items.append(f"# {plain(name)}: {reason}")
        if kind == "categorical":
            categorical.append(name)
        elif kind == "numeric":
            numeric.append(name)
    toml.items.append(f"categorical = [{', '.join(map(quoted, categorical))}]")
    toml.items.append(f"numeric = [{', '.join(map(quoted, numeric))}]  # popularity is counted from the events")


def kind_of(column: pl.Series) -> tuple[str | None, str]:
    """Return "categorical", "numeric" or None for a column of the items, and the reason."""
    known = column.drop_nulls()
    if not len(known):
        return None, "left out, since it is empty"
    if isinstance(known.dtype, (pl.List, pl.Array)):
        values = known.explode(empty_as_null=True).drop_nulls()
        if values.dtype.is_nested():
            return None, "left out, since it has lists of lists"
        return "categorical", f"lists with {values.n_unique()} different values"
    if known.dtype.is_nested() or known.dtype.is_temporal() or known.dtype == pl.Binary:
        return None, f"left out, since it has the type {known.dtype}; write it as text or as a number"
    text = known.cast(pl.String).str.strip_chars()
    text = text.filter(text != "")
    distinct = text.n_unique()
    if text.cast(pl.Float64, strict=False).null_count() == 0 and known.dtype != pl.Boolean:
        if distinct <= FEW_NUMBERS:
            return "categorical", f"numbers with {distinct} different values"
        return "numeric", f"numbers with {distinct} different values"
    split = text.str.split("|").explode(empty_as_null=True)
    count = split.n_unique()
    if int(text.str.len_chars().sum()) > LONG_TEXT * len(split):
        return None, "left out, since it has long text"
    if count > MOST_VALUES or (count > 0.5 * len(text) and len(text) > FEW_NUMBERS):
        return None, f"left out, since it has {count} different values in {len(text)} items"
    several = ", several of them separated by |" if len(split) > len(text) else ""
    return "categorical", f"text with {count} different values{several}"


def toml_of(events: str, items: str | None, name: str) -> str:
    """Return the TOML for two tables. Raises OSError and ValueError for files that are no such tables."""
    toml = Toml()
    events_part(events, toml)
    item_column = next((line.split(" = ")[1] for line in toml.columns if line.startswith("item_id")), None)
    if items is not None:
        items_part(items, toml, json.loads(item_column) if item_column else None)
    lines = [
        "# Written by `slatewise init`. Check it, then run `slatewise validate`. Settings: docs/your-data.md",
        f"name = {quoted(name)}",
        "",
        "[data]",
        f"events = {quoted(events)}",
        f"items = {quoted(items)}" if items else "# without a table of items, the items are those of the events",
        f"trained_on = {quoted(Path(events).name)}  # shown by GET /models/NAME",
        *toml.data,
    ]
    if toml.columns:
        lines += ["", "[columns]  # name that training uses = name in your tables", *toml.columns]
    if toml.items:
        lines += ["", "[items]", *toml.items]
    lines += ["", "[heads.next]  # probability that an item is the user's next one", 'kind = "next"', "weight = 1.0"]
    return "\n".join([*lines, *toml.heads, ""])


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, or leave nothing. Raises OSError."""
    with path.open("xb") as file:
        try:
            file.write(content)
            file.flush()
        except OSError:  # a full disk
            path.unlink()
            raise


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="slatewise init", description="Write a TOML for your tables from what they contain."
    )
    parser.add_argument("events", help="Parquet or CSV: a file, a folder or a pattern in quotes")
    parser.add_argument("items", nargs="?", help="the table of items, if you have one")
    parser.add_argument("--name", help="of the ranker; default: the name of the file of events")
    parser.add_argument("--out", type=Path, help="default: NAME.toml")
    args = parser.parse_args(argv)
    stem = re.sub(r"\W+", "_", Path(args.events.rstrip("/")).name.split(".")[0]).strip("_")
    name = args.name or (stem if NAME.fullmatch(stem) else "ranker")
    out = args.out or Path(f"{name}.toml")
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it, or give another name with --out")
    content = toml_of(args.events, args.items, name).encode()
    parse_config(content, out)
    write_new(out, content)
    print(f"{out}: written. Check it, then run: slatewise validate {out}")
