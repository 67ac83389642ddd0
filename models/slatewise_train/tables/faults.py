"""Find the place of a fault in a CSV file, and say how to mend it.

These functions read a file line by line in Python. They run once, when a file has been refused.

Called by: `files.py`, `events.py`, `capture.py`. Calls: no module of this package.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import polars as pl
from polars.exceptions import PolarsError

BYTE_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
OTHER_KINDS = {
    b"\x1f\x8b": "compressed by gzip; name it .csv.gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; name it .csv.zst",
    b"PAR1": "Parquet; name it .parquet",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as CSV",
}
HEADER_BYTES = 1 << 20


def one_line(error: BaseException) -> str:
    """Return the first sentence of an error's message."""
    text = str(error).strip().split("\n")[0]
    return " ".join(text.split())[:300] or type(error).__name__


def open_bytes(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """Open a CSV file without compression, or with that of a .gz file."""
    name = path.name.lower()
    if name.endswith((".gz", ".gzip")):
        return gzip.open(path, "rb")
    return path.open("rb")


def first_line(path: Path) -> str:
    """Return the header of a CSV file, without byte order mark and line end.

    Raises ValueError for an empty file and for a text in another encoding than UTF-8.
    """
    if path.name.lower().endswith((".zst", ".zstd")):
        return zst_header(path)
    try:
        with open_bytes(path) as file:
            head = file.read(HEADER_BYTES)
    except (OSError, EOFError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(f"{path}: cannot be decompressed: {one_line(error)}; write the file again") from None
    for mark, name in BYTE_MARKS.items():
        if head.startswith(mark):
            raise ValueError(f"{path}: the text is {name}; save the file as UTF-8")
    for mark, kind in OTHER_KINDS.items():
        if head.startswith(mark):
            raise ValueError(f"{path}: the content is {kind}")
    head = head.removeprefix(b"\xef\xbb\xbf")
    if not head.strip():
        raise ValueError(f"{path}: the file is empty")
    line = head.split(b"\n")[0].removesuffix(b"\r")
    if b"\r" in line:
        raise ValueError(f"{path}: lines end in CR alone; save the file with line ends LF or CR LF")
    if b"\x00" in line:
        raise ValueError(f"{path}: line 1 has a zero byte, so this is not text; save the file as UTF-8")
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: line 1 is not UTF-8; save the file as UTF-8") from None


def zst_header(path: Path) -> str:
    """Return the header of a zst file: without a separator that occurs, polars reads each line as one column."""
    try:
        names = pl.scan_csv(path, infer_schema=False, separator="\x01", quote_char=None, glob=False).collect_schema()
    except PolarsError as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from None
    return names.names()[0]


def explain(path: Path, separator: str | None, error: BaseException) -> str:
    """Return the message for a file that polars refused: the line of the fault in a CSV file, and the remedy."""
    if separator is None:
        return f"{path}: not a readable Parquet file: {one_line(error)}; write the file again"
    if isinstance(error, OSError):
        return f"{path}: cannot be read: {one_line(error)}"
    if not path.name.lower().endswith((".zst", ".zstd")):
        for fault in itertools.islice(malformed_lines(path, separator), 1):
            return f"{path}: {fault}"
    return f"{path}: cannot be read as CSV: {one_line(error)}"


def malformed_lines(path: Path, separator: str) -> Iterator[str]:
    """Yield a message with its line for each malformed line of a CSV file."""
    with open_bytes(path) as file:
        for k, text in enumerate(file, 1):
            try:
                text.decode()
            except UnicodeDecodeError as error:
                yield f"line {k}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
                return
    names = 0
    for row, line, raw in rows_with_lines(path, separator):
        if isinstance(row, str):
            yield f"line {line}: {row}; a quote inside a field is written twice, in a quoted field"
            return
        names = names or len(row)
        if len(row) > names:
            yield (
                f"line {line}: {len(row)} fields where the header has {names}; put a field that contains "
                f"{separator!r} in quotes"
            )
        elif raw.count('"') % 2:  # the reader of the standard library accepts it, polars does not
            yield f'line {line}: a quote inside a field without quotes; write the field in quotes, the quote as ""'


def rows_with_lines(path: Path, separator: str) -> Iterator[tuple[list[str] | str, int, str]]:
    """Yield the rows of a CSV file, the header first: fields, number of the last line, and text.

    A broken row ends the file: it has a message in place of its fields.
    """
    taken: list[str] = []

    def lines(file: Iterable[str]) -> Iterator[str]:
        for line in file:
            taken.append(line)
            yield line

    with io.TextIOWrapper(open_bytes(path), "utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(lines(file), delimiter=separator, strict=True)
        while True:
            try:
                yield next(reader), reader.line_num, "".join(taken)
            except StopIteration:
                return
            except csv.Error as error:
                yield str(error), reader.line_num, "".join(taken)
                return
            taken.clear()


def line_of_row(path: Path, separator: str, row: int) -> int | None:
    """Return the line of a row of a CSV file (0 is the first after the header), or None for a zst file."""
    if path.name.lower().endswith((".zst", ".zstd")):
        return None
    last = 0
    for k, (_, line, _) in enumerate(rows_with_lines(path, separator)):
        if k == row + 1:
            return last + 1
        last = line
    return None
