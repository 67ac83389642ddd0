"""Decide whether a column of the items is categorical, numeric, or of no use to a ranker, with the reason.

A categorical column describes an item only if other items share its values. A numeric column has an order. Addresses,
free text, codes and dates are neither.

Called by: `new_toml.py`, `check_data.py`. Calls: `tables/times.py`.
"""

from __future__ import annotations

import polars as pl

from slatewise_train.tables import times

MOST_VALUES = 5_000  # of a categorical column
FEW_NUMBERS = 20  # whole numbers with at most this many values are categorical
FEW_ACTIONS = 20  # different texts of a column of the events that may be the action
MOST_SHARE = 0.5  # of distinct values among all values: each is met twice on average
LONG_TEXT = 40  # characters: the mean of a column of descriptions
REPEATED = 0.2  # share of distinct values up to which long text is a name, such as the path of a category
MOSTLY = 0.9
CODES = ("id", "ids", "code", "ean", "upc", "gtin", "isbn", "sku", "asin", "zip", "zipcode", "phone", "barcode")
CURRENCY = r"[\s$€£¥,%]|^[A-Z]{3}\b|\b[A-Z]{3}$"
ADDRESS = r"(?i)^(https?:)?//|^www\.|\.(jpe?g|png|gif|webp|html?)$"


def kind_of(column: pl.Series, ids: pl.Series) -> tuple[str | None, str]:
    """Return "categorical", "numeric" or None for a column of the items, and the reason. ids: those of the items."""
    known = column.drop_nulls()
    if column.dtype.is_float():
        known = known.filter(known.is_not_nan())
    if not len(known):
        return None, "left out, since it is empty"
    if isinstance(known.dtype, (pl.List, pl.Array)):
        values = known.explode(empty_as_null=True).drop_nulls()
        if values.dtype.is_nested() or values.dtype == pl.Binary:
            return None, f"left out, since its lists have the type {values.dtype}"
        return kind_of_values(values.cast(pl.String), "lists", ids)
    if known.dtype.is_temporal():
        return None, f"left out, since it has the type {known.dtype}; a year or an age in days can be numeric"
    if known.dtype.is_nested() or known.dtype == pl.Binary:
        return None, f"left out, since it has the type {known.dtype}; write it as text or as a number"
    text = known.cast(pl.String).str.strip_chars()
    text = text.filter(text != "")
    if not len(text):
        return None, "left out, since it is empty"
    if text.n_unique() == 1 and len(text) == len(column):
        return None, "left out, since all items have one value"
    if known.dtype != pl.Boolean and not is_code(column.name):
        numbers = text.cast(pl.Float64, strict=False).drop_nulls()
        if len(numbers) >= MOSTLY * len(text):
            return kind_of_numbers(numbers, len(text) - len(numbers))
    return kind_of_text(text, ids)


def is_code(name: str) -> bool:
    """Whether the last word of a column's name says that its numbers are names."""
    return any(name.lower().endswith(code) and is_word(name, code) for code in CODES)


def is_word(name: str, word: str) -> bool:
    """Whether a name ends with a word: `brand_id`, `brandId` and `id`, but not `paid`."""
    start = name[: -len(word)]
    return not start or not start[-1].isalnum() or (name[-len(word)].isupper() and start[-1].islower())


def kind_of_numbers(numbers: pl.Series, others: int) -> tuple[str | None, str]:
    """Decide about a column of numbers. others: values that are no numbers, and are missing in training."""
    distinct = numbers.n_unique()
    whole = bool((numbers == numbers.round()).all())
    missing = f"; {others} values are no numbers, and missing" if others else ""
    if whole and distinct <= FEW_NUMBERS and distinct <= MOST_SHARE * len(numbers):
        return "categorical", f"whole numbers with {distinct} different values{missing}"
    if whole and distinct == len(numbers) > FEW_NUMBERS:
        return (
            None,
            f"left out, since each item has another whole number, as a code has; a quantity can be numeric{missing}",
        )
    return "numeric", f"numbers with {distinct} different values{missing}"


