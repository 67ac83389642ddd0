"""Read the table of items: one row for each id, with numbers that are finite.

Called by: `data.py`, `check_data.py`, `new_toml.py`, `meta/refresh.py`, `demo/content.py`. Calls: `files.py`,
`columns.py`, `ids.py`.
"""

from __future__ import annotations

import polars as pl

from slatewise.bundle.features import VALUE_SEPARATOR, words_of
from slatewise.schemas import MAX_ID
from slatewise_train.config import DataConfig, TablesConfig
from slatewise_train.tables import columns, ids
from slatewise_train.tables.files import find_files, read_table

COUNTED = {"popularity"}  # numeric columns that are counted from the events if the items do not have them
LARGEST = 3e38  # just below the maximum of float32


def read_items(tables: TablesConfig) -> pl.DataFrame:
    """Read the table of items, with the id as text in the column `item_id`. Without one, return a table without rows.

    Raises OSError for a file that is not there, and ValueError for a table without ids.
    """
    if tables.items is None:
        return pl.DataFrame(schema={"item_id": pl.String})
    files = find_files(tables.items, tables.separator)
    items = read_table(tables.items, tables.separator)
    named = {name: column for name, column in tables.columns.items() if column in items.columns}
    located = columns.locate(items.columns, named, ["item_id"], tables.items)
    columns.require(located, ["item_id"], items.columns, tables.items)
    is_text = files[0].separator is not None
    text = ids.as_text(located["item_id"], items.schema[located["item_id"]], tables.items, is_text).alias("item_id")
    if is_text:  # an empty line of a CSV file is no row
        items = items.filter(~pl.all_horizontal(pl.all().is_null()))
    items = items.with_columns(text)
    return items if located["item_id"] == "item_id" else items.drop(located["item_id"])


def clean_items(items: pl.DataFrame, config: DataConfig) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return the usable items and the number of faults by reason.

    Only the first row of each id is used. Numeric columns are converted; a value that is no finite number is missing.
    Raises ValueError if a column that the TOML names is missing.
    """
    for key, names in (("categorical", config.categorical), ("text", config.text), ("numeric", config.numeric)):
        if missing := [name for name in names if name not in items.columns and name not in COUNTED]:
            raise ValueError(
                f"items: no column {', '.join(missing)}, which {key} in [items] names; {columns.listed(items.columns)}"
            )
    items = items.with_columns(ids.as_text("item_id", items.schema["item_id"], "items", strip=False).alias("item_id"))
    items = plain_ids(items)
    named = items.filter(pl.col("item_id").is_not_null())
    short = named.filter(pl.col("item_id").str.len_chars() <= MAX_ID)
    single = short.unique("item_id", keep="first", maintain_order=True)
    bad = {
        "items: missing item_id": len(items) - len(named),
        "items: item_id too long": len(named) - len(short),
        "items: duplicate item_id": len(short) - len(single),
    }
    for name in config.numeric:
        if name in single.columns:
            number = finite(single[name], name)
            bad[f"items: {name} is not a number"] = int((given(single[name]) & number.is_null()).sum())
            single = single.with_columns(number.alias(name))
    return single, {reason: count for reason, count in bad.items() if count}


def plain_ids(items: pl.DataFrame) -> pl.DataFrame:
    """Return the items with `1` in place of `1.0`, if a tool made their ids floats. See `ids.without_float_ends`."""
    changed = ids.without_float_ends(items["item_id"], "item_id", "items")
    return items if changed is None else items.with_columns(changed.alias("item_id"))


def join_ids(items: pl.DataFrame, events: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return clean items and events whose ids are written alike: `1`, if one table has `1` and the other `1.0`."""
    distinct = events["item_id"].unique().drop_nulls()
    text = distinct.cast(pl.String)
    if (changed := ids.joined(text, items["item_id"])) is not None:
        both = pl.col("item_id").replace_strict(distinct, changed.cast(distinct.dtype))
        return items, events.with_columns(both)
    if (changed := ids.joined(items["item_id"], text)) is not None:
        items = items.with_columns(changed.alias("item_id"))
    return items, events


def finite(column: pl.Series, name: str) -> pl.Series:
    """Return a numeric column as float32, null for values that are not finite numbers. Raises ValueError for a list."""
    if column.dtype.is_nested():
        raise ValueError(f"items: column {name} has the type {column.dtype}, so it cannot be numeric; see [items]")
    if column.dtype.is_temporal():
        raise ValueError(f"items: column {name} has the type {column.dtype}; write it as a number, such as a year")
    plain = column if column.dtype.is_numeric() or column.dtype == pl.Boolean else column.cast(pl.String, strict=False)
    plain = plain.str.strip_chars() if plain.dtype == pl.String else plain
    number = plain.cast(pl.Float64, strict=False)
    usable = number.is_finite() & (number.abs() <= LARGEST)
    return number.to_frame("n").select(pl.when(usable.alias("usable")).then("n")).to_series().cast(pl.Float32)


def given(column: pl.Series) -> pl.Series:
    """Whether a row has a value: not null, not empty text, not the NaN that pandas writes for a missing number."""
    present = column.is_not_null()
    if column.dtype.is_float():
        return present & column.is_not_nan()
    return present & (column.str.strip_chars() != "").fill_null(False) if column.dtype == pl.String else present


def word_lists(column: pl.Series) -> pl.Series:
    """Return the words of a text column as lists, in the order of the text. See `features.words_of`."""
    if column.dtype.is_nested():
        raise ValueError(f"items: column {column.name} has the type {column.dtype}; a text column has text")
    words = [words_of((text,)) for text in column.cast(pl.String)]
    return pl.Series(column.name, [list(cell) for cell in words], pl.List(pl.String))


def value_lists(column: pl.Series) -> pl.Series:
    """Return the values of a categorical column as lists of text, without empty ones.

    The column is a list column, or text with values separated by `|`, around which white space is removed.
    """
    if isinstance(column.dtype, (pl.List, pl.Array)):
        lists = column.cast(pl.List(pl.String))
    elif column.dtype.is_nested():
        raise ValueError(f"items: column {column.name} has the type {column.dtype}; write text, or lists of text")
    else:
        parts = pl.col("v").str.split(VALUE_SEPARATOR).list.eval(pl.element().str.strip_chars())
        lists = column.cast(pl.String).to_frame("v").select(parts).to_series()
    known = (pl.element() != "") & (pl.element().str.len_chars() <= MAX_ID)
    return lists.to_frame("v").select(pl.col("v").list.eval(pl.element().filter(known)).fill_null([])).to_series()


def values_of(column: pl.Series) -> list[list[str]]:
    """Return `value_lists` as Python lists, for the few items that a bundle shows."""
    result: list[list[str]] = value_lists(column).to_list()
    return result
