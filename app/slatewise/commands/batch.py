"""`slatewise batch in.parquet out.parquet`: ranks a table of requests, in parts that a killed run keeps.

    table --> slices of requests --> worker processes (a bundle) or threads (a server) --> part files --> table

A run keeps its parts in the folder `OUT.parts`, with a description of the input and the options. The same command
continues there. A finished run renames the table into its place and removes the folder.

Called by: cli.py. Calls: `batch_table.py` for the two forms of a table, `source.py`, polars, process pools.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from slatewise.client.client import Client
from slatewise.client.libraries import library
from slatewise.commands.batch_table import Table, rank_part, read_histories, read_parquet
from slatewise.commands.source import add_source, options
from slatewise.process import cpu_quota

PART_REQUESTS = 1_000
AHEAD = 2  # parts per worker that are submitted: the rest of the table stays in this process
RETRIES = 5  # of a request to an overloaded server, within its time-out
PROGRESS_SECONDS = 1.0
DESCRIPTION = "run.json"


class BatchError(ValueError):
    """The batch cannot begin or go on."""


def main(argv: Sequence[str]) -> None:
    """Raises BatchError, MissingLibrary, SlatewiseError, ManifestError, OSError, ValueError or polars' errors."""
    arguments = parse(argv)
    polars = library("polars", "`slatewise batch`", "'slatewise[parquet]'")
    histories = None if arguments.histories is None else read_histories(arguments.histories)
    table = Table(read_parquet(arguments.input), histories, arguments.part)
    with open_folder(arguments) as (folder, request_time):
        files = [folder / f"{k:06}.parquet" for k in range(len(table.rows))]
        missing = [k for k, file in enumerate(files) if not file.exists()]
        progress = Progress(sum(table.requests), sum(table.requests[k] for k in missing))
        members = {name: value for name, value in options(arguments).items() if value is not None}
        for k, frame in ranked(arguments, table, missing, members | {"request_time": request_time}):
            write(frame, files[k])
            progress.add(table.requests[k])
        write(table.join([polars.read_parquet(file) for file in files]), arguments.output)
        shutil.rmtree(folder)
    print(f"ranked {sum(table.requests):,} requests: {arguments.output}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "slatewise batch",
        description="Rank a table of requests. Long form: a row per user and candidate, with the columns user and "
        "item_id; numeric columns are features, all others fields; score and rank are added. Wide form: a row per "
        "request, with the list column item_ids, and optionally user, history_item_ids, history_actions, "
        "history_timestamps and features.NAME; the ranked lists are added.",
        epilog="A killed run continues when the same command is given again.",
    )
    parser.add_argument("input", type=Path, help="Parquet file")
    parser.add_argument("output", type=Path, help="Parquet file to write; it appears when all is ranked")
    parser.add_argument("--histories", type=Path, help="Parquet file of events: user, item_id, action, timestamp")
    parser.add_argument("--workers", type=int, help="processes (--bundle) or requests in flight; default: CPU quota")
    parser.add_argument("--part", type=int, default=PART_REQUESTS, help="requests in a part; default: %(default)s")
    parser.add_argument("--request-time", type=float, help="unix seconds of every request; default: begin of the run")
    add_source(parser)
    arguments = parser.parse_args(argv)
    arguments.workers = cpu_quota() if arguments.workers is None else arguments.workers
    for name in ("workers", "part"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    if arguments.output.exists() and arguments.output.samefile(arguments.input):
        parser.error("the output is the input")
    return arguments


# Parts on disk


@contextmanager
def open_folder(arguments: argparse.Namespace) -> Iterator[tuple[Path, float]]:
    """Make or reopen the folder of the parts, and hold it. Yields it with the time of the requests.

    A continued run keeps the time of its begin: scores depend on it. Raises BatchError if another run or another input
    has the folder.
    """
    folder = arguments.output.with_name(arguments.output.name + ".parts")
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BatchError(f"{folder} is in use by another run") from None
        wanted = description(arguments)
        file = folder / DESCRIPTION
        begun = file.exists() and any(folder.glob("*.parquet"))  # else nothing depends on the arguments of that run
        found = json.loads(file.read_text()) if begun else wanted
        if other := [name for name in wanted if found.get(name) != wanted[name]]:
            reason = f"{folder} holds a run with another value of {', '.join(other)}"
            raise BatchError(f"{reason}; give the same command to continue it, or delete the folder")
        begin = found.get("begin") or time.time()
        write_text(file, json.dumps(wanted | {"begin": begin}, indent=1))
        yield folder, begin if arguments.request_time is None else arguments.request_time


def description(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the facts that the parts of one run have in common. Parts of different facts are not joined."""
    bundle = None if arguments.bundle is None else digest(find_bundle(arguments.bundle) / "manifest.json")
    return {
        "input": digest(arguments.input),
        "histories": None if arguments.histories is None else digest(arguments.histories),
        "bundle": bundle,
        "url": arguments.url,
        "part": arguments.part,
        "request_time": arguments.request_time,
    } | options(arguments)


def find_bundle(path: str) -> Path:
    from slatewise.local.ranker import find_bundle  # not for --url: the bundle's libraries take a second to load

    return find_bundle(path)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(frame: Any, path: Path) -> None:
    """Write a table so that the file is complete or absent, also after a kill."""
    part = path.with_name(path.name + ".new")
    frame.write_parquet(part)
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".new")
    part.write_text(text)
    os.replace(part, path)


# Workers


def ranked(
    arguments: argparse.Namespace, table: Table, missing: list[int], members: dict[str, Any]
) -> Iterator[tuple[int, Any]]:
    """Yield the missing parts with their ranked rows, as they are done. At most AHEAD parts a worker are submitted."""
    waiting = iter(missing)
    running: dict[Future[Any], int] = {}
    workers = max(1, min(arguments.workers, len(missing)))
    client = None
    pool: Executor
    if arguments.bundle is None:
        client = Client(arguments.url, timeout=arguments.timeout, retries=RETRIES)
        pool = ThreadPoolExecutor(workers)
        work = functools.partial(rank_part, client, members=members)
    else:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), ignore_interrupt)
        work = functools.partial(rank_in_process, members=members, bundle=arguments.bundle)
    try:
        while True:
            while len(running) < AHEAD * workers and (k := next(waiting, None)) is not None:
                running[pool.submit(work, table.part(k))] = k
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), done.result()
    except BrokenProcessPool:
        reason = "a worker process was killed, perhaps for memory"
        raise BatchError(f"{reason}; give the same command again to continue, with fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if client is not None:
            client.close()


def ignore_interrupt() -> None:
    """Leave Ctrl-C to the main process, which stops the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@functools.cache
def local_ranker(bundle: str, variant: str | None) -> Any:
    """Load the bundle, once in each worker process. Each uses one thread: the processes share the cores."""
    from slatewise.local.ranker import load

    return load(bundle, variant, threads=1)


def rank_in_process(part: tuple[Any, Any], members: dict[str, Any], bundle: str) -> Any:
    return rank_part(local_ranker(bundle, members.get("variant")), part, members)


class Progress:
    """Prints the share that is done, the speed and the time left, on standard error. Parts of an earlier run count as
    done, not as fast.
    """

    def __init__(self, total: int, missing: int) -> None:
        self.total = total
        self.done = total - missing
        self.earlier = self.done
        self.begin = self.shown = time.monotonic()
        if self.done:
            print(f"continuing: {self.done:,} of {total:,} requests are ranked already", file=sys.stderr)

    def add(self, requests: int) -> None:
        self.done += requests
        now = time.monotonic()
        if now - self.shown < PROGRESS_SECONDS and self.done < self.total:
            return
        self.shown = now
        speed = (self.done - self.earlier) / max(now - self.begin, 1e-9)
        left = (self.total - self.done) / max(speed, 1e-9)
        text = f"{self.done:,} of {self.total:,} requests, {speed:,.0f} per second, {left:,.0f} s left"
        print(text, file=sys.stderr, flush=True)