def kind_of_text(text: pl.Series, ids: pl.Series) -> tuple[str | None, str]:
    """Decide about a column of text without empty values."""
    example = shown(text)
    if share(text.str.contains(ADDRESS)) > MOST_SHARE:
        return None, f"left out, since it has addresses such as {example}"
    if times.is_iso(text):
        return None, f"left out, since it has dates such as {example}; a year or an age in days can be numeric"
    if share(text.str.contains(r"^[\[{].*[\]}]$")) > MOSTLY:
        return None, f"left out, since its text looks like lists, such as {example}; separate the values by |"
    plain = text.str.replace_all(CURRENCY, "")
    if share(plain.cast(pl.Float64, strict=False).is_not_null()) >= MOSTLY and not is_code(text.name):
        return None, f"left out, since it has numbers such as {example}; write them without other characters"
    split = text.str.split("|").explode(empty_as_null=True).str.strip_chars()
    split = split.filter(split != "")
    several = ", several of them separated by |" if len(split) > len(text) else ""
    kind, reason = kind_of_values(split, "text", ids)
    if kind is None and not several:
        for separator in (",", ";", "/", ">"):
            parts = text.str.split(separator).explode(empty_as_null=True).str.strip_chars()
            if len(parts) > 1.5 * len(text) and parts.n_unique() <= min(MOST_VALUES, REPEATED * len(parts)):
                return None, f"left out, since {separator} separates its values, as in {example}; separate them by |"
    return kind, reason + several if kind else reason


def kind_of_values(values: pl.Series, form: str, ids: pl.Series) -> tuple[str | None, str]:
    """Decide about the values of all items: are they few enough, and shared by items?"""
    count = values.n_unique()
    if not count:
        return None, "left out, since it is empty"
    if len(values) > FEW_NUMBERS and names_items(values, count, ids):
        return None, "left out, since it names other items"
    if (values.str.len_chars().mean() or 0) > LONG_TEXT and count > REPEATED * len(values):  # type: ignore[operator]
        return None, f"left out, since it has long text such as {shown(values)}"
    if count > MOST_VALUES or (count > MOST_SHARE * len(values) and len(values) > FEW_NUMBERS):
        return None, f"left out, since it has {count} different values among {len(values)}"
    return "categorical", f"{form} with {count} different values"


def names_items(values: pl.Series, count: int, ids: pl.Series) -> bool:
    """Whether most values are ids of items. Numbers are often ids by chance: they must name most of the items."""
    if share(values.is_in(ids.implode())) <= MOST_SHARE:
        return False
    return bool(values.cast(pl.Int64, strict=False).null_count()) or count > MOST_SHARE * ids.n_unique()


def unused(column: pl.Series) -> tuple[str, bool]:
    """Describe a column of the events that is not read, and tell whether it may be the action: few values of text."""
    known = column.drop_nulls()
    if known.dtype.is_nested() or known.dtype.is_temporal() or known.dtype == pl.Binary:
        return f"type {known.dtype}, not read", False
    text = known.cast(pl.String).str.strip_chars()
    text = text.filter(text != "")
    values = text.unique(maintain_order=True)
    numbers = bool(len(text)) and text.cast(pl.Float64, strict=False).null_count() == 0
    listed = ", ".join(printable(value) for value in values.head(3))
    more = ", ..." if len(values) > 3 else ""
    kind = "numbers" if numbers else "text"
    count = f"{len(values)} value{'s' * (len(values) != 1)}"
    return f"{kind} with {count} ({listed}{more}), not read", not numbers and 2 <= len(values) <= FEW_ACTIONS


def share(found: pl.Series) -> float:
    """Return the share of true values."""
    return float(found.sum()) / max(1, len(found))


def shown(values: pl.Series) -> str:
    """Return the first known value of a column, for a comment of one line."""
    known = values.drop_nulls().head(1)
    return printable(str(known.cast(pl.String, strict=False)[0])) if len(known) else "(none)"


def printable(text: str) -> str:
    """Return text for a comment: one line of at most 40 printable characters."""
    return "".join(c if c.isprintable() else " " for c in text)[:40]
