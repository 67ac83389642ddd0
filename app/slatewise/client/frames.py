"""`rank_many`: splits a frame of users and candidates into slates, and joins the results to its rows.

    frame (one row per user and candidate) --> columns --> one request per user --> score, rank by row --> frame

A slate is the rows of one user, in their order. Columns are converted once, as a whole; a slate takes its rows of each.

Called by: `client.py`, `async_client.py` and `local/ranker.py`. Calls: numpy, `body.py`; the library of the frame.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from slatewise.client.body import history_columns, is_numeric
from slatewise.client.errors import Invalid
from slatewise.client.libraries import is_frame, library_of
from slatewise.client.results import Ranking
from slatewise.client.values import column, ids, numbers

ADDED = ("score", "rank")


class Slates:
    """The slates of one frame, and their results so far. Raises Invalid for a frame without the needed columns."""

    def __init__(self, frame: Any, user: str, item_id: str, histories: Any = None) -> None:
        self.frame: Any = frame if is_frame(frame) else rows_of(frame)
        columns = columns_of(self.frame)
        for name in (user, item_id):
            if name not in columns and (columns or is_frame(frame)):
                raise Invalid.at(f"/{name}", f"the frame has no such column; it has {', '.join(columns) or 'none'}")
        if taken := [name for name in ADDED if name in columns]:
            raise Invalid.at(f"/{taken[0]}", "the frame has this column already; rename or drop it first")
        self.users = ids(columns.pop(user, []), f"/{user}")
        self.items = taker(ids(columns.pop(item_id, []), f"/{item_id}"))
        numeric = {name for name, values in columns.items() if is_numeric_column(values)}
        self.features = {name: taker(numbers(columns[name], f"/{name}")) for name in columns if name in numeric}
        self.fields = {name: taker(column(columns[name], f"/{name}")) for name in columns if name not in numeric}
        self.histories = histories_by_user(histories, user)
        self.scores = np.full(len(self.users), np.nan)
        self.ranks = np.zeros(len(self.users), np.int64)

    def rank_all(self, rerank: Callable[..., Ranking], options: dict[str, Any], concurrency: int) -> None:
        """Rank every slate, with at most `concurrency` requests in flight. The first error ends it and is raised."""
        waiting = self.requests(options)
        lock = threading.Lock()
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                with lock:
                    found = next(waiting, None)
                if found is None:
                    return
                try:
                    self.put(found[0], rerank(**found[1]))
                except BaseException:
                    stop.set()
                    raise

        with ThreadPoolExecutor(check_concurrency(concurrency)) as pool:
            try:
                for done in [pool.submit(work) for _ in range(concurrency)]:
                    done.result()
            except BaseException:  # an interrupt too: no further request begins
                stop.set()
                raise

    async def rank_all_async(
        self, rerank: Callable[..., Awaitable[Ranking]], options: dict[str, Any], concurrency: int
    ) -> None:
        """Rank every slate, with at most `concurrency` requests in flight. The first error ends it and is raised."""
        waiting = self.requests(options)

        async def work() -> None:
            for rows, members in waiting:
                self.put(rows, await rerank(**members))

        tasks = [asyncio.ensure_future(work()) for _ in range(check_concurrency(concurrency))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def requests(self, options: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield the rows and the members of each request, by user in the order of their first rows.

        By default, a request accepts no cheaper answer: nobody reads `degraded` in a frame.
        """
        for user, rows in groups(self.users):
            candidates: dict[str, Any] = {"item_ids": self.items(rows)}
            if self.features:
                candidates["features"] = {name: take(rows) for name, take in self.features.items()}
            if self.fields:
                candidates["fields"] = {name: take(rows) for name, take in self.fields.items()}
            history = self.histories(user)
            found = {"user": user, "history": history, "candidates": candidates}
            yield rows, {"allow_degraded": False} | options | found

    def put(self, rows: Any, ranking: Ranking) -> None:
        placed = rows[ranking.index]
        self.ranks[placed] = ranking.ranks
        if ranking.scores is not None:
            self.scores[placed] = ranking.scores

    def result(self) -> Any:
        """Return the frame with the columns `score` and `rank` (from 1), in the order of its rows."""
        source = library_of(self.frame)
        if source == "pandas":
            return self.frame.assign(score=self.scores, rank=self.ranks)
        scores = [None if score != score else score for score in self.scores.tolist()]
        if source == "polars":
            polars = sys.modules["polars"]
            return self.frame.with_columns(
                polars.Series("score", scores, dtype=polars.Float64), polars.Series("rank", self.ranks)
            )
        return [
            dict(row) | {"score": score, "rank": rank}
            for row, score, rank in zip(self.frame, scores, self.ranks.tolist(), strict=True)
        ]


