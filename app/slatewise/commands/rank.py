"""`slatewise rank small:99 595 589`: ranks a few items for a user, and prints a table with their titles.

Called by: cli.py. Calls: `source.py`, which asks a server or loads a bundle.
"""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from collections.abc import Sequence

from slatewise.client.body import Members
from slatewise.client.errors import SlatewiseError
from slatewise.client.results import Ranking, shown
from slatewise.commands.source import add_source, open_source, options

WIDEST = 48  # columns of a title


def main(argv: Sequence[str]) -> None:
    """Raises SlatewiseError, ManifestError or ValueError."""
    parser = argparse.ArgumentParser(
        "slatewise rank", description="Rank items for a user by a running server, or by a bundle in this process."
    )
    parser.add_argument("user", metavar="USER", help="the user's id; - for a request without a user")
    parser.add_argument("items", metavar="ITEM", nargs="+", help="ids of the candidates, in first-stage order")
    parser.add_argument(
        "--history",
        metavar="ITEM[=ACTION],...",
        help="the user's events, oldest first, for example 318=love,500=like,337",
    )
    parser.add_argument("--exit", help="exit of the ranker: auto, dot, point or set")
    parser.add_argument("--top", type=int, metavar="N", help="print the best N only")
    parser.add_argument("--deadline-ms", type=float, metavar="MS", help="time limit of the server")
    parser.add_argument(
        "--explain", action="store_true", help="also print which events and neighbours moved the first results"
    )
    parser.add_argument("--json", action="store_true", help="print the whole answer as JSON")
    add_source(parser)
    arguments = parser.parse_args(argv)
    members: Members = {"candidates": arguments.items}
    if arguments.user != "-":
        members["user"] = arguments.user
    if arguments.history:
        members["history"] = events(arguments.history)
    if arguments.explain:
        members["explain"] = True
    more = {"exit": arguments.exit, "top_n": arguments.top, "deadline_ms": arguments.deadline_ms}
    with open_source(arguments) as source:
        ranking = source.rerank(**members, **options(arguments), **more)
        if arguments.json:
            print(json.dumps(ranking.response, ensure_ascii=False))
            return
        titles: dict[str, str] = {}
        try:
            titles = source.titles(ranking.ranker, [*ranking.item_ids, *movers(ranking)])
        except SlatewiseError as error:  # the ranking is worth printing without titles
            print(f"slatewise rank: no titles: {error}", file=sys.stderr)
    print(table(ranking, titles))
    print(ranking.summary())
    if note := unknown(ranking, len(arguments.items)):
        print(f"slatewise rank: {note}", file=sys.stderr)
    if arguments.explain:
        print("\n".join(reasons(ranking, arguments.items, titles)))


def unknown(ranking: Ranking, candidates: int) -> str:
    """Return a note about the candidates and events that the ranker does not know, or an empty text."""
    counts = (
        (len(ranking.response.get("unknown_candidates") or []), candidates, "candidates"),
        (ranking.history.get("unknown") or 0, ranking.history.get("used"), "events"),
    )
    parts = [f"{few} of {whole} {name}" for few, whole, name in counts if few]
    return f"{' and '.join(parts)} are unknown to {ranking.ranker}" if parts else ""


def movers(ranking: Ranking) -> list[str]:
    """Return the ids of the events and neighbours that explanations name."""
    effects = [each[kind] for each in ranking.explanations or [] for kind in ("events", "neighbours")]
    named = (item for one in effects for item in one["item_ids"])
    return list(dict.fromkeys(named))


def reasons(ranking: Ranking, items: Sequence[str], titles: dict[str, str]) -> list[str]:
    """Return a line for each explained result, and for each event and neighbour the change of its score."""
    if ranking.explanations is None:
        return ["no explanations: the server was too busy, or no model ranked the request"]
    lines = []
    for each in ranking.explanations:
        lines.append(f"{titles.get(items[each['index']], items[each['index']])}:")
        for kind in ("events", "neighbours"):
            effects = each[kind]
            for item, delta in zip(effects["item_ids"], effects["delta"], strict=True):
                lines.append(f"  {delta:+.4f}  {kind.removesuffix('s'):<9}  {titles.get(item, item)}")
    return lines


def events(text: str) -> list[tuple[str, str | None]]:
    """Return the rows of a history such as "318=love,500". An id that contains a comma or = cannot be given so."""
    pairs = [event.partition("=") for event in text.split(",") if event]
    return [(item, action or None) for item, _, action in pairs]


def table(ranking: Ranking, titles: dict[str, str]) -> str:
    """Return the ranking as lines of aligned columns; titles only if some are known."""
    names = ["rank", "item", *(["title"] if titles else []), "score", *ranking.heads]
    rows = [
        [str(row.rank), row.item_id]
        + ([cut(titles.get(row.item_id, ""))] if titles else [])
        + [shown(row.score)]
        + [shown(value) for value in row.heads.values()]
        for row in ranking
    ]
    widths = [max(map(width, column)) for column in zip(names, *rows, strict=True)]
    left = {1, 2} if titles else {1}  # text
    return "\n".join(
        "  ".join(pad(cell, widths[k], k in left) for k, cell in enumerate(row)).rstrip() for row in [names, *rows]
    )


def cut(title: str) -> str:
    title = " ".join(title.split())
    return title if len(title) <= WIDEST else title[: WIDEST - 3] + "..."


def width(text: str) -> int:
    """Return the columns that a text takes in a terminal: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def pad(cell: str, columns: int, left: bool) -> str:
    space = " " * (columns - width(cell))
    return cell + space if left else space + cell
