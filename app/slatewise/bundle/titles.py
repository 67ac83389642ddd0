"""Titles and fields of items for people to read, from a bundle's display.json; and the search for an item.

The model reads none of it. A bundle without the file has no titles, and its items are found by id alone. Columns are
kept: the distinct values and, for each row of the item table, the number of its value.

Called by: `loader.py`, which loads it; `ranking/validation.py`, `http/rank.py` and `http/items.py`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ITEM, Int64

MOST_BYTES = 64 * 2**20  # of display.json: titles of about a million items
BLOCK = 2**18  # characters that a search reads before it lets other requests run
SPACE = re.compile(r"[ \t\n\r]*")
COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")

Value: TypeAlias = str | list[str] | None


@dataclass(frozen=True)
class Titles:
    """What is shown of each item."""

    items: Mapping[str, int]  # id -> row, in the order of the rows, which start at FIRST_ITEM
    values: dict[str, list[Value]]  # field -> its distinct values; the first is `None`
    codes: dict[str, NDArray[np.int32]]  # field -> (rows,) positions in `values`

    @property
    def names(self) -> list[str]:
        """The fields, `title` first."""
        return sorted(self.values, key=lambda name: name != "title")

    def columns(self, names: Sequence[str], ids: Sequence[str]) -> dict[str, list[Value]]:
        """Return the value of each field for each id, `None` if it is not known. `names` are among `self.names`."""
        rows = [self.items.get(item, UNKNOWN_ITEM) for item in ids]
        return {name: list(map(self.values[name].__getitem__, self.codes[name][rows].tolist())) for name in names}

    @cached_property
    def ids(self) -> list[str]:
        return list(self.items)

    @cached_property
    def search_text(self) -> tuple[str, Int64]:
        """One line "id<tab>title" for each item, folded, and the position at which each line begins."""
        titles: list[Value] = [None] * (len(self.items) + FIRST_ITEM)
        if "title" in self.values:
            values = self.values["title"]
            titles = [values[code] for code in self.codes["title"].tolist()]
        lines = [f"{folded(item)}\t{folded(str(titles[row] or ''))}" for item, row in self.items.items()]
        lengths = np.fromiter(map(len, lines), np.int64, len(lines))
        return "\n" + "\n".join(lines) + "\n", np.cumsum(lengths + 1) - lengths

    def search(self, query: str, limit: int) -> Iterator[list[str] | None]:
        """Yield `None` after each block of text that was read, and at the end the ids of at most `limit` items.

        The item with this id comes first, then those whose id or title begins with the query, then those that contain
        it, each in the order of the catalogue.
        """
        sought = folded(query)
        if not sought:
            yield self.ids[:limit]
            return
        text, starts = self.search_text
        found: dict[str, None] = {query: None} if query in self.items else {}
        for pattern in ("\n" + sought, "\t" + sought, sought):
            begin = 0
            while begin < len(text) and len(found) < limit:
                end = begin + BLOCK
                while len(found) < limit and (at := text.find(pattern, begin, end + len(pattern) - 1)) >= 0:
                    line = int(np.searchsorted(starts, at + len(pattern) - 1, side="right")) - 1
                    found[self.ids[line]] = None
                    begin = max(at + len(pattern), text.find("\n", at + 1))
                begin = max(begin, end)
                yield None
        yield list(found)[:limit]


def folded(text: str) -> str:
    """Fold case, accents and line breaks, so that "amelie" finds "Amélie"."""
    plain = unicodedata.normalize("NFKD", " ".join(text.split()))
    return (
        "".join(c for c in plain if not unicodedata.combining(c)).casefold() if not plain.isascii() else plain.lower()
    )


def read_titles(content: bytes | None, items: Mapping[str, int]) -> Titles:
    """Read display.json: {id: {field: a text, a list of texts, or null}}. Ids that `items` lacks are passed over.

    No file (`None`), or one above MOST_BYTES, gives no fields. Raises ValueError for content of another shape.
    """
    values: dict[str, list[Value]] = {}
    numbers: dict[str, dict[Any, int]] = {}
    codes: dict[str, NDArray[np.int32]] = {}
    if content is None or len(content) > MOST_BYTES:
        return Titles(items, values, codes)
    for item, fields in members(content.decode()):
        if not isinstance(fields, dict):
            raise ValueError("display.json is of another shape")
        row = items.get(item)
        for name, value in fields.items():
            if name not in values:
                values[name], numbers[name] = [None], {None: 0}
                codes[name] = np.zeros(len(items) + FIRST_ITEM, np.int32)
            texts = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"display.json: field {name} holds a value that is no text")
            "".join(texts).encode()  # raises ValueError for half of a surrogate pair, which no answer can hold
            if row is not None:
                code = numbers[name].setdefault(tuple(value) if isinstance(value, list) else value, len(values[name]))
                if code == len(values[name]):
                    values[name].append(value)
                codes[name][row] = code
    return Titles(items, values, codes)


def members(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the members of a JSON object one by one, since all of a large catalogue at once take many times its bytes.

    Raises ValueError if the text is not one JSON object.
    """
    decode = json.JSONDecoder().raw_decode
    at = SPACE.match(text, 0).end()  # type: ignore[union-attr]  # the pattern matches everywhere
    expected = "{"
    while text[at : at + 1] == expected:
        at = SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
        if expected == "{" and text[at : at + 1] == "}":
            break
        name, at = decode(text, at)
        colon = COLON.match(text, at)
        if not isinstance(name, str) or colon is None:
            raise ValueError("not a JSON object")
        value, at = decode(text, colon.end())
        yield name, value
        at = SPACE.match(text, at).end()  # type: ignore[union-attr]
        expected = ","
    if text[at : at + 1] != "}" or text[at + 1 :].strip():
        raise ValueError("not a JSON object")
