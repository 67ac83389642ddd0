"""Read a table of events: usable rows in time order, as compact columns.

    user_id, item_id   categorical
    timestamp          float64 unix seconds; NaN with `time_unit = "row"`
    action             categorical, null if missing                       optional
    label_<head>       float32, 0 or 1, null if unknown                   optional
    slate_id           categorical, null outside slates                   optional
    position           int64, null if unknown                             optional

Files are scanned by the streaming engine, which keeps a number in place of each id.

Called by: `data.py`, `check_data.py`, `new_toml.py`, `exposures.py`, `history.py`, `meta/`. Calls: `files.py`,
`columns.py`, `ids.py`, `times.py`, `faults.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from slatewise.schemas import MAX_ID
from slatewise_train.config import EVENT_COLUMNS, TablesConfig
from slatewise_train.config_values import LATEST_TIME
from slatewise_train.tables import columns, faults, ids, times
from slatewise_train.tables.files import TableFile, collect, describe_separator, find_files, names_of, together

SAMPLE = 10_000  # rows that decide how times are written
LABEL = "label_"
NO_VALUE = "no value"
# a column with another value has the fault
LABELS = {NO_VALUE, "", "nan", "NaN", "0", "1", "0.0", "1.0", "true", "false"}
NO_POSITION = -(2**62)  # stands for a position that is no whole number
NO_LABEL = 2.0  # stands for a label that is no number: neither 0 nor 1
IDS = ("user_id", "item_id", "action", "slate_id")
PLAIN = TablesConfig(events="events")

NO_USER, NO_ITEM, LONG_USER, LONG_ITEM = "missing user_id", "missing item_id", "user_id too long", "item_id too long"
BAD_TIME, LONG_ACTION, BAD_LABEL, DUPLICATE = "bad timestamp", "action too long", "label not 0 or 1", "duplicate row"
REMEDIES = {
    NO_USER: ("user_id", "every row needs one"),
    NO_ITEM: ("item_id", "every row needs one"),
    LONG_USER: ("user_id", f"an id has at most {MAX_ID} characters"),
    LONG_ITEM: ("item_id", f"an id has at most {MAX_ID} characters"),
    BAD_TIME: ("timestamp", "write unix seconds from 0 on, or ISO 8601 such as 2026-01-31T12:00:00Z"),
    LONG_ACTION: ("action", f"an action has at most {MAX_ID} characters"),
    BAD_LABEL: (LABEL, "write 0 or 1, and nothing for unknown"),
}
BLANK = len(REMEDIES) + 1  # an empty line of a CSV file, which is no row


@dataclass(frozen=True)
class Source:
    """Columns of one file, or of a table in memory, before they are converted."""

    frame: pl.LazyFrame
    place: str  # for messages
    file: TableFile | None = None

    @property
    def is_text(self) -> bool:
        return self.file is not None and self.file.separator is not None


def read_events(tables: TablesConfig, max_bad_share: float) -> tuple[pl.DataFrame, dict[str, int]]:
    """Read the events of a TOML. Returns as `clean_events` does, and raises OSError for files that are not there."""
    files = find_files(tables.events, tables.separator)
    for sentence in filter(None, map(describe_separator, files[:1])):
        print(sentence)
    events, bad = clean([Source(file.scan(), str(file), file) for file in files], max_bad_share, tables)
    if not len(events) and not bad:
        raise ValueError(f"{tables.events}: the table has no rows")
    return events, bad


def scan_events(places: Sequence[str], tables: TablesConfig) -> tuple[pl.LazyFrame, list[TableFile]]:
    """Return the rows of several tables in the types of the contract, with ids as text, and their files.

    tables: how to read them. `events` in it is not read.

    Nothing is read yet, and unusable rows are still among them: for tables of which a part is used. Raises OSError and
    ValueError for files that are no such tables.
    """
    files = together(file for place in places for file in find_files(place, tables.separator))
    sources = [Source(file.scan(), str(file), file) for file in files]
    located = [locate(source, tables) for source in sources]
    text = {name: pl.String() for name in IDS}
    for pair in zip(sources, located):
        check_times(*pair, tables)
    frames = [canonical(*pair, tables, text) for pair in zip(sources, located)]
    return pl.concat(frames, how="diagonal").filter(~pl.col("blank")).drop("blank"), files


def clean_events(
    events: pl.DataFrame, max_bad_share: float, tables: TablesConfig = PLAIN
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return the usable events in time order, and the number of rows that are left out, by reason.

    Events with equal times stay in input order; of equal rows, the first stays. Raises ValueError if a column is
    missing, if times are in another unit, or if the share of unusable rows is larger than `max_bad_share`.
    """
    return clean([Source(events.lazy(), "events")], max_bad_share, tables)


