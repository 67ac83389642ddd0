"""The result of a ranking call: rows to iterate over, and the columns of the answer.

Called by: `calls.py` and `local/ranker.py`. Calls: pandas or polars, only in the methods that are named after them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any, overload

from slatewise.client.errors import ServerFault
from slatewise.client.libraries import library

SHOWN = 20  # rows of a notebook's table


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate. rank: from 1, the best. index: position in the request. heads: probability by name."""

    item_id: str
    score: float | None
    rank: int
    index: int
    heads: dict[str, float]


@dataclass(frozen=True, repr=False)
class Ranking:
    """The ranked candidates: `len`, iteration and indexing give rows, best first; the columns have equal lengths.

    scores: `None` if no model scored the request (`exit` is "input_order"). degraded: reasons for a cheaper answer.
    fields: columns by name that `return_fields` asked for. response: the whole answer, with members that this version
    does not know.
    """

    item_ids: list[str]
    scores: list[float] | None
    index: list[int]
    ranks: list[int]
    heads: dict[str, list[float]]
    fields: dict[str, list[Any]]
    ranker: str
    version: int
    variant: str | None
    exit: str
    degraded: tuple[str, ...]
    history: dict[str, Any]
    timings_ms: dict[str, float]
    id: str | None
    response: dict[str, Any] = field(compare=False)

    @classmethod
    def from_response(cls, response: Any) -> Ranking:
        """Build the result from the members of an answer. Raises ServerFault if a needed member is missing."""
        try:
            results = response["results"]
            scores = results["scores"]
            return cls(
                item_ids=results["item_ids"],
                scores=scores,
                index=results["index"],
                ranks=ranks_of(scores, len(results["item_ids"])),
                heads=results.get("heads") or {},
                fields=results.get("fields") or {},
                ranker=response["ranker"],
                version=response["version"],
                variant=response.get("variant"),
                exit=response["exit"],
                degraded=tuple(response.get("degraded") or ()),
                history=response.get("history") or {},
                timings_ms=response.get("timings_ms") or {},
                id=response.get("id"),
                response=response,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ServerFault(f"the answer is not a ranking: {error!r}", slug="", status=200) from None

    @property
    def explanations(self) -> list[dict[str, Any]] | None:
        """What moved each result, if the request had `explain=True`."""
        return self.response.get("explanations")

    @property
    def pruned(self) -> dict[str, int] | None:
        """Numbers of candidates that the exits `point` and `set` scored, if these were not all."""
        return self.response.get("pruned")

    @property
    def explored(self) -> bool:
        """Whether the scores are drawn: the request had `explore`, and an exit that explores answered."""
        return bool(self.response.get("explored"))

    def __len__(self) -> int:
        return len(self.item_ids)

    def __iter__(self) -> Iterator[Row]:
        return (self.row(k) for k in range(len(self.item_ids)))

    @overload
    def __getitem__(self, k: int) -> Row: ...
    @overload
    def __getitem__(self, k: slice) -> list[Row]: ...
    def __getitem__(self, k: int | slice) -> Row | list[Row]:
        if isinstance(k, slice):
            return [self.row(each) for each in range(*k.indices(len(self)))]
        return self.row(range(len(self))[k])

    def row(self, k: int) -> Row:
        return Row(
            self.item_ids[k],
            None if self.scores is None else self.scores[k],
            self.ranks[k],
            self.index[k],
            {name: values[k] for name, values in self.heads.items()},
        )

    def columns(self) -> dict[str, list[Any]]:
        """Return the columns of a table. A head or a field whose name is taken gets a prefix."""
        none: list[Any] = [None] * len(self)
        table: dict[str, list[Any]] = {
            "item_id": self.item_ids,
            "score": none if self.scores is None else self.scores,
            "rank": self.ranks,
            "index": self.index,
        }
        for prefix, more in (("head_", self.heads), ("field_", self.fields)):
            table |= {prefix + name if name in table else name: values for name, values in more.items()}
        return table

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame, one row per candidate. Raises MissingLibrary."""
        frame = library("pandas", "to_pandas()").DataFrame(self.columns())
        return frame if self.scores is not None else frame.astype({"score": "float64"})

    def to_polars(self) -> Any:
        """Return a polars DataFrame, one row per candidate. Raises MissingLibrary."""
        polars = library("polars", "to_polars()")
        return polars.DataFrame(self.columns(), schema_overrides={"score": polars.Float64})

    def summary(self) -> str:
        """Return one line: size, ranker and exit, and the reasons for a degraded answer."""
        text = f"{len(self)} candidates by {self.ranker} version {self.version}, exit {self.exit}"
        if "total" in self.timings_ms:
            text += f", {self.timings_ms['total']:g} ms"
        return text + (f", degraded: {', '.join(self.degraded)}" if self.degraded else "")

    def __repr__(self) -> str:
        first = ", ".join(row.item_id if row.score is None else f"{row.item_id} {row.score:.3f}" for row in self[:5])
        return f"<Ranking of {self.summary()}: {first}{', ...' if len(self) > 5 else ''}>"

    def _repr_html_(self) -> str:
        """The table of a notebook. Every text is escaped: ids and titles come from users' data."""
        table = self.columns()
        head = "".join(f"<th>{escape(name)}</th>" for name in table)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(shown(values[k]))}</td>" for values in table.values()) + "</tr>"
            for k in range(min(len(self), SHOWN))
        )
        more = f"<p>and {len(self) - SHOWN} more</p>" if len(self) > SHOWN else ""
        return (
            f"<p>{escape(self.summary())}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}"
        )


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def ranks_of(scores: list[float] | None, n: int) -> list[int]:
    """Return the ranks from 1 by descending score. Ties, and candidates without scores, keep their order."""
    if scores is None:
        return list(range(1, n + 1))
    ranks = [0] * n
    for rank, k in enumerate(sorted(range(n), key=lambda k: -scores[k]), 1):
        ranks[k] = rank
    return ranks


def titles_of(response: Mapping[str, Any]) -> dict[str, str]:
    """Return titles by item id from the answer of /models/{ranker}/items, without the items that have no title."""
    titles = response["fields"].get("title") or []
    return {item: str(title) for item, title in zip(response["item_ids"], titles, strict=False) if title}
