"""Renders columns as rows of JSON, since foreign answers have an object for each item and rankings have columns.

    {"index": [1, 0], "score": [0.5, 0.25]}  --->  [{"index":1,"score":0.5},{"index":0,"score":0.25}]

A dictionary for each row takes twice as long (loadtest/server/calls.py).

Called by: the other files of this folder. Calls: nothing.
"""

from __future__ import annotations

from typing import Any

import pydantic_core


def render_rows(columns: dict[str, list[Any]]) -> bytes:
    """Return a JSON array with one object for each row. The columns have equal lengths."""
    n = len(next(iter(columns.values())))
    if not n:
        return b"[]"
    width = 2 * len(columns)
    parts = [b""] * (width * n)
    for k, (name, column) in enumerate(columns.items()):
        opening = (b"," if k else b"},{") + pydantic_core.to_json(name) + b":"
        parts[2 * k :: width] = [opening] * n
        parts[2 * k + 1 :: width] = elements(column)
    return b"[" + b"".join(parts)[2:] + b"}]"


def elements(column: list[Any]) -> list[bytes]:
    """Return the JSON of each element of a column. The whole column is rendered at once and then split.

    Elements of bytes are JSON already.
    """
    if isinstance(column[0], bytes):
        return column
    text = pydantic_core.to_json(column)[1:-1]
    if isinstance(column[0], (int, float)):
        return text.split(b",")
    if b'\\"' in text:  # a quote inside an element, or what looks like one
        return [pydantic_core.to_json(value) for value in column]
    # From inside the first element on, each `","` is between two elements. JSON escapes the newlines inside texts.
    found = text[1:-1].replace(b'","', b'"\n"').split(b"\n")
    found[0] = b'"' + found[0]
    found[-1] += b'"'
    return found


def with_member(content: dict[str, Any], name: str, value: bytes) -> bytes:
    """Render an object, with one more member whose value is JSON already."""
    return b"{" + pydantic_core.to_json(name) + b":" + value + b"," + pydantic_core.to_json(content)[1:]
