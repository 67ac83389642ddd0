"""The two forms of a table of requests, and how a part of it is ranked.

    long form: a row per user and candidate    user, item_id, features and fields    --> score, rank
    wide form: a row per request               user, item_ids (lists), history_*     --> ranked_* (lists)

Called by: `batch.py`; `rank_part` runs in the workers. Calls: polars, `client/frames.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from slatewise.client.errors import Invalid
from slatewise.client.frames import groups
from slatewise.client.libraries import library
from slatewise.client.values import ids
from slatewise.commands.source import Source
from slatewise.schemas import LAST_TIME

ROW = "__row"  # position in the table, in the parts
HISTORY = ("item_ids", "actions", "timestamps")
FEATURES = "features."  # prefix of the list columns of features, in the wide form
MAGIC = b"PAR1"  # begin of a Parquet file
RANKED = ("ranked_item_ids", "ranked_scores", "ranked_index")


def read_parquet(path: Path) -> Any:
    """Read a table. Raises ValueError for a file of another kind, and polars' errors."""
    with path.open("rb") as file:
        begin = file.read(len(MAGIC))
    if begin != MAGIC:
        kind = "CSV" if path.suffix.lower() in (".csv", ".tsv") else "no Parquet"
        raise ValueError(f"{path} is {kind}; batch reads Parquet, which keeps the types of ids and times")
    return library("polars", "`slatewise batch`").read_parquet(path)


def read_histories(path: Path) -> Any:
    """Read and check the events of users. Raises ValueError with the file, the column and the user of a wrong value."""
    polars = library("polars", "`slatewise batch`")
    frame = read_parquet(path)
    if missing := [name for name in ("user", "item_id") if name not in frame.columns]:
        raise ValueError(f"{path} lacks the column {missing[0]}; it has {', '.join(frame.columns) or 'none'}")
    wrong = {name: frame[name].is_null() for name in ("user", "item_id")}
    reasons = {name: "an id is missing" for name in wrong}
    if "timestamp" in frame.columns and not frame["timestamp"].dtype.is_temporal():
        times = frame["timestamp"]
        if times.dtype.is_numeric():
            wrong["timestamp"] = ~times.cast(polars.Float64).is_between(0, LAST_TIME).fill_null(True)
            reasons["timestamp"] = f"unix seconds are wanted, from 0 to {LAST_TIME}"
        else:
            wrong["timestamp"] = times.is_not_null()
            reasons["timestamp"] = f"unix seconds or a type of time are wanted, not {times.dtype}"
    for name, rows in wrong.items():
        if rows.any():
            user, value = frame.row(int(rows.arg_true()[0]), named=True)["user"], frame[name].filter(rows)[0]
            raise ValueError(f"{path}: column {name}, user {user!r}: {reasons[name]}; found {str(value)[:40]!r}")
    return frame


class Table:
    """A table of requests, in slices of whole requests. Raises Invalid for a table of neither form.

    parts: a list of row positions by part; requests: their numbers of requests.
    """

    def __init__(self, frame: Any, histories: Any, requests_per_part: int) -> None:
        self.frame = frame
        self.histories = histories
        self.wide = "item_ids" in frame.columns
        if not self.wide and not {"user", "item_id"} <= {*frame.columns}:
            detail = "needs the columns user and item_id (a row per candidate), or item_ids (a row per request)"
            raise Invalid.at("", f"the table {detail}; it has {', '.join(frame.columns) or 'no column'}")
        added = RANKED if self.wide else ("score", "rank")
        if taken := [name for name in (*added, ROW) if name in frame.columns]:
            raise Invalid.at("", f"the table has the column {taken[0]} already; rename or drop it first")
        if self.wide and histories is not None:
            raise Invalid.at("", "histories are columns of the wide form: history_item_ids, history_actions, ...")
        if self.wide:
            rows = np.arange(len(frame))
            slates = [rows[k : k + 1] for k in range(len(frame))]
        else:
            slates = [rows for _, rows in groups(ids(frame["user"], "/user"))]
        slices = [slates[k : k + requests_per_part] for k in range(0, len(slates), requests_per_part)]
        self.requests = [len(part) for part in slices] or [0]
        self.rows = [np.sort(np.concatenate(part)) for part in slices] or [np.zeros(0, np.int64)]

    def part(self, k: int) -> tuple[Any, Any]:
        """Return the rows of a part, with their positions, and the events of its users."""
        polars = library("polars", "`slatewise batch`")
        rows = self.rows[k]
        frame = self.frame[rows].with_columns(polars.Series(ROW, rows, dtype=polars.Int64))
        if self.histories is None:
            return frame, None
        users = frame["user"].cast(polars.String).unique().implode()
        return frame, self.histories.filter(polars.col("user").cast(polars.String).is_in(users))

    def join(self, frames: list[Any]) -> Any:
        """Return the ranked parts as one table, in the order of its rows."""
        return library("polars", "`slatewise batch`").concat(frames).sort(ROW).drop(ROW)


def rank_part(source: Source, part: tuple[Any, Any], members: dict[str, Any]) -> Any:
    """Rank the requests of one part, and return its rows with the added columns. Raises SlatewiseError.

    No cheaper answer is accepted unless `members` says so.
    """
    frame, histories = part
    if "item_ids" in frame.columns:
        return rank_wide(source, frame, {"allow_degraded": False} | members)
    ranked = source.rank_many(frame.drop(ROW), histories=histories, concurrency=1, **members)
    return ranked.with_columns(frame[ROW])


def rank_wide(source: Source, frame: Any, members: dict[str, Any]) -> Any:
    polars = library("polars", "`slatewise batch`")
    rankings = [source.rerank(**request_of(row), **members) for row in in_seconds(frame).to_dicts()]
    columns = (
        ([ranking.item_ids for ranking in rankings], polars.String),
        ([ranking.scores for ranking in rankings], polars.Float64),
        ([ranking.index for ranking in rankings], polars.Int64),
    )
    return frame.with_columns(
        polars.Series(name, values, dtype=polars.List(kind))
        for name, (values, kind) in zip(RANKED, columns, strict=True)
    )


def in_seconds(frame: Any) -> Any:
    """Return the frame with the times of histories as unix seconds."""
    polars = library("polars", "`slatewise batch`")
    name = "history_timestamps"
    if name in frame.columns and str(frame[name].dtype.inner.base_type()) == "Datetime":
        return frame.with_columns(polars.col(name).list.eval(polars.element().dt.epoch("us") / 1e6))
    return frame


def request_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return the members of the request in one row of the wide form. Raises Invalid for an unknown column."""
    candidates: dict[str, Any] = {"item_ids": row["item_ids"]}
    history = {}
    for name, value in row.items():
        if name.startswith(FEATURES) and value is not None:
            candidates.setdefault("features", {})[name.removeprefix(FEATURES)] = value
        elif name.startswith("history_") and name.removeprefix("history_") in HISTORY:
            history[name.removeprefix("history_")] = value
    found = {"user": row.get("user"), "candidates": candidates}
    return found | ({"history": history} if history.get("item_ids") is not None else {})
