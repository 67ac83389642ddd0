"""Appends events to a folder of Parquet files, which the commands of `slatewise_train` read as they are.

    events-<time>-<random>.parquet      whole files: written under another name, and renamed
    .journal-<time>-<random>.jsonl      the events since the last file; one line is a batch, as columns

An event is in the journal before its request is answered, so the end of the process loses none. At its end, and when
the journal is old or large enough, it becomes a Parquet file. The journal of a process that was killed becomes one when
the next process starts: a lock on the journal says that its process lives.
Columns: user_id, item_id, action, timestamp (unix seconds), request_id.
Called by: `writer.py`; `main.py` opens it. Calls: polars, which the serving install does not bring.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib
import json
import logging
import os
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from slatewise import metrics
from slatewise.events.event import SHOWN, Event

log = logging.getLogger("slatewise")

COLUMNS = ("user_id", "item_id", "action", "timestamp", "request_id")
CHECK_SECONDS = 1.0
JOURNAL_BYTES = 2**26  # at which a journal becomes a file before its age


class Tap:
    """`async with Tap(folder, ...)`. Files of one folder may come from several processes.

    file_seconds: age of the journal at which it becomes a file. most_bytes: of all files of the folder; the oldest are
    removed above it. Raises OSError if the folder cannot be made.
    """

    def __init__(self, folder: Path, file_seconds: float, most_bytes: int) -> None:
        self.folder = folder
        self.file_seconds = file_seconds
        self.most_bytes = most_bytes
        self.journal: IO[bytes] | None = None
        self.began = 0.0  # time.monotonic() of the first event in the journal
        self.appender = ThreadPoolExecutor(1, "slatewise-journal")
        self.converter = ThreadPoolExecutor(1, "slatewise-tap")  # so that no answer waits for a file

    async def __aenter__(self) -> Tap:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.converter.submit(self.convert_abandoned)
        self.task = asyncio.create_task(self.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        self.appender.submit(self.rotate)
        self.appender.shutdown()
        self.converter.shutdown()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            await asyncio.get_running_loop().run_in_executor(self.appender, self.rotate_if_due)

    async def append(self, events: Sequence[Event]) -> None:
        """Write events to the journal. Never raises: a full disk costs the tap alone, and is counted."""
        await asyncio.get_running_loop().run_in_executor(self.appender, self.write, events)

    def write(self, events: Sequence[Event]) -> None:
        try:
            if self.journal is None:
                self.journal = self.new_journal()
                self.began = time.monotonic()
            data = line(events)
            if self.journal.write(data) != len(data):
                raise OSError("the disk is full")
            metrics.EVENTS_TAPPED.labels("written").inc(len(events))
        except OSError as error:
            log.error("events folder: %s", error)
            metrics.EVENTS_TAPPED.labels("dropped").inc(len(events))
            self.rotate()  # no line follows one that may be incomplete
        self.rotate_if_due()

    def new_journal(self) -> IO[bytes]:
        """Open a journal and lock it. It has no buffer: what is written survives the process."""
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        path = self.folder / f".journal-{now}-{secrets.token_hex(4)}.jsonl"  # process ids may be equal in containers
        file = open(path, "xb", buffering=0)  # noqa: SIM115 - kept open
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return file
        file.close()  # a process that started took it for an abandoned one, before the lock
        return self.new_journal()

    def rotate_if_due(self) -> None:
        if self.journal is not None and (
            time.monotonic() - self.began >= self.file_seconds or self.journal.tell() >= JOURNAL_BYTES
        ):
            self.rotate()

    def rotate(self) -> None:
        """Hand the journal over to the thread that makes files. Its lock is held until the file is there."""
        if self.journal is not None:
            self.converter.submit(self.convert, self.journal)
            self.journal = None

    def convert(self, journal: IO[bytes]) -> None:
        """Make a journal a Parquet file, and remove it. On a fault it stays, for the next start."""
        try:
            with journal:
                path = Path(journal.name)
                write_parquet(read_journal(path), self.folder / f"events-{path.stem.removeprefix('.journal-')}.parquet")
                path.unlink()
            with contextlib.suppress(FileNotFoundError):  # another process removed one at the same time
                self.remove_oldest()
        except Exception as error:
            log.error("events folder: %s stays a journal: %s", journal.name, error)

    def convert_abandoned(self) -> None:
        """Make files of the journals whose processes have ended."""
        for path in sorted(self.folder.glob(".journal-*.jsonl")):
            with contextlib.suppress(OSError):  # its process lives, or another process was faster
                file = open(path, "rb")  # noqa: SIM115 - `convert` closes it
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    is_abandoned = path.exists()  # else its process has made it a file meanwhile
                except OSError:
                    is_abandoned = False
                if is_abandoned:
                    self.convert(file)
                file.close()

    def remove_oldest(self) -> None:
        files = sorted(self.folder.glob("events-*.parquet"))
        sizes = [path.stat().st_size for path in files]
        total = sum(sizes)
        for path, size in zip(files[:-1], sizes, strict=False):
            if total <= self.most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
            log.warning("events folder: removed %s, above SLATEWISE_EVENTS_DIR_MB", path.name)


def line(events: Sequence[Event]) -> bytes:
    """Return a batch as one line of JSON: a list for each of `COLUMNS`."""
    rows = (
        (e.user, e.item_id, (SHOWN if e.shown else e.action) or None, e.timestamp, e.request_id or None) for e in events
    )
    return json.dumps(dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))).encode() + b"\n"


def read_journal(path: Path) -> dict[str, list[Any]]:
    """Return the columns of a journal. The last line may be incomplete: its request was not answered."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for text in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            for name, values in json.loads(text).items():
                columns[name] += values
    return columns


def write_parquet(columns: dict[str, list[Any]], path: Path) -> None:
    """Write a whole file: under another name that the readers skip, then renamed."""
    if not columns["user_id"]:
        return
    polars = importlib.import_module("polars")  # by name: the server must start without it
    types = dict.fromkeys(COLUMNS, polars.String) | {"timestamp": polars.Float64}
    draft = path.with_name(f".{path.name}")
    with open(draft, "wb") as file:
        polars.DataFrame(columns, schema=types).write_parquet(file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
