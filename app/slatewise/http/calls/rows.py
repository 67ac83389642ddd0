"""Renders columns as rows of JSON, since foreign answers have an object for each item and rankings have columns.

    {"index": [1, 0], "score": [0.5, 0.25]}  --->  [{"index":1,"score":0.5},{"index":0,"score":0.25}]

A dictionary for each row takes twice as long (loadtest/server/calls.py).

Called by: the other files of this folder. Calls: nothing.
"""

from __future__ import annotations

from typing import Any

import pydantic_core


def render_rows(columns: dict[str, list[Any]]) -> bytes:
    """Return a JSON array with one object for each row. The columns have equal lengths, of texts or of numbers.

    The column `a.b` is the member `b` of an object `a`.
    """
    n = len(next(iter(columns.values())))
    if not n:
        return b"[]"
    paths = [[pydantic_core.to_json(step) for step in name.split(".")] for name in columns]
    closings = [b"}" * (len(path) - 1) for path in paths]  # of the objects inside a row
    width = 2 * len(columns)
    parts = [b""] * (width * n)
    for k, column in enumerate(columns.values()):
        before = closings[k - 1] + b"," if k else closings[-1] + b"},{"
        parts[2 * k :: width] = [before + b":{".join(paths[k]) + b":"] * n
        parts[2 * k + 1 :: width] = elements(column)
    rows = b"".join(parts)[len(closings[-1]) + 2 :]
    return b"[" + rows + closings[-1] + b"}]"


def elements(column: list[Any]) -> list[bytes]:
    """Return the JSON of each element of a column. The whole column is rendered at once and then split."""
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
