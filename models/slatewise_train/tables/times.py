"""Read times of every kind as unix seconds.

Columns with a type of date or time need no setting. Numbers are seconds unless `time_unit` says otherwise; numbers that
look like another unit are refused. Text is a number or an ISO 8601 time; times without a zone are UTC.

Called by: `events.py`, `new_toml.py`, `column_kinds.py`. Calls: `config_values.py`.
"""

from __future__ import annotations

import polars as pl

from slatewise_train.config_values import LATEST_TIME

PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
# numbers above the bound are likely to be in that unit: as seconds they would be after the year 5000
LIKELY = ((1e17, "ns"), (1e14, "us"), (1e11, "ms"))
EARLIEST_LIKELY = 1e8  # numbers from here on may be seconds: 1973
DAY = r"(\d{4}-\d{2}-\d{2})"
CLOCK = r"[T ](\d{2}:\d{2})(?::(\d{2})(?:[.,](\d{1,9})\d*)?)?"
ZONE = r"(Z|UTC|[+-]\d{2}:?\d{2}|[+-]\d{2})"
ISO = rf"^\s*{DAY}(?:{CLOCK})?\s*{ZONE}?\s*$"


def typed_seconds(name: str, dtype: pl.DataType) -> pl.Expr | None:
    """Return the seconds of a column with a type of date or time, None for another type."""
    if dtype == pl.Date:
        return pl.col(name).cast(pl.Int64) * 86_400.0
    if isinstance(dtype, pl.Datetime):
        unit = dtype.time_unit or "us"
        return pl.col(name).dt.timestamp(unit) / PER_SECOND[unit]
    return None


def seconds(name: str, dtype: pl.DataType, unit: str | None, iso: bool) -> pl.Expr:
    """Return the unix seconds of a column; null for a value that is no time.

    unit: `time_unit` of the TOML; iso: the column is text with ISO 8601 times.
    """
    typed = typed_seconds(name, dtype)
    if typed is not None:
        return typed
    if iso:
        return iso_seconds(pl.col(name).cast(pl.String))
    number = pl.col(name).cast(pl.String).str.strip_chars() if not dtype.is_numeric() else pl.col(name)
    return number.cast(pl.Float64, strict=False) / PER_SECOND.get(unit or "s", 1.0)


def iso_seconds(text: pl.Expr) -> pl.Expr:
    """Return the unix seconds of ISO 8601 text: a date, or a date and a time, with or without a zone."""
    parts = text.str.extract_groups(ISO).struct
    day = parts.field("1").str.to_date("%Y-%m-%d", strict=False).cast(pl.Int64) * 86_400.0
    clock = parts.field("2")
    hours = clock.str.slice(0, 2).cast(pl.Int64, strict=False)
    minutes = clock.str.slice(3, 2).cast(pl.Int64, strict=False)
    second = parts.field("3").cast(pl.Int64, strict=False).fill_null(0)
    fraction = pl.concat_str(pl.lit("0."), parts.field("4")).cast(pl.Float64, strict=False).fill_null(0.0)
    valid = clock.is_null() | ((hours < 24) & (minutes < 60) & (second < 61))
    zone = parts.field("5").str.replace_all(":", "").str.replace(r"^(Z|UTC)$", "+0000")
    sign = pl.when(zone.str.starts_with("-")).then(-1).otherwise(1)
    shift = zone.str.slice(1, 2).cast(pl.Int64, strict=False) * 3600 + (
        zone.str.slice(3, 2).cast(pl.Int64, strict=False).fill_null(0) * 60
    )
    of_day = (hours * 3600 + minutes * 60).fill_null(0) + second + fraction - (sign * shift).fill_null(0)
    return pl.when(valid).then(day + of_day)


def is_iso(sample: pl.Series) -> bool:
    """Whether more values of a sample of text are ISO 8601 times than are numbers."""
    if sample.dtype not in (pl.String, pl.Categorical, pl.Enum, pl.Binary):
        return False
    text = sample.drop_nulls().cast(pl.String).to_frame("text")
    found = text.select(
        iso_seconds(pl.col("text")).count().alias("iso"),
        pl.col("text").str.strip_chars().cast(pl.Float64, strict=False).count().alias("number"),
    )
    return bool(found["iso"][0] > found["number"][0])


def other_unit(numbers: pl.Series, unit: str | None) -> str | None:
    """Return the unit that numbers of a sample look like, if it is not `unit`; "date" for dates such as 20260131."""
    known = numbers.drop_nulls().cast(pl.Float64)
    known = known.filter(known.is_finite())
    if not len(known):
        return None
    if is_date_number(known, 100) or is_date_number(known, 10_000) or is_date_number(known, 1_000_000):
        return "date"
    middle = float(known.median())  # type: ignore[arg-type]  # a number, since the sample is not empty
    if unit in (None, "s"):
        if is_date_number(known):
            return "date"
        return next((name for bound, name in LIKELY if middle > bound), None)
    in_seconds = middle / PER_SECOND.get(unit, 1.0)
    if in_seconds > LATEST_TIME:
        return next((name for bound, name in LIKELY if middle > bound), None)
    if in_seconds < EARLIEST_LIKELY and middle >= EARLIEST_LIKELY:
        return next((name for bound, name in LIKELY if middle > bound), "s")
    return None


def is_date_number(known: pl.Series, clock: int = 1) -> bool:
    """Whether all numbers are dates such as 20260131; as seconds they would lie within one week of August 1970.

    clock: 100, 10,000 or 1,000,000 if hours, minutes and seconds follow, as in 20260131123000.
    """
    number = known.cast(pl.Int64, strict=False).fill_null(0)
    whole = number // clock
    month = whole // 100 % 100
    day = whole % 100
    right = (whole >= 19_700_101) & (whole <= 21_001_231) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)
    parts = [(number // place % 100, 24 if place * 100 == clock else 60) for place in (1, 100, 10_000) if place < clock]
    for value, end in parts:
        right &= value < end
    return bool((right & (number == known)).all())
