"""Converts columns and scalars of every kind to plain JSON values.

Numpy arrays, series of pandas and polars, tensors, lists and generators become lists. NaN, NaT, NA and None become
null. Times become unix seconds; a time without a zone is UTC. Arrays and series are converted as a whole.

Called by: `body.py` and `frames.py`. Calls: the libraries that the values come from, through their methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

from slatewise.client.errors import Invalid
from slatewise.client.libraries import library, library_of

PLAIN = {str, int, float, bool, type(None)}
MISSING_NAMES = ("NAType", "NaTType")  # pandas.NA and pandas.NaT, which compare unlike numbers


def column(values: Any, pointer: str) -> list[Any]:
    """Return the values of a column. Raises Invalid for a text, a mapping, or an array of several dimensions.

    pointer: RFC 6901 pointer of the column, for the error.
    """
    if isinstance(values, (str, bytes, Mapping)):
        raise Invalid.at(pointer, f"must be a column (a list, an array or a series), not {type(values).__name__}")
    source = library_of(values)
    if source == "polars":
        return normal(from_polars(values, pointer))
    if source == "pandas":
        return normal(from_pandas(values))
    if source != "numpy" and hasattr(values, "__array__"):
        values = library("numpy", "an array").asarray(values)
    if hasattr(values, "dtype") and hasattr(values, "ndim"):
        return normal(from_numpy(values, pointer))
    try:
        return normal(list(values))
    except TypeError:
        detail = f"must be a column (a list, an array or a series), not {type(values).__name__}"
        raise Invalid.at(pointer, detail) from None


def from_numpy(array: Any, pointer: str) -> list[Any]:
    if array.ndim != 1:
        raise Invalid.at(pointer, f"has {array.ndim} dimensions; a column has one")
    kind = array.dtype.kind
    if kind == "M":
        return seconds_of_array(array)
    if kind in "mcSV":
        raise Invalid.at(pointer, f"has dtype {array.dtype}, which is neither numbers, text nor times")
    if kind == "f":
        missing = array != array
        if missing.any():
            array = array.astype("float64").astype(object)
            array[missing] = None
    listed: list[Any] = array.tolist()
    return listed


def seconds_of_array(array: Any) -> list[Any]:
    """Return unix seconds of a datetime64 array; null for NaT."""
    missing = array != array
    seconds = (array.astype("datetime64[us]").astype("int64") / 1e6).astype(object)
    seconds[missing] = None
    listed: list[Any] = seconds.tolist()
    return listed


def from_pandas(series: Any) -> list[Any]:
    if getattr(series.dtype, "kind", "") == "M":  # also with a time zone: the numpy values are UTC
        return seconds_of_array(series.to_numpy(dtype="datetime64[us]"))
    if library_of(series.dtype) == "numpy":
        return from_numpy(series.to_numpy(), "")
    values = series.astype(object)
    listed: list[Any] = values.where(series.notna(), None).tolist()
    return listed


def from_polars(series: Any, pointer: str) -> list[Any]:
    if not hasattr(series, "dtype"):
        raise Invalid.at(pointer, f"must be a column, not {type(series).__name__}; collect a lazy frame first")
    name = str(series.dtype.base_type())
    if name == "Datetime":
        series = series.dt.epoch("us") / 1e6
    elif name == "Date":
        series = series.dt.epoch("s")
    elif series.dtype.is_float():
        series = series.fill_nan(None)
    listed: list[Any] = series.to_list()
    return listed


def normal(values: list[Any]) -> list[Any]:
    """Convert the values that are not plain. A list of text and integers is returned unchanged, at the cost of a scan
    in C.
    """
    kinds = set(map(type, values))
    if kinds <= PLAIN and not (float in kinds and any(map(math.isnan, filter(is_float, values)))):
        return values
    return [scalar(value) for value in values]


def is_float(value: object) -> bool:
    return type(value) is float


def scalar(value: Any) -> Any:
    """Convert one value. Values of unknown types are returned unchanged."""
    kind = type(value)
    if kind in (str, int, bool) or value is None or kind.__name__ in MISSING_NAMES:
        return None if kind.__name__ in MISSING_NAMES else value
    if kind is float or isinstance(value, (Decimal, float)):
        return None if math.isnan(value) else float(value)
    if isinstance(value, (datetime, date)):
        return seconds_of_time(value)
    if library_of(value) == "numpy":
        if value.dtype.kind == "M":
            return seconds_of_array(value.reshape(1))[0]
        if getattr(value, "ndim", 0) == 1:  # the values of one item, for example its genres
            return from_numpy(value, "")
        return scalar(value.item())
    if isinstance(value, (list, tuple)):
        return normal(list(value))
    if isinstance(value, str):  # a subclass: an enumeration
        return str.__str__(value)
    return value


def seconds_of_time(value: date) -> float:
    """Return unix seconds. A time without a zone is UTC, whatever the zone of the machine; a date is its midnight."""
    if not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day, tzinfo=UTC)
    return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()


def ids(values: Any, pointer: str) -> list[str | int]:
    """Return a column of ids: text or integers. Raises Invalid at the first value that is neither."""
    listed = column(values, pointer)
    if not set(map(type, listed)) <= {str, int}:
        k = next(k for k, value in enumerate(listed) if type(value) not in (str, int))
        raise Invalid.at(f"{pointer}/{k}", refusal_of_id(listed[k]))
    return listed


def one_id(value: Any, pointer: str) -> str | int:
    """Return one id: a text or an integer. Raises Invalid."""
    plain = scalar(value)
    if type(plain) not in (str, int):
        raise Invalid.at(pointer, refusal_of_id(plain))
    identifier: str | int = plain
    return identifier


def refusal_of_id(value: Any) -> str:
    if value is None:
        return "a missing value is no id; drop the row first"
    if type(value) is float:
        return "a float is no id; convert the column to integers or text first, for example with .astype('int64')"
    return f"an id is a text or an integer, not {type(value).__name__}"


def numbers(values: Any, pointer: str) -> list[float | None]:
    """Return a column of numbers or nulls; true and false become 1 and 0. Raises Invalid for infinity."""
    listed = column(values, pointer)
    kinds = set(map(type, listed))
    if bool in kinds:
        listed = [float(value) if type(value) is bool else value for value in listed]
    if float in kinds and any(map(math.isinf, filter(is_float, listed))):
        k = next(k for k, value in enumerate(listed) if type(value) is float and math.isinf(value))
        raise Invalid.at(f"{pointer}/{k}", "must be finite; use None or NaN for a missing value")
    return listed
