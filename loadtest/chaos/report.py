"""The rows of the report, as the modules of this folder print them.

Called by: the other files of this folder. Calls: `loadtest/markdown.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from loadtest.markdown import table

TITLES = ("test", "criterion", "number", "result")
RESULT = re.compile(r"\W*(pass|passed|ok|fail|failed)\W*", re.IGNORECASE)
NAME = re.compile(r"\W*(R\d+)\b")
ITEM = re.compile(r"- \**(pass|fail)\**: (.+)", re.IGNORECASE)
RANGE = re.compile(r"\bR(\d+)(?:(?: to |-| - )R?(\d+))?\b")


class Row(NamedTuple):
    """One criterion of a test, with what was measured."""

    test: str  # "R29"
    criterion: str
    number: str
    passed: bool


def as_table(rows: Iterable[Row]) -> str:
    return table(TITLES, [(*row[:3], "pass" if row.passed else "FAIL") for row in rows])


def conclude(rows: list[Row], notes: str = "") -> int:
    """Print the table. Return the exit code: 0 if every row passes."""
    print(as_table(rows) + (f"\n\n{notes}" if notes else ""), flush=True)
    return 0 if rows and all(row.passed for row in rows) else 1


def rows_in(markdown: str) -> list[Row]:
    """The rows of a module's report: lines of tables that begin with the number of a test and end with its result, and
    items such as `- pass: no request failed` below a heading with the number of a test.
    """
    rows = []
    test = ""
    for line in markdown.splitlines():
        if line.startswith("#"):
            found = numbers_in(line)
            test = found[0] if found else ""
            continue
        item = ITEM.fullmatch(line)
        if item and test:
            rows.append(Row(test, item[2], "", item[1].lower() == "pass"))
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        name = NAME.match(cells[0])
        result = RESULT.fullmatch(cells[-1])
        if name and result and len(cells) > 2:
            passed = not result[1].lower().startswith("fail")
            rows.append(Row(name[1], cells[1], "; ".join(cells[2:-1]), passed))
    return rows


def numbers_in(text: str) -> list[str]:
    """The numbers of tests in a text, each once; "R5 to R9" and "R5-R9" are five."""
    found: dict[str, None] = {}
    for first, last in RANGE.findall(text):
        for k in range(int(first), int(last or first) + 1):
            found[f"R{k}"] = None
    return list(found)
