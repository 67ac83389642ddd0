"""Rows of JSON to columns and back: foreign calls have an object for each item, and rankings have columns.

    [{"index":1,"score":0.5},{"index":0,"score":0.25}]  <--->  {"index": [1, 0], "score": [0.5, 0.25]}

A dictionary for each row takes twice as long (loadtest/server/calls.py).

Called by: the other files of this folder. Calls: nothing.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pydantic_core
from pydantic_core import from_json

STEPS = [b"," + b"\t" * k + b"\n" for k in range(8)]  # what `read_rows` puts between values; JSON ignores the space
NOT_STEPS = bytes(set(range(256)) - set(b"\t\n"))
ZERO = rb"\u0000"  # a zero in a text in JSON


def render_rows(columns: dict[str, list[Any]]) -> bytes:
    """Return a JSON array with one object for each row. The columns have equal lengths, of texts or of numbers.

    The column `a.b` is the member `b` of an object `a`.
    """
    n = len(next(iter(columns.values())))
    if not n:
        return b"[]"
    paths = [[pydantic_core.to_json(step) for step in name.split(".")] for name in columns]
    pieces = [elements(column) for column in columns.values()]
    # What follows an element: the end of its text, and of the objects inside the row.
    closings = [quote + b"}" * (len(path) - 1) for path, (_, quote) in zip(paths, pieces)]
    width = 2 * len(columns)
    parts = [b""] * (width * n)
    for k, (path, (column, quote)) in enumerate(zip(paths, pieces)):
        before = closings[k - 1] + b"," if k else closings[-1] + b"},{"
        parts[2 * k :: width] = [before + b":{".join(path) + b":" + quote] * n
        parts[2 * k + 1 :: width] = column
    rows = b"".join(parts)[len(closings[-1]) + 2 :]
    return b"[" + rows + closings[-1] + b"}]"


def elements(column: list[Any]) -> tuple[list[bytes], bytes]:
    """Return the JSON of each element of a column, and what to put before and behind each: a quote, or nothing.

    The whole column is rendered at once and then split.
    """
    text = pydantic_core.to_json(column)
    if isinstance(column[0], (int, float)):
        return text[1:-1].split(b","), b""
    if b'\\"' in text:  # a quote inside an element, or what looks like one
        return [pydantic_core.to_json(value) for value in column], b""
    # From inside the first element on, the next quote is the end of an element.
    return text[2:-2].split(b'","'), b'"'


def with_member(content: dict[str, Any], name: str, value: bytes) -> bytes:
    """Render an object, with one more member whose value is JSON already."""
    return b"{" + pydantic_core.to_json(name) + b":" + value + b"," + pydantic_core.to_json(content)[1:]


def read_rows(body: bytes, array: str, keys: str) -> tuple[dict[str, Any], list[str], list[list[Any]]]:
    """Read an object of JSON with an array of equal rows, such as programs write them, without an object for each row.

    array: the member with the rows. keys: the keys, `|` between them, whose values differ from row to row.

    Return the object, with the first row alone in the array; the keys as they follow each other in a row; and a column
    for each. Raises ValueError for any other body, right or wrong: if the rows differ in more than these values, if a
    value is an array or an object or has a bracket, and if there is one row.

    The text between two values is the same in every row. It is replaced by a comma and white space that numbers the
    places, and the rest is read as one flat array. Texts in JSON have no tabs and newlines, so no text reaches over
    such a place. So if the flat array has one value for each place, and the places are in order, then the body consists
    of these values with the text of the first row between them.
    """
    value = re.compile(rf'"({keys})"\s*:\s*("[^"\\]*"|[^\s"\[\]{{}},]+)'.encode())
    head = re.search(rf'"{array}"\s*:\s*\[\s*(?={{)'.encode(), body)
    first = value.search(body, head.end()) if head else None
    if head is None or first is None:
        raise ValueError("no row")
    start = head.end()
    opening = body[start : first.start(2)]  # of a row
    second = body.index(opening, first.end())
    row = body[start:second].rstrip()  # with the comma behind it
    found = list(value.finditer(row))
    width = len(found)
    closing = row[found[-1].end() : -1]
    between = [body[start + a.end() : start + b.start(2)] for a, b in pairwise(found)]
    between.append(body[start + found[-1].end() : second + len(opening)])
    end = body.index(closing + b"]", body.rindex(between[-1]) + len(between[-1]))
    text = body[start + len(opening) : end]
    if width > len(STEPS) or b"\\" in row or b"\n" in text or b"\t" in text:
        raise ValueError("not regular")
    for step, constant in zip(STEPS, between):
        text = text.replace(constant, step)
    before, behind = body[:start], body[end + len(closing) :]
    if ZERO in text or ZERO in before or ZERO in behind or b"[" in text or b"{" in text:
        raise ValueError("not regular, or a value that is no scalar")
    flat = from_json(b"[" + text + b"]", cache_strings="none")
    columns = [flat[k::width] for k in range(width)]
    steps = b"".join(STEPS[:width]).replace(b",", b"") * (len(flat) // width)
    if len(flat) % width or text.translate(None, NOT_STEPS) != steps[:-width]:
        raise ValueError("the rows differ")
    first_row = from_json(row[:-1], cache_strings="keys")
    rest = from_json(before + b'"' + ZERO + b'"' + behind, cache_strings="keys")
    # The zero shows that it is this member of the object that was read.
    if row[-1:] != b"," or not isinstance(first_row, dict) or not isinstance(rest, dict) or rest.get(array) != ["\0"]:
        raise ValueError("not an array of objects")
    return rest | {array: [first_row]}, [match[1].decode() for match in found], columns