def clean(sources: Sequence[Source], max_bad_share: float, tables: TablesConfig) -> tuple[pl.DataFrame, dict[str, int]]:
    """Convert, check and sort the rows of all sources, in their order."""
    files = [source.file for source in sources if source.file]
    located = [locate(source, tables) for source in sources]
    if tables.time_unit != "row":
        check_times(sources[0], located[0], tables)
    spaces = {name: pl.Categorical(pl.Categories.random(name)) for name in IDS}
    frames = [canonical(*pair, tables, spaces) for pair in zip(sources, located)]
    events = collect(pl.concat(frames, how="diagonal"), files)
    events = merge_floats(events, sources[0].place)
    rows = len(events) - int(events["blank"].sum())
    events = events.with_columns(pl.when("blank").then(BLANK).otherwise(fault_number(events, tables)).alias("fault"))
    found = dict(events["fault"].value_counts().iter_rows())
    bad = {reason: found.get(k, 0) for k, reason in enumerate(REMEDIES, 1)}
    if sum(bad.values()) > max_bad_share * max(1, rows):
        first = int(events["fault"].is_between(1, len(REMEDIES)).arg_max() or 0)
        reason = list(REMEDIES)[int(events["fault"][first]) - 1]
        counts = ", ".join(f"{reason} {n}" for reason, n in bad.items() if n)
        example = describe(sources, located, first, reason)
        raise ValueError(
            f"{place_of(sources)}: {sum(bad.values()) / rows:.1%} of {rows} rows cannot be used, limit "
            f"{max_bad_share:.1%} (max_bad_share in [split]): {counts}; the first is {example}; {REMEDIES[reason][1]}"
        )
    if found.keys() - {0}:
        events = events.filter(pl.col("fault") == 0)
    events = events.drop("fault", "blank")
    if tables.time_unit != "row":  # without times, equal rows are not the same event
        events = events.sort("timestamp", maintain_order=True)
        events, bad[DUPLICATE] = without_duplicates(events)
    return events, {reason: n for reason, n in bad.items() if n}


