"""Read the events of a refresh, and find the users that have new ones.

The tables are scanned, and the rows of the chosen users alone are read into memory.

Called by: `refresh.py`. Calls: `config.py`, `tables/`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl

from slatewise_train.config import TablesConfig
from slatewise_train.tables.events import LABEL, PLAIN, scan_events
from slatewise_train.tables.files import TableFile, collect, kind_of
from slatewise_train.tables.history import history_rule, reason_to_ask

CLOCK_SKEW_S = 3_600.0  # the time of an event may be this far in the future


@dataclass(frozen=True)
class Events:
    """The events of a refresh: files, folders or patterns, the actions that make history, how to read the tables."""

    paths: Sequence[Path]
    history_actions: Sequence[str] = ()  # of the training; empty: not stated
    tables: TablesConfig = PLAIN

    @cached_property
    def scanned(self) -> tuple[pl.LazyFrame, list[TableFile]]:
        if self.tables.time_unit == "row":
            raise ValueError(
                f'{self.paths[0]}: a refresh needs times; [data] time_unit = "row" says that there are none'
            )
        return scan_events([str(path) for path in self.paths], self.tables)

    @property
    def table(self) -> pl.LazyFrame:
        """All rows of all files, with ids as text, in the types of the contract."""
        return self.scanned[0]

    @property
    def taken(self) -> pl.LazyFrame:
        """User, item and time of each row that makes history."""
        rule = history_rule(self.history_actions, self.table.collect_schema().names(), str(self.paths[0]))
        return self.table.filter(rule).select("user_id", "item_id", "timestamp")

    def check(self) -> None:
        """Raise ValueError if rows may only have been shown, and the bundle does not say which rows make history."""
        if self.history_actions:
            return
        names = self.table.collect_schema().names()
        telling = [name for name in names if name in ("action", "slate_id") or name.startswith(LABEL)]
        if not telling:
            return
        slate = [pl.when(pl.col("slate_id").is_not_null()).then(pl.lit("some"))] if "slate_id" in telling else []
        distinct = self.table.select(telling).with_columns(*(part.alias("slate_id") for part in slate)).unique()
        if doubt := reason_to_ask(collect(distinct, self.scanned[1])):
            raise ValueError(
                f"{self.paths[0]}: {doubt}, and the bundle does not say which rows make history; set history_actions "
                "in [data] of its TOML, and name the TOML with --toml"
            )

    def newest(self) -> float:
        """Return the time of the newest event, in unix seconds; 0 without events.

        Times in the future do not count: they would hide all later events from the next incremental refresh.
        """
        happened = pl.col("timestamp").is_finite() & (pl.col("timestamp") <= time.time() + CLOCK_SKEW_S)
        found = collect(self.taken.filter(happened).select(pl.col("timestamp").max()), self.scanned[1]).item()
        return float(found or 0.0)

    def users(self, after: float | None) -> list[str]:
        """Return all users, or those with an event after a time in unix seconds."""
        table = self.taken if after is None else self.taken.filter(pl.col("timestamp") > after)
        users = collect(table.select(pl.col("user_id").drop_nulls().unique()), self.scanned[1])
        return sorted(users["user_id"].to_list())

    def parquet(self) -> list[str]:
        """Return the paths of the files for Ray. Raises ValueError for files of another kind."""
        files = self.scanned[1]
        if others := [file for file in files if kind_of(file.path) != "parquet"]:
            raise ValueError(f"{others[0]}: with --ray, the events are Parquet files")
        if self.tables.columns or self.tables.time_unit not in (None, "s"):
            raise ValueError("with --ray, the events have the names of columns that training uses, and unix seconds")
        return [str(file.path.resolve()) for file in files]
