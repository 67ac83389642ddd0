"""Check the values of a TOML's table against the fields of a dataclass: names, types, ranges.

A field declares its range with `number`, its allowed values with `choice`, or a time with `moment`. The checks run in
`from_table` alone, so that a value which is refused in a TOML may still be set by code.

Called by: `config.py`, `search_space.py`, `tables/`, and the configs of `rankers/`. Calls: no module of this package.
"""

from __future__ import annotations

import difflib
import json
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from datetime import UTC, date, datetime, time
from typing import Any, TypeVar

T = TypeVar("T")

LATEST_TIME = 99_999_999_999.0  # unix seconds: the latest time that the server accepts
SHOWN = 60  # characters of a wrong value that a message repeats
WORDS = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false"}


def number(default: Any = MISSING, /, *, least: float, most: float) -> Any:
    """Declare a dataclass field that must lie in a range, both ends included."""
    return field(default=default, metadata={"least": least, "most": most})


def choice(default: Any, /, *allowed: Any) -> Any:
    """Declare a dataclass field that must have one of the allowed values."""
    return field(default=default, metadata={"allowed": allowed})


def moment(default: float, /) -> Any:
    """Declare a float field in unix seconds. A TOML may write it as a number, or as a date or time without quotes."""
    return field(default=default, metadata={"least": 0.0, "most": LATEST_TIME, "moment": True})


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the most similar known name, then all of them."""
    names = sorted(known)
    similar = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"did you mean {similar[0]}? " if similar else ""
    return f"{hint}known: {', '.join(names)}"


def as_toml(value: Any) -> str:
    """Return a value as the TOML has it, shortened to one line."""
    if isinstance(value, datetime | date | time):
        text = value.isoformat()
    elif isinstance(value, float):
        text = repr(value)
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def seconds_of(value: date) -> float:
    """Return the unix seconds of a TOML's date or time. Without a zone it is UTC."""
    moment = value if isinstance(value, datetime) else datetime.combine(value, time())
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def from_table(kind: type[T], table: Any, where: str, /, **given: Any) -> T:
    """Build a dataclass from a table of the TOML and other values. Raises ValueError as `checked_table` does."""
    return kind(**given, **checked_table(kind, table, where, given.keys()))


def checked_table(kind: type, table: Any, where: str, given: Collection[str]) -> dict[str, Any]:
    """Return the values of a table as the types of a dataclass's fields, of which `given` do not come from the table.

    Raises ValueError for unknown or missing names, and for values of a wrong type or outside their range.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} = {as_toml(table)}: must be a table [{where}]")
    declared = {f.name: f for f in fields(kind) if f.name not in given}
    for name in table:
        if name not in declared:
            raise ValueError(f"[{where}] has unknown {name}; {nearest(name, declared)}")
    required = {name for name, f in declared.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - table.keys()):
        raise ValueError(f"[{where}] lacks {', '.join(missing)}; known: {', '.join(sorted(declared))}")
    hints = typing.get_type_hints(kind)
    return {
        name: checked_value(value, hints[name], declared[name], f"[{where}] {name}") for name, value in table.items()
    }


def checked_value(value: Any, hint: Any, declared: Field[Any], where: str) -> Any:
    """Return a value of the TOML as the type of its field. Raises ValueError for another type or range."""
    allowed = declared.metadata.get("allowed")
    if allowed is not None:
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ValueError(f"{where} = {as_toml(value)}: must be one of {', '.join(map(as_toml, allowed))}")
        return value
    if declared.metadata.get("moment") and isinstance(value, date):
        value = seconds_of(value)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):  # `T | None`: TOML has no null
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise ValueError(f'{where} = {as_toml(value)}: must be a list of text, for example ["a", "b"]')
        return tuple(value)
    accepted = (int, float) if hint is float else (hint,)
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, accepted):
        raise ValueError(f"{where} = {as_toml(value)}: must be {wanted(hint, declared)}")
    least = declared.metadata.get("least", -math.inf)
    most = declared.metadata.get("most", math.inf)
    if hint in (int, float) and not least <= value <= most:  # false for nan
        raise ValueError(f"{where} = {as_toml(value)}: must be {wanted(hint, declared)}")
    return float(value) if hint is float else value


def wanted(hint: Any, declared: Field[Any]) -> str:
    """Return the words for a type with the range of its field."""
    words = WORDS.get(hint, str(hint))
    if "most" in declared.metadata:
        words += f" from {declared.metadata['least']:,} to {declared.metadata['most']:,}".replace(",", "_")
    if declared.metadata.get("moment"):
        words += " (unix seconds), or a date without quotes such as 2026-01-31"
    return words