def without_duplicates(events: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Keep the first of equal rows. Returns the events and the number of rows that are left out."""
    repeated = events.hash_rows().is_duplicated()
    if not repeated.any():
        return events, 0
    alike = events.with_row_index("row").filter(repeated)
    single = ~repeated.to_numpy()
    single[alike.unique(set(events.columns), keep="first")["row"].to_numpy()] = True
    return events.filter(single), int((~single).sum())


def place_of(sources: Sequence[Source]) -> str:
    """Return the first file, and the number of the others."""
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    return sources[0].place + more


def locate(source: Source, tables: TablesConfig) -> dict[str, str]:
    """Return the column of the source for each name of the contract. Raises ValueError if one is missing."""
    found = names_of(source.file) if source.file else source.frame.collect_schema().names()
    labels = [name for name in found if name.startswith(LABEL)]
    renamed = [name for name in tables.columns if name.startswith(LABEL)]
    located = columns.locate(found, tables.columns, dict.fromkeys([*EVENT_COLUMNS, *renamed, *labels]), source.place)
    wanted = ["user_id", "item_id"]
    if tables.time_unit == "row":
        located.pop("timestamp", None)
    else:
        wanted.append("timestamp")
        if {"user_id", "item_id"} <= located.keys() and "timestamp" not in located:
            yours = columns.guess("timestamp", found)
            remedy = f'timestamp = "{yours}" in [columns]' if yours else 'time_unit = "row" in [data]'
            raise ValueError(
                f"{source.place}: no column timestamp; {columns.listed(found)}; set {remedy} "
                '("row": the rows are in order and have no times)'
            )
    columns.require(located, wanted, found, source.place)
    schema = source.frame.collect_schema()
    for name, column in located.items():
        dtype = schema[column]
        moment = name == "timestamp" and times.typed_seconds(column, dtype) is not None
        if name in IDS:
            ids.as_text(column, dtype, source.place, strip=False)  # raises for a type without ids
        elif not moment and (dtype.is_nested() or dtype.is_temporal()):
            raise ValueError(f"{source.place}: column {column} has the type {dtype}, which is no {name.split('_')[0]}")
    return located


def times_of(source: Source, located: dict[str, str]) -> pl.Series:
    """Return the first times of a source as they are."""
    column = located["timestamp"]
    frame = source.frame.select(column).drop_nulls().head(SAMPLE)
    return collect(frame, [source.file] if source.file else [])[column]


def has_iso(source: Source, located: dict[str, str], tables: TablesConfig) -> bool:
    """Return whether the times of a source are ISO 8601 text."""
    if tables.time_unit is None and "timestamp" in located:
        dtype = source.frame.collect_schema()[located["timestamp"]]
        return not dtype.is_numeric() and not dtype.is_temporal() and times.is_iso(times_of(source, located))
    return tables.time_unit == "iso"


def check_times(source: Source, located: dict[str, str], tables: TablesConfig) -> None:
    """Raise ValueError if the times are numbers that look like another unit."""
    if has_iso(source, located, tables):
        return
    sample = times_of(source, located)
    if times.typed_seconds("timestamp", sample.dtype) is not None:
        return
    numbers = sample.cast(pl.String).str.strip_chars().cast(pl.Float64, strict=False)
    other = times.other_unit(numbers, tables.time_unit)
    if other is None:
        return
    example = numbers.drop_nulls()[0]
    shown = int(example) if example == int(example) else example
    if other == "date":
        raise ValueError(
            f"{source.place}: timestamp {shown} looks like a date; write it as 2026-01-31 or 2026-01-31T12:00:00Z, or "
            "as seconds"
        )
    names = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
    raise ValueError(
        f"{source.place}: timestamp {shown} looks like {names[other]}, not {names[tables.time_unit or 's']}; "
        f'set time_unit = "{other}" in [data]'
    )


def canonical(
    source: Source, located: dict[str, str], tables: TablesConfig, spaces: Mapping[str, pl.DataType]
) -> pl.LazyFrame:
    """Return the columns of the contract in their types; a value that cannot be converted is null or `NO_LABEL`."""
    schema = source.frame.collect_schema()
    wanted: list[pl.Expr] = []
    for name, column in located.items():
        dtype = schema[column]
        if name in spaces:
            wanted.append(ids.as_text(column, dtype, source.place, source.is_text).cast(spaces[name]).alias(name))
        elif name == "timestamp":
            iso = has_iso(source, located, tables)
            wanted.append(times.seconds(column, dtype, tables.time_unit, iso).alias(name))
        elif name == "position":
            wanted.append(position(column, dtype).alias(name))
        else:
            wanted.append(label(column, dtype).alias(name))
    if tables.time_unit == "row":
        wanted.append(pl.lit(float("nan"), pl.Float64).alias("timestamp"))
    # All columns are read: polars finds a line with too many fields only then.
    own = pl.exclude(*source.file.partition) if source.file and source.file.partition else pl.all()
    blank = pl.all_horizontal(own.is_null()) if source.is_text else pl.lit(False)
    return source.frame.select(*wanted, blank.alias("blank"))


def label(column: str, dtype: pl.DataType) -> pl.Expr:
    """Return a label as float32: 0 or 1, null if unknown, another number for another value.

    NaN is unknown too, which pandas and polars write for it.
    """
    if dtype == pl.Boolean or dtype.is_numeric():
        return pl.col(column).cast(pl.Float32, strict=False).fill_nan(None)
    text = pl.col(column).cast(pl.String, strict=False).str.strip_chars().str.to_lowercase()
    text = text.replace({"true": "1", "false": "0"})
    return pl.when(text != "").then(text.cast(pl.Float32, strict=False).fill_null(NO_LABEL).fill_nan(None))


def position(column: str, dtype: pl.DataType) -> pl.Expr:
    """Return a position as int64: null if unknown, `NO_POSITION` for a value that is no whole number."""
    known = pl.col(column).is_not_null()
    if dtype.is_float():
        known = known & pl.col(column).is_not_nan()
    elif not dtype.is_numeric():
        known = known & (pl.col(column).cast(pl.String, strict=False).str.strip_chars() != "")
    number = pl.col(column).cast(pl.String, strict=False).str.strip_chars().cast(pl.Float64, strict=False)
    whole = (number == number.round()) & (number.abs() < 2**53)
    return pl.when(whole.fill_null(False)).then(number.cast(pl.Int64, strict=False)).when(known).then(NO_POSITION)


def merge_floats(events: pl.DataFrame, place: str) -> pl.DataFrame:
    """Write ids that a tool made floats as integers again: `1` for `1.0`. See `ids.without_float_ends`."""
    for name in ("user_id", "item_id", "action", "slate_id"):
        if name not in events.columns:
            continue
        distinct = events[name].unique().drop_nulls()
        text = distinct.cast(pl.String)
        changed = ids.without_float_ends(text, name, place)
        if changed is not None:
            events = events.with_columns(pl.col(name).replace_strict(distinct, changed.cast(events[name].dtype)))
    return events


def fault_number(events: pl.DataFrame, tables: TablesConfig) -> pl.Expr:
    """Return for each row the place of its first fault in `REMEDIES`, counted from 1, or 0 for a usable row."""
    time = pl.col("timestamp")
    bad_time = pl.lit(False) if tables.time_unit == "row" else time.is_null() | ~time.is_between(0, LATEST_TIME)
    tests = {
        NO_USER: pl.col("user_id").is_null(),
        NO_ITEM: pl.col("item_id").is_null(),
        LONG_USER: too_long(events, "user_id"),
        LONG_ITEM: too_long(events, "item_id"),
        BAD_TIME: bad_time,
        LONG_ACTION: too_long(events, "action"),
        BAD_LABEL: pl.any_horizontal(
            pl.lit(False),
            *(~pl.col(c).is_in([0.0, 1.0]).fill_null(True) for c in events.columns if c.startswith(LABEL)),
        ),
    }
    result = pl.lit(0, pl.UInt8)
    for k, reason in reversed(list(enumerate(REMEDIES, 1))):
        result = pl.when(tests[reason]).then(pl.lit(k, pl.UInt8)).otherwise(result)
    return result


def too_long(events: pl.DataFrame, name: str) -> pl.Expr:
    """Return whether an id has more characters than the server accepts."""
    if name not in events.columns:
        return pl.lit(False)
    distinct = events[name].unique().drop_nulls()
    long = distinct.filter(distinct.cast(pl.String).str.len_chars() > MAX_ID)
    return pl.col(name).is_in(long.implode()).fill_null(False) if len(long) else pl.lit(False)


def describe(sources: Sequence[Source], located: Sequence[dict[str, str]], row: int, reason: str) -> str:
    """Return file, line or row, column and value of a fault. row: number of the row in all sources together."""
    for source, own in zip(sources, located):
        size = int(source.frame.select(pl.len()).collect().item())
        if row < size:
            values = source.frame.select(own.values()).slice(row, 1).collect()
            names = [name for name in own if name.startswith(REMEDIES[reason][0])]
            texts = {own[name]: shown(values[own[name]]) for name in names}
            column = next((column for column, text in texts.items() if text.strip("'") not in LABELS), own[names[0]])
            return f"{source.place}{line_of(source, row)}, column {column}: {texts[column]}"
        row -= size
    raise AssertionError("the row is in one of the sources")


def line_of(source: Source, row: int) -> str:
    """Return the line of a row in a CSV file, or its number, counted from 1, in another file."""
    line = None
    if source.file and source.file.separator:
        line = faults.line_of_row(source.file.path, source.file.separator, row)
    return f", row {row + 1}" if line is None else f", line {line}"


def shown(cell: pl.Series) -> str:
    """Return a value of a table (1,) for a message."""
    if cell.null_count():
        return NO_VALUE
    if cell.dtype.is_temporal():  # Python has no dates after the year 9999
        return f"{cell.to_physical()[0]} of the type {cell.dtype}"
    text = str(cell.cast(pl.String, strict=False)[0])
    text = repr(text) if cell.dtype == pl.String else " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}... ({cell.cast(pl.String).str.len_chars()[0]} characters)"
