"""Find the files of a table and scan them: Parquet, CSV and JSON lines; one file, a folder, or a pattern.

Columns of CSV files are text. Nothing is converted here; `events.py` and `items.py` do that.

Called by: `data.py`, `check_data.py`, `new_toml.py`, `events.py`, `items.py`, `meta/`. Calls: `faults.py`, for the line
of a fault in a CSV file; `capture.py`.
"""

from __future__ import annotations

import csv
import glob
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

import polars as pl
from polars.exceptions import PanicException, PolarsError

from slatewise_train.tables import faults
from slatewise_train.tables.capture import capture_events, is_capture, read_json_lines

SUPPORTED = "a table is .parquet, .csv or .tsv, or .jsonl; all but the first also as .gz or .zst"
SUFFIX = re.compile(r"\.(parquet|pq|parq|jsonl|csv|tsv|tab|txt)(\.gz|\.gzip|\.zst|\.zstd)?$", re.IGNORECASE)
ROTATED = re.compile(r"\.jsonl\.\d+$", re.IGNORECASE)  # the predecessor of a capture: requests.jsonl.1
PARQUET = ("parquet", "pq", "parq")
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
SEPARATORS = ",\t;|"
FAULTS = (PolarsError, PanicException, OSError)
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # the name of a partition without a value, in Hive and Spark


@dataclass(frozen=True)
class TableFile:
    """One file of a table."""

    path: Path
    separator: str | None  # of a CSV file; None: a file of another kind
    partition: dict[str, str | None]  # columns that the folders name, as in day=2026-01-31/part-0.parquet
    captures: tuple[Path, ...] = ()  # all files of a capture of requests, which are one table

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def lines(self) -> pl.DataFrame:
        """The rows of JSON lines, which are read as a whole, and once."""
        return capture_events(self.captures) if self.captures else read_json_lines(self.path)

    def scan(self) -> pl.LazyFrame:
        """Return all columns, those of the folders included."""
        if self.captures or kind_of(self.path) == "jsonl":
            frame = self.lines.lazy()
        elif self.separator is None:
            frame = pl.scan_parquet(self.path, hive_partitioning=False, glob=False)
        else:
            frame = pl.scan_csv(self.path, infer_schema=False, separator=self.separator, glob=False)
        return frame.with_columns(pl.lit(value, pl.String).alias(name) for name, value in self.partition.items())


def find_files(place: str, separator: str | None = None) -> list[TableFile]:
    """Return the files of a table, in the order of their names.

    place: a file, a folder or a pattern; `~` is the home folder. In folders, names that begin with `_` or `.` are
    skipped, as Spark writes them beside its data. Raises OSError if there is no such file, and ValueError for a file of
    another kind.
    """
    if URL.match(place):
        raise ValueError(f"{place}: only files of this machine are read; copy the table to it first")
    root = Path(place).expanduser()
    if root.is_dir():
        paths = sorted(path for path in root.rglob("*") if path.is_file() and is_data(path.relative_to(root)))
        paths = [path for path in paths if kind_of(path)]
        if not paths:
            raise ValueError(f"{place}: the folder has no table; {SUPPORTED}")
    elif not root.exists() and glob.has_magic(str(root)):
        found = [Path(name) for name in sorted(glob.glob(str(root), recursive=True))]
        paths = [path for path in found if path.is_file() and is_data(Path(path.name))]
        if not paths:
            raise FileNotFoundError(f"{place}: no file has such a name")
    elif root.exists():
        paths = [root]
    else:
        raise FileNotFoundError(f"{place}: no such file or folder")
    kinds = {path: kind_of(path) for path in paths}
    if other := [path for path, kind in kinds.items() if kind is None]:
        raise ValueError(f"{other[0]}: not a known kind of file; {SUPPORTED}")
    if len(set(kinds.values())) > 1:
        raise ValueError(f"{place}: has files of several kinds, such as Parquet and CSV; keep one kind")
    return together(
        TableFile(
            path,
            separator_of(path, separator) if kind == "csv" else None,
            partition_of(path),
            (path,) if kind == "jsonl" and is_capture(path) else (),
        )
        for path, kind in kinds.items()
    )


