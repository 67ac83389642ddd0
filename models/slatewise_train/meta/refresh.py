"""Refresh the vectors in the store, of users and of new items: slatewise refresh BUNDLE EVENTS...

The job adapts the users that have new events since the last refresh, or all users with --full. It publishes their
vectors as a new generation. The last step updates the pointer to the live generation, and only then do servers read the
new vectors, without a restart. Then it adapts the items that the ranker does not know (`refresh_items.py`). You can
stop the job at any time; the same command continues.

EVENTS are tables of every kind that training reads (`tables/`). They have the names of columns that training uses, or
those of the TOML that is named with --toml. They must contain all events of a user, not only the new ones. The manifest
has the `history_actions` of the training: rows that were only shown are left out by the same rule.

Called by: the command line. Calls: `limaml.py`, with the meta block of the bundle; `changed_users.py`;
`logged_events.py`, `refresh_items.py`; `store/generations.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from tqdm import tqdm

from slatewise.bundle.files import sha256
from slatewise.bundle.manifest import bundle_folder, read_manifest
from slatewise.store.client import connect
from slatewise.store.codec import DTYPES
from slatewise.store.command_line import add_redis_url
from slatewise.store.generations import Generations
from slatewise_train.config import TablesConfig, read_config
from slatewise_train.data import TrainingVocabulary
from slatewise_train.meta.changed_users import Events
from slatewise_train.meta.limaml import META_BLOCK, known_events, load_learner, user_vectors
from slatewise_train.meta.logged_events import config_of, history_of
from slatewise_train.meta.refresh_items import refresh_items
from slatewise_train.rankers.weights import load_model
from slatewise_train.tables.events import PLAIN
from slatewise_train.tables.files import collect

CHUNK_USERS = 1_000  # about, in a chunk; a resumed job skips the chunks that are written


class Adapter:
    """Computes users' vectors from their events, with the ranker and the meta block of a bundle."""

    def __init__(self, folder: Path, stated: Sequence[str] = ()) -> None:
        """stated: `history_actions`, for a bundle that has none."""
        manifest = read_manifest(folder)
        self.ranker = load_model(folder, manifest)
        self.ranker.requires_grad_(False)
        self.learner, self.kinds = load_learner(folder / META_BLOCK)
        ids = json.loads((folder / "ids.json").read_text())
        self.vocabulary = TrainingVocabulary(ids, manifest.actions, {})
        self.items = pl.DataFrame({"item_id": ids}, schema={"item_id": pl.String})
        self.config = config_of(manifest, self.kinds)
        self.history_actions = manifest.history_actions or stated

    def vectors_of(self, events: pl.DataFrame) -> tuple[list[str], np.ndarray]:
        """Return the users with an event of an item that the ranker knows, and their vectors (U, M) float32.

        events: the rows of a table, as in `history_of`.
        """
        history = history_of(events, self.items, self.vocabulary, self.config, self.history_actions)
        known = known_events(history)
        vectors = user_vectors(self.learner, self.ranker, self.kinds, known, self.config.history_length)
        rows = np.flatnonzero(np.diff(known.offsets))
        return [known.users[row] for row in rows], vectors[rows]


@dataclass(frozen=True)
class Options:
    """Options of a refresh."""

    full: bool = False  # all users, instead of those with new events
    processes: int = 1
    on_ray: bool = False
    dtype: str = "float32"  # of the stored vectors
    ttl_days: float = 0.0  # after this many days without a refresh the store drops a user; 0: never


@dataclass(frozen=True)
class Work:
    """The values that a worker of a refresh needs, in this process or in another one."""

    folder: Path  # of the bundle
    redis_url: str = field(repr=False)  # may contain a password
    ranker: str
    space: str
    generation: int
    created_at: float  # unix seconds
    options: Options
    history_actions: Sequence[str] = ()


class Worker:
    """Adapts the users of a chunk and writes their vectors: `worker(chunk, events)`. Each process has one worker."""

    def __init__(self, work: Work) -> None:
        torch.set_num_threads(1)
        self.work = work
        self.adapter = Adapter(work.folder, work.history_actions)
        self.store = Generations(connect(work.redis_url), work.ranker, work.space, work.options.ttl_days)

    def __call__(self, chunk: int, events: pl.DataFrame) -> Result:
        begin = time.process_time()
        users, vectors = self.adapter.vectors_of(events)
        seconds = time.process_time() - begin
        size = self.store.write_chunk(
            self.work.generation, chunk, users, vectors, self.work.created_at, self.work.options.dtype
        )
        return {"chunk": chunk, "users": len(users), "bytes": size, "adapt_seconds": seconds}