def check_concurrency(concurrency: int) -> int:
    if concurrency < 1:
        raise ValueError("concurrency must be 1 or more")
    return concurrency


def rows_of(frame: Any) -> list[Mapping[str, Any]]:
    """Return a list of mappings. Raises Invalid for anything else."""
    if isinstance(frame, (str, bytes, Mapping)) or not hasattr(frame, "__iter__"):
        raise Invalid.at("", f"must be a frame of pandas or polars or a list of mappings, not {type(frame).__name__}")
    rows = list(frame)
    for k, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise Invalid.at(f"/{k}", f"must be a mapping, not {type(row).__name__}")
    return rows


def columns_of(frame: Any) -> dict[str, Any]:
    """Return the columns of a frame, or of a list of mappings: a member that a row lacks is missing."""
    if not isinstance(frame, list):
        return {str(name): frame[name] for name in frame.columns}
    names = dict.fromkeys(name for row in frame for name in row)
    return {str(name): [row.get(name) for row in frame] for name in names}


def is_numeric_column(values: Any) -> bool:
    if hasattr(values, "dtype"):
        return is_numeric(values.dtype)
    kinds = set(map(type, values)) - {type(None)}
    return bool(kinds) and all(issubclass(kind, (int, float, np.number, np.bool_)) for kind in kinds)


def taker(values: list[Any]) -> Callable[[Any], list[Any]]:
    """Return a function from rows (an array of positions) to the values of these rows, as a list.

    numpy takes them from an array of objects, so the values stay as they are: integers and text are not mixed up.
    """
    array = np.empty(len(values), object)
    array[:] = values
    return lambda rows: list(array[rows])


def groups(users: list[str | int]) -> Iterator[tuple[str | int, Any]]:
    """Yield each user with its rows, ascending, in the order of the first rows. An integer equals its text."""
    if not users:
        return
    _, first, group = np.unique(np.array([*map(str, users)]), return_index=True, return_inverse=True)
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(np.bincount(group))
    starts = ends - np.bincount(group)
    for k in np.argsort(first, kind="stable"):
        yield users[first[k]], order[starts[k] : ends[k]]


def histories_by_user(histories: Any, user: str) -> Callable[[str | int], Any]:
    """Return a function from a user to the history of the request; `None` without one. Raises Invalid.

    histories: `None`, a mapping from users to histories in any form, or a frame of events, oldest first for each user.
    """
    if histories is None:
        return lambda _: None
    if isinstance(histories, Mapping):
        by_user = {str(name): history for name, history in histories.items()}
        return lambda name: by_user.get(str(name))
    if not is_frame(histories):
        raise Invalid.at("/histories", "must be a frame of events, or a mapping from users to histories")
    columns = columns_of(histories)
    if user not in columns:
        raise Invalid.at(f"/histories/{user}", f"the frame has no such column; it has {', '.join(columns)}")
    owners = ids(columns.pop(user), f"/histories/{user}")
    takers = {name: taker(values) for name, values in history_columns(columns).items()}
    rows_by_user = {str(name): rows for name, rows in groups(owners)}

    def find(name: str | int) -> dict[str, list[Any]] | None:
        rows = rows_by_user.get(str(name))
        return None if rows is None else {part: take(rows) for part, take in takers.items()}

    return find