def together(files: Iterable[TableFile]) -> list[TableFile]:
    """Return the files, with those of a capture as one."""
    files = list(files)
    captures = tuple(path for file in files for path in file.captures)
    others = [file for file in files if not file.captures]
    return [*others, TableFile(captures[0], None, {}, captures)] if captures else others


def is_data(path: Path) -> bool:
    """Whether no part of a path marks it as hidden: `_SUCCESS`, `.part-0.csv.crc`, `_temporary/`."""
    return not any(part.startswith(("_", ".")) for part in path.parts)


def kind_of(path: Path) -> str | None:
    """Return "parquet", "csv", "jsonl", or None for another kind. Without a suffix, as Hive writes, the bytes tell."""
    if ROTATED.search(path.name):
        return "jsonl"
    if match := SUFFIX.search(path.name):
        suffix = match[1].lower()
        if suffix in PARQUET:
            return None if match[2] else "parquet"
        return "jsonl" if suffix == "jsonl" else "csv"
    if path.suffix:
        return None
    with path.open("rb") as file:
        return "parquet" if file.read(4) == b"PAR1" else None


def partition_of(path: Path) -> dict[str, str | None]:
    """Return the columns that the folders of a path name. Values stay text, so that leading zeros stay."""
    pairs = (part.split("=", 1) for part in path.parts[:-1] if "=" in part)
    return {name: None if value == NO_VALUE else unquote(value) for name, value in pairs if name}


def separator_of(path: Path, given: str | None) -> str:
    """Return the separator of a CSV file: `given`, or the character that occurs most often in its header.

    Raises ValueError for a file that is not such text.
    """
    header = faults.first_line(path)
    if given is not None:
        return given
    outside = re.sub(r'"[^"]*"', "", header)
    counts = {separator: outside.count(separator) for separator in SEPARATORS}
    return max(counts, key=lambda separator: counts[separator]) if any(counts.values()) else ","


def describe_separator(file: TableFile) -> str:
    """Return a sentence about a separator that is not the one of the file's suffix, or an empty text."""
    names = {"\t": "tabs", ";": "semicolons", "|": "vertical bars", ",": "commas"}
    match = SUFFIX.search(file.path.name)
    usual = "\t" if match and match[1].lower() in ("tsv", "tab") else ","
    if file.separator in (None, usual):
        return ""
    return f"{file}: columns are separated by {names.get(str(file.separator), repr(file.separator))}"


def names_of(file: TableFile) -> list[str]:
    """Return the names of a file's columns. Raises ValueError for a file that is not a table."""
    with explained([file]):
        names = file.scan().collect_schema().names()
    if file.separator is not None:
        header = next(csv.reader([faults.first_line(file.path)], delimiter=file.separator), [])
        if twice := {name for name in header if header.count(name) > 1}:
            raise ValueError(f"{file}: two columns have the name {min(twice)!r}")
    return names


@contextmanager
def explained(files: list[TableFile]) -> Iterator[None]:
    """Turn an error of reading files into a ValueError with file, line and remedy."""
    try:
        yield
    except FAULTS as error:
        for file in files:
            try:
                file.scan().select(pl.all().count()).collect(engine="streaming")
            except FAULTS as own:
                raise ValueError(faults.explain(file.path, file.separator, own)) from None
        raise ValueError(f"{', '.join(map(str, files[:3]))}: cannot be read: {faults.one_line(error)}") from None


def collect(frame: pl.LazyFrame, files: list[TableFile]) -> pl.DataFrame:
    """Run a query on files with the streaming engine. Raises ValueError with file and line for a malformed file."""
    with explained(files):
        return frame.collect(engine="streaming")


def read_table(place: str | Path, separator: str | None = None) -> pl.DataFrame:
    """Read a whole table as it is; columns of CSV files are text. Raises OSError and ValueError as `find_files`."""
    files = find_files(str(place), separator)
    for file in files:
        names_of(file)
    with explained(files):
        return pl.concat([file.scan() for file in files], how="diagonal_relaxed").collect(engine="streaming")