def chunk_of(user: str, chunks: int) -> int:
    return zlib.crc32(user.encode()) % chunks


Result = dict[str, float]  # of a chunk: its number, users, bytes, and the seconds of adaptation


def run_here(
    work: Work, events: Events, users: list[str], chunks: int, done: set[int], processes: int
) -> Iterator[Result]:
    """Adapt the chunks that are not done, in processes on this machine. Yields a result for each finished chunk."""
    chosen = pl.LazyFrame(
        {"user_id": users, "chunk": [chunk_of(user, chunks) for user in users]},
        schema={"user_id": pl.String, "chunk": pl.Int64},
    )
    rows = events.table.join(chosen.filter(~pl.col("chunk").is_in(sorted(done))), on="user_id", maintain_order="left")
    table = collect(rows, events.scanned[1])
    parts = {int(key[0]): part.drop("chunk") for key, part in table.partition_by("chunk", as_dict=True).items()}
    empty = table.clear().drop("chunk")
    todo = [chunk for chunk in range(chunks) if chunk not in done]
    if processes == 1:
        alone = Worker(work)
        yield from (alone(chunk, parts.get(chunk, empty)) for chunk in todo)
        return
    # "spawn": a forked process would inherit the locks of torch's and polars' threads, but not the threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, start_worker, (work,)) as pool:
        try:
            for future in as_completed([pool.submit(run_chunk, chunk, parts.get(chunk, empty)) for chunk in todo]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


workers: list[Worker] = []  # in a process of the pool: one, for all of its chunks


def start_worker(work: Work) -> None:
    workers.append(Worker(work))


def run_chunk(chunk: int, events: pl.DataFrame) -> Result:
    (worker,) = workers
    return worker(chunk, events)


class RayWorker:
    """A `Worker` with the interface of Ray Data: it takes the rows of a chunk and returns one row, the result."""

    def __init__(self, work: Work) -> None:
        self.worker = Worker(work)

    def __call__(self, group: Any) -> Any:
        import pyarrow as pa

        events = pl.DataFrame(pl.from_arrow(group))
        return pa.Table.from_pylist([self.worker(int(events["chunk"][0]), events.drop("chunk"))])


def run_on_ray(
    work: Work, events: Events, users: list[str], chunks: int, done: set[int], processes: int
) -> Iterator[Result]:
    """Adapt the chunks that are not done, on a Ray cluster. Yields a result for each finished chunk.

    Ray reads the files and groups them by chunk; its workers write to the store.
    """
    import pyarrow as pa
    import ray

    ray.init(
        ignore_reinit_error=True, log_to_driver=False, num_cpus=None if os.environ.get("RAY_ADDRESS") else processes + 1
    )
    chosen = ray.put(set(users))

    def with_chunk(table: Any) -> Any:
        among = ray.get(chosen)
        column = [chunk_of(str(user), chunks) if str(user) in among else -1 for user in table["user_id"].to_pylist()]
        keep = [chunk >= 0 and chunk not in done for chunk in column]
        return table.append_column("chunk", pa.array(column, pa.int64())).filter(pa.array(keep, pa.bool_()))

    rows = ray.data.read_parquet(events.parquet()).map_batches(with_chunk, batch_format="pyarrow")
    results = rows.groupby("chunk").map_groups(
        RayWorker, fn_constructor_args=(work,), batch_format="pyarrow", concurrency=processes
    )
    written = set()
    for result in results.iter_rows():
        written.add(result["chunk"])
        yield result
    store = Generations(connect(work.redis_url), work.ranker, work.space)
    for chunk in sorted(set(range(chunks)) - done - written):  # chunks without users
        store.write_chunk(work.generation, chunk, [], np.zeros((0, 0), np.float32), work.created_at, work.options.dtype)


def plan_of(folder: Path, options: Options, *state: object) -> str:
    """Return a digest of everything that a resumed refresh must share with the stopped one."""
    parts = [sha256(folder / "manifest.json"), sha256(folder / META_BLOCK), options.full, *state, options.dtype]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def refresh(
    folder: Path, paths: Sequence[Path], redis_url: str, options: Options, tables: TablesConfig = PLAIN
) -> dict[str, Any]:
    """Publish new vectors of users, then of new items, and return a summary of the work.

    paths: files, folders or patterns of events; tables: how to read them, and the items' fields. Raises StoreError,
    RedisError, ManifestError, OSError or ValueError.
    """
    stated = tuple(read_manifest(folder).history_actions) or tables.history_actions
    events = Events(paths, stated, tables)
    events.check()
    summary = {"generation": None, "kind": "no meta block", "users": 0, "seconds": 0.0}
    if (folder / META_BLOCK).exists():
        summary = refresh_users(folder, events, redis_url, options)
    return summary | {"new_items": refresh_items(folder, events, redis_url, tables)}


def refresh_users(folder: Path, events: Events, redis_url: str, options: Options) -> dict[str, Any]:
    """Publish a new generation of the users' vectors. The first generation of a space is always full."""
    begin = time.time()
    manifest = read_manifest(folder)
    store = Generations(connect(redis_url), manifest.ranker, manifest.space, options.ttl_days)
    status = store.status()
    options = dataclasses.replace(options, full=options.full or not status["live"])
    stated = events.history_actions
    newest = events.newest()
    users = events.users(None if options.full else status["watermark"])
    if not users:
        return {"generation": None, "kind": "nothing new", "users": 0, "seconds": round(time.time() - begin, 2)}
    chunks = math.ceil(len(users) / CHUNK_USERS)
    plan = plan_of(folder, options, status["watermark"], newest, len(users), chunks, stated)
    with store.begin(plan, options.full) as writing:
        resumed = len(writing.done)
        work = Work(folder, redis_url, manifest.ranker, manifest.space, writing.generation, begin, options, stated)
        run = run_on_ray if options.on_ray else run_here
        results = []
        with tqdm(total=len(users), desc=f"generation {writing.generation}", unit=" users", mininterval=1) as progress:
            for result in run(work, events, users, chunks, writing.done, options.processes):
                results.append(result)
                progress.update(int(result["users"]))
        live = store.publish(writing, chunks, newest)
    seconds = time.time() - begin
    adapted = int(sum(r["users"] for r in results))
    cpu = sum(r["adapt_seconds"] for r in results)
    removed = store.sweep() if options.full else 0  # an incremental refresh has swept the users that it wrote
    return {
        "generation": writing.generation,
        "kind": "full" if options.full else "incremental",
        "live": live,
        "users": adapted,
        "users_without_known_events": len(users) - adapted if not resumed else None,
        "chunks": chunks,
        "chunks_resumed": resumed,
        "bytes": int(sum(r["bytes"] for r in results)),
        "fields_removed": removed,
        "seconds": round(seconds, 2),
        "users_per_second": round(adapted / seconds, 1),
        "users_per_second_and_core": round(adapted / cpu, 1) if cpu else None,  # of the adaptation alone
        "processes": options.processes,
    }


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="slatewise refresh",
        description="Adapt users to their newest events, and publish their vectors in the store as a new generation. "
        "You can stop it at any time; the same command continues.",
    )
    parser.add_argument(
        "bundle", type=Path, help="<root>/<ranker>/<version>, or a ranker's newest bundle <root>/<ranker>"
    )
    parser.add_argument("events", type=Path, nargs="+", help="files, folders or patterns with all events of the users")
    parser.add_argument(
        "--toml", type=Path, help="of the training: its [data] and [columns] say how to read the events"
    )
    add_redis_url(parser)
    parser.add_argument("--full", action="store_true", help="all users of the files, not only those with new events")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--ray", action="store_true", help="on Ray: the cluster at RAY_ADDRESS, or one on this machine")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the stored vectors; default: %(default)s"
    )
    parser.add_argument(
        "--ttl-days", type=float, default=0.0, help="drop a user after this many days without a refresh; 0: never"
    )
    parser.add_argument("--items", type=Path, help="table of the items' fields, for new items; default: the TOML's")
    args = parser.parse_args(argv)
    options = Options(args.full, args.processes, args.ray, args.dtype, args.ttl_days)
    tables = read_config(args.toml).tables if args.toml else PLAIN
    if args.items is not None:
        tables = dataclasses.replace(tables, items=str(args.items))
    print(json.dumps(refresh(bundle_folder(args.bundle), args.events, args.redis_url, options, tables)))
