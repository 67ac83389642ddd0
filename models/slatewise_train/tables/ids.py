"""Read ids of every type as text, and find ids that a tool made floats.

Called by: `events.py`, `items.py`. Calls: polars.
"""

from __future__ import annotations

import polars as pl

EXACT = 2**53  # from here on, neighbouring integers are one float
FLOAT = r"^-?(0|[1-9][0-9]*)\.0+$"
WHOLE = r"^-?(0|[1-9][0-9]*)$"
FLOAT_END = r"\.0+$"
ROUNDED = r"^-?[0-9](\.[0-9]+)?[eE]\+?[0-9]+$"
NOT_AN_ID = (pl.List, pl.Array, pl.Struct, pl.Duration, pl.Time, pl.Object)


def as_text(name: str, dtype: pl.DataType, place: str, strip: bool) -> pl.Expr:
    """Return a column of ids as text: integers as decimals, whole floats with the end `.0`, an empty text as null.

    strip: remove white space around the ids, which CSV files have after a separator. Raises ValueError for a type that
    has no ids.
    """
    if isinstance(dtype, NOT_AN_ID) or dtype == getattr(pl, "Map", pl.Object):
        raise ValueError(f"{place}: column {name} has the type {dtype}; write its values as text or integers")
    column = pl.col(name)
    if dtype.is_float():
        number = column.cast(pl.Float64)
        whole = number.is_finite() & (number.round() == number) & (number.abs() <= EXACT)
        integer = pl.concat_str(number.cast(pl.Int64, strict=False).cast(pl.String), pl.lit(".0"))
        text = pl.when(whole).then(integer).otherwise(pl.when(number.is_not_nan()).then(number.cast(pl.String)))
    else:
        text = column.cast(pl.String)
        text = text.str.strip_chars() if strip else text
    return pl.when(text != "").then(text)


def joined(own: pl.Series, other: pl.Series) -> pl.Series | None:
    """Return distinct ids of one table as the other table writes them, or None if they need no change.

    It removes the end `.0` of an id that the other table has only without it. Both columns hold text.
    """
    floats = own.str.contains(FLOAT).fill_null(False)
    if not floats.any():
        return None
    plain = own.str.replace(FLOAT_END, "")
    strange = floats & plain.is_in(other.implode()) & ~own.is_in(other.implode()) & ~plain.is_in(own.implode())
    if not strange.any():
        return None
    pair = pl.DataFrame({"own": own, "plain": plain, "strange": strange})
    return pair.select(pl.when("strange").then("plain").otherwise("own")).to_series()


def without_float_ends(ids: pl.Series, name: str, place: str) -> pl.Series | None:
    """Return the distinct ids of a column as they should be, or None if they need no change.

    A tool that keeps integers as floats writes 1 as 1.0. If all ids are such numbers, the end `.0` is removed. Raises
    ValueError if the column has both `1` and `1.0` among other text, or numbers with lost digits.
    """
    found = ids.drop_nulls()
    floats = found.str.contains(FLOAT)
    rounded = found.str.contains(ROUNDED)
    if not (floats.any() or rounded.any()):
        return None
    numbers = floats | rounded | found.str.contains(WHOLE)
    if numbers.all():
        large = found.filter(floats).str.replace(FLOAT_END, "").cast(pl.Float64).abs() > EXACT
        lost = [*found.filter(rounded).head(1), *found.filter(floats).filter(large).head(1)]
        if lost:
            raise ValueError(
                f"{place}: {name} {lost[0]!r} is a number with lost digits; write the column as text or integers"
            )
        return ids.str.replace(FLOAT_END, "")
    plain = found.filter(floats).str.replace(FLOAT_END, "")
    if len(both := plain.filter(plain.is_in(found.implode()))):
        raise ValueError(
            f"{place}: {name} has both {both[0]!r} and {both[0] + '.0'!r}; write the ids of one item or user alike"
        )
    return None
