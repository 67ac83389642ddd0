"""Read JSON lines: rows of a table, or requests that a server captured, whose histories and candidates become events.

A capture has one request on each line, as `POST /rerank` takes it. It does not say what became of a slate. The later
histories of the same user do: an event of one of its items within a day is taken from the latest such slate. So all
files of a capture are read together: a history in one file continues the slates of another one.

Called by: `files.py`. Calls: `faults.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl
from polars.exceptions import PanicException, PolarsError

from slatewise_train.tables.faults import one_line, open_bytes

DAY = 86_400.0
SHOWN = "impression"
TAKEN = "taken"  # the action of an event without one
LISTS = {"item_ids": pl.List(pl.String), "actions": pl.List(pl.String), "timestamps": pl.List(pl.Float64)}
SCHEMA = pl.Schema(
    {
        "user": pl.String(),
        "request_time": pl.Float64(),
        "history": pl.Struct(LISTS),
        "candidates": pl.Struct({"item_ids": pl.List(pl.String())}),
    }
)


def read_json_lines(path: Path) -> pl.DataFrame:
    """Return the rows of a file. Raises ValueError for a line that is no JSON object, and for values of mixed types."""
    with explained(path):
        return pl.read_ndjson(path, infer_schema_length=None)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an error of polars into a ValueError: the line that is no JSON object, or the fault of the types."""
    try:
        yield
    except (PolarsError, PanicException, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        k = 0
        with open_bytes(path) as file:
            for k, line in enumerate(file, 1):
                try:
                    wrong = bool(line.strip()) and not isinstance(json.loads(line, parse_constant=refuse), dict)
                except (ValueError, RecursionError):
                    wrong = True
                if wrong:
                    raise ValueError(f"{path}: line {k} is no JSON object; every line is one row") from None
        if not k:
            raise ValueError(f"{path}: the file is empty") from None
        raise ValueError(f"{path}: cannot be read as JSON lines: {one_line(error)}; give a column one type") from None


def refuse(constant: str) -> None:
    """Refuse NaN and Infinity, which the standard library reads and JSON does not have."""
    raise ValueError(constant)


def is_capture(path: Path) -> bool:
    """Whether the first line of a file of JSON lines is a request, and not a row of a table."""
    try:
        found = pl.read_ndjson(path, n_rows=1, infer_schema_length=1).schema.get("candidates")
    except (PolarsError, PanicException, OSError):
        return False  # `read_json_lines` says why
    return isinstance(found, pl.Struct) and any(field.name == "item_ids" for field in found.fields)


def read_requests(path: Path) -> pl.DataFrame:
    """Return the captured requests of a file. Raises ValueError as `read_json_lines` does."""
    with explained(path):
        return pl.read_ndjson(path, schema=SCHEMA)


def capture_events(paths: Sequence[Path]) -> pl.DataFrame:
    """Return user_id, item_id, timestamp, action and slate_id of captured requests, one row for each event once.

    Candidates have the action `impression`. Requests without a user and events without a time are left out.
    """
    requests = pl.concat(map(read_requests, paths)).with_row_index("line").filter(pl.col("user").is_not_null())
    history = pl.col("history").struct
    place = pl.int_ranges(history.field("item_ids").list.len())
    events = (
        requests.select(
            "user",
            place.alias("place"),
            *(history.field(name) for name in LISTS),
        )
        .explode("place", empty_as_null=False)
        .drop_nulls("place")
        .select(
            pl.col("user").alias("user_id"),
            pl.col("item_ids").list.get(pl.col("place")).alias("item_id"),
            pl.col("timestamps").list.get(pl.col("place"), null_on_oob=True).alias("timestamp"),
            pl.col("actions").list.get(pl.col("place"), null_on_oob=True).fill_null(TAKEN).alias("action"),
        )
        .drop_nulls("timestamp")
        .unique(maintain_order=True)
        .sort("timestamp", maintain_order=True)
    )
    shown = (
        requests.select(
            pl.col("user").alias("user_id"),
            pl.col("candidates").struct.field("item_ids").alias("item_id"),
            pl.col("request_time").alias("timestamp"),
            pl.lit(SHOWN).alias("action"),
            pl.format("request-{}", pl.col("line") + 1).alias("slate_id"),
        )
        .explode("item_id", empty_as_null=False)
        .drop_nulls(["item_id", "timestamp"])
        .sort("timestamp", maintain_order=True)
    )
    events = events.join_asof(
        shown.drop("action"),
        on="timestamp",
        by=["user_id", "item_id"],
        strategy="backward",
        tolerance=DAY,
        allow_exact_matches=False,  # the request itself has events of its own time
        check_sortedness=False,
    )
    return pl.concat([events, shown]).sort("timestamp", maintain_order=True)
