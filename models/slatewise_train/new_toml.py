"""Write a TOML for tables that it has not seen before: slatewise init events.parquet [items.csv] [--out my.toml]

The command recognises common names of columns, the unit of the times, labels, actions, and the columns of the items
that are categorical or numeric. A comment in the TOML gives the reason of each choice. Read it, change it, then run
`slatewise validate`.

The TOML is checked before it is written, and a file that exists is never replaced.

Called by: the command line. Calls: `column_kinds.py`, `config.py`, `tables/`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from slatewise_train.column_kinds import kind_of, printable, shown, unused
from slatewise_train.config import NAME, Config, parse_config
from slatewise_train.tables import columns, times
from slatewise_train.tables.events import LABEL, Source, locate
from slatewise_train.tables.files import TableFile, collect, describe_separator, find_files, names_of
from slatewise_train.tables.history import BY_LABEL, SHOWN
from slatewise_train.tables.items import clean_items, read_items

SAMPLE = 100_000  # rows that decide about columns
MOST_ACTIONS = 100  # a column with more values is no action
LISTED = 10  # actions of a comment
CENTURY = (946_684_800.0, 2_145_916_800.0)  # unix seconds of the years 2000 and 2038
LOCAL_DATE = r"^\s*\d{1,2}[./-]\d{1,2}[./-]\d{2,4}\b"  # day and month in an order that cannot be known
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


def sample_of(files: Sequence[TableFile]) -> pl.DataFrame:
    """Return the first rows of a table. Columns of CSV files are text."""
    sample = collect(files[0].scan().head(SAMPLE), list(files[:1]))
    if not len(sample):
        raise ValueError(f"{files[0]}: the table has no rows")
    return sample


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
        if column is None and name == "timestamp":
            column = next((one for one in free if is_time(sample[one])), None)
        if column is not None and (name != "action" or is_action(sample[column])):
            named[name] = column
    columns.require(named, ["user_id", "item_id"], found, place)
    toml.columns.extend(f"{name} = {quoted(column)}" for name, column in named.items() if name != column)
    toml.data.extend(time_lines(sample, named.get("timestamp")))
    actions = count_actions(files, named["action"]) if "action" in named else {}
    labels = dict(label_columns(sample, set(named.values())))
    for name, column in labels.items():
        if column != LABEL + name:
            toml.columns.append(f"{LABEL}{name} = {quoted(column)}")
        toml.heads.append(
            f'[heads.{quoted(name)}]  # the column {printable(column)} has 0 and 1\nkind = "label"\nweight = 0.5'
        )
    toml.data.extend(history_lines(sample, named, labels, actions))
    for column in found:
        if column in [*named.values(), *labels.values()]:
            continue
        if columns.plain(column) in RATINGS:
            toml.data.append(
                f"# {printable(column)} is not read; for a head, add a column label_like with 1 for good ratings"
            )
            continue
        described, may_be_action = unused(sample[column])
        remedy = f". If it is the action, add under [columns]: action = {quoted(column)}"
        offered = may_be_action and "action" not in named
        toml.data.append(f"# {printable(column)}: {described}{remedy if offered else ''}")


def is_action(column: pl.Series) -> bool:
    """Whether a column has few different values of text."""
    if column.dtype.is_nested() or column.dtype.is_temporal():
        return False
    return column.n_unique() <= MOST_ACTIONS and column.null_count() < len(column)


def is_time(column: pl.Series) -> bool:
    """Whether a column without a common name has a type of time, times as text, or unix times of this century."""
    if times.typed_seconds("", column.dtype) is not None or times.is_iso(column):
        return True
    if column.dtype.is_nested() or column.dtype.is_temporal() or column.dtype == pl.Boolean:
        return False
    numbers = column.drop_nulls().cast(pl.String, strict=False).cast(pl.Float64, strict=False)
    first, last = CENTURY
    inside = (numbers.is_between(first * unit, last * unit).fill_null(False) for unit in times.PER_SECOND.values())
    return bool(len(numbers)) and any(bool(found.all()) for found in inside)  # null: a text that is no number


def count_actions(files: Sequence[TableFile], column: str) -> dict[str, int]:
    """Count the rows of each action in all files: the first rows of a log may lack one."""
    scans = [file.scan().select(pl.col(column).cast(pl.String).fill_null("").alias("action")) for file in files]
    counts = collect(
        pl.concat(scans).group_by("action").len().sort("len", "action", descending=[True, False]), [*files]
    )
    return dict(counts.head(MOST_ACTIONS).iter_rows())


def time_lines(sample: pl.DataFrame, column: str | None) -> Iterator[str]:
    """Yield the lines about the times."""
    if column is None:
        yield 'time_unit = "row"  # no column of times was found, so the order of the rows counts'
        for values in sample.iter_columns():
            if values.dtype == pl.String and values.drop_nulls().str.contains(LOCAL_DATE).mean() == 1:
                yield f"# WARNING: {printable(values.name)} has dates such as {shown(values)}, which are not read."
                yield "# Write them as 2026-01-31 and run init again, unless the rows are in order of time."
        return
    values = sample[column]
    if times.typed_seconds(column, values.dtype) is not None:
        yield f"# {printable(column)} has the type {values.dtype}, so it needs no time_unit"
    elif times.is_iso(values):
        yield f"# {printable(column)} has ISO 8601 times such as {shown(values)}; times without a zone are UTC"
    elif values.dtype.is_nested() or values.dtype.is_temporal():
        yield f"# {printable(column)} has the type {values.dtype}, which is no time; write unix seconds"
    else:
        numbers = values.cast(pl.String, strict=False).str.strip_chars().cast(pl.Float64, strict=False)
        unit = times.other_unit(numbers, None)
        if unit in times.PER_SECOND:
            yield f"time_unit = {quoted(unit)}  # {printable(column)} has values such as {shown(values)}"
        elif unit == "date":
            yield f"# {printable(column)} has dates such as {shown(values)}: write them as 2026-01-31 before you train"
        elif numbers.null_count() > len(numbers) // 2:
            yield f"# {printable(column)} has values such as {shown(values)}, which training does not read as times:"
            yield "# write unix seconds, or ISO 8601 such as 2026-01-31T12:00:00Z, before you train"
        else:
            yield f"# {printable(column)} has unix seconds such as {shown(values)}"


def label_columns(sample: pl.DataFrame, taken: set[str]) -> Iterator[tuple[str, str]]:
    """Yield name and column of each label: a column whose values are 0 and 1."""
    for column in sample.columns:
        values = sample[column].drop_nulls()
        if column in taken or values.dtype.is_nested() or values.dtype.is_temporal() or not len(values):
            continue
        known = set(values.cast(pl.String, strict=False).str.to_lowercase().unique().drop_nulls())
        if known <= {"0", "1", "0.0", "1.0", "true", "false"} and len(known) == 2:
            yield re.sub(r"\W+", "_", column.removeprefix(LABEL)), column


def history_lines(
    sample: pl.DataFrame, named: dict[str, str], labels: dict[str, str], actions: dict[str, int]
) -> Iterator[str]:
    """Yield the lines about the rows that make history. actions: number of rows of each, the most frequent first."""
    slates = "slate_id" in named and sample[named["slate_id"]].null_count() < len(sample)
    if "action" in named:
        every = [name for name in actions if name]
        taken = [name for name in every if name.lower() not in SHOWN]
        rows = sum(actions.values())
        described = [f"{printable(name) or '(missing)'} {100 * n / rows:.0f} %" for name, n in actions.items()]
        yield f"# actions: {', '.join(described[:LISTED])}"
        if len(taken) < len(every) or slates:
            yield f"history_actions = [{', '.join(map(quoted, taken))}]  # the other rows were only shown"
            yield '# a head can learn from an action: add [heads.NAME] with the action\'s NAME and kind = "label"'
    elif labels:
        name = next(iter(labels))
        yield (
            f"history_actions = [{quoted(BY_LABEL + name)}]  # rows with {printable(labels[name])} = 1. "
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
    ids = sample[str(own)].cast(pl.String, strict=False)
    categorical, numeric = [], ["popularity"]
    for name in found:
        if name in (own, title, "popularity"):
            continue
        kind, reason = kind_of(sample[name], ids)
        toml.items.append(f"# {printable(name)}: {reason}")
        if kind == "categorical":
            categorical.append(name)
        elif kind == "numeric":
            numeric.append(name)
    toml.items.append(f"categorical = [{', '.join(map(quoted, categorical))}]")
    toml.items.append(f"numeric = [{', '.join(map(quoted, numeric))}]  # popularity is counted from the events")


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


def check(config: Config) -> None:
    """Raise ValueError if training could not read the columns of the first files: a missing one, a type without ids."""
    file = find_files(config.tables.events, config.tables.separator)[0]
    locate(Source(file.scan(), str(file), file), config.tables)
    if config.tables.items is not None:
        clean_items(read_items(config.tables).head(SAMPLE), config.data)


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
    check(parse_config(content, out))
    write_new(out, content)
    print(f"{out}: written. Check it, then run: slatewise validate {out}")
