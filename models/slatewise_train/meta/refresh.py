"""The refresh job: users' newest events become vectors in the store, while it is served.

    python -m slatewise_train.meta.refresh refresh BUNDLE EVENTS...     users with new events; --full: all; --ray: on a Ray cluster
    python -m slatewise_train.meta.refresh status | roll-back | merge | sweep BUNDLE
    python -m slatewise_train.meta.refresh forget BUNDLE USER

Stop `refresh` when you like: the same command goes on where it was. Nothing of it is visible before its last step, one update of
the pointer. EVENTS are Parquet files as for training (`data.py`) and hold all that is to count of a user, not just what is new.
Before: a bundle with `meta_block.npz` (`limaml.py`). After: `app/slatewise/store/lookup.py` serves the vectors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from redis.exceptions import RedisError
from tqdm import tqdm

from slatewise.bundle.loader import sha256
from slatewise.bundle.manifest import ManifestError, read_manifest
from slatewise.store.client import connect
from slatewise.store.generations import Generations, StoreError
from slatewise_train.data import DataConfig, Head, Vocabulary, build_sequences, clean_events
from slatewise_train.meta.limaml import META_BLOCK, known_events, load_learner, user_vectors
from slatewise_train.rankers.weights import load_model

CLOCKS_APART = 3_600.0  # seconds that the clock of an event may be ahead
CHUNK_USERS = 1_000  # about as many are adapted, written and checked together; what is done is kept by chunk


class Adapter:
    """A bundle's ranker and meta block: events to vectors."""

    def __init__(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        self.ranker = load_model(folder, manifest)
        self.ranker.requires_grad_(False)
        self.learner, self.kinds = load_learner(folder / META_BLOCK)
        ids = json.loads((folder / "ids.json").read_text())
        self.vocabulary = Vocabulary(ids, manifest.actions, {})
        heads = tuple(
            Head(name, kind, weight) for (name, weight), kind in zip(manifest.heads.items(), self.kinds, strict=True)
        )
        self.config = DataConfig(manifest.ranker, heads, history_length=manifest.limits.history_used)

    def vectors_of(self, events: pl.DataFrame) -> tuple[list[str], np.ndarray]:
        """The users of whom the ranker knows an event, and their vectors (U, M) float32."""
        clean, _ = clean_events(events, max_bad_share=1.0)
        known = known_events(build_sequences(clean, self.vocabulary, self.config))
        vectors = user_vectors(self.learner, self.ranker, self.kinds, known, self.config.history_length)
        rows = np.flatnonzero(np.diff(known.offsets))
        return [known.users[row] for row in rows], vectors[rows]


@dataclass(frozen=True)
class Work:
    """What a worker needs to know of a refresh, wherever it runs."""

    folder: Path
    redis_url: str = field(repr=False)  # may hold a password
    ranker: str
    space: str
    generation: int
    created_at: float
    dtype: str
    ttl_days: float


class Worker:
    """`worker(chunk, events)` adapts the users of a chunk and writes them; one a process, on this machine or on a Ray cluster."""

    def __init__(self, work: Work) -> None:
        torch.set_num_threads(1)
        self.work = work
        self.adapter = Adapter(work.folder)
        self.store = Generations(connect(work.redis_url), work.ranker, work.space, work.ttl_days)

    def __call__(self, chunk: int, events: pl.DataFrame) -> dict[str, float]:
        begin = time.process_time()
        users, vectors = self.adapter.vectors_of(events)
        seconds = time.process_time() - begin
        size = self.store.write_chunk(
            self.work.generation, chunk, users, vectors, self.work.created_at, self.work.dtype
        )
        return {"chunk": chunk, "users": len(users), "bytes": size, "adapt_seconds": seconds}


@dataclass(frozen=True)
class Events:
    """The Parquet files of a refresh."""

    paths: Sequence[Path]

    @cached_property
    def table(self) -> pl.LazyFrame:
        """As text and numbers: ids may be integers, and files may differ in that."""
        frames = [pl.scan_parquet(path) for path in self.paths]
        cast = [pl.col("user_id", "item_id").cast(pl.String), pl.col("timestamp").cast(pl.Float64, strict=False)]
        return pl.concat([frame.with_columns(cast) for frame in frames], how="diagonal_relaxed")

    def newest(self) -> float:
        """The time of the newest event, of those that can have happened: one of the far future would hide all that come before it."""
        happened = pl.col("timestamp").is_finite() & (pl.col("timestamp") <= time.time() + CLOCKS_APART)
        found = self.table.filter(happened).select(pl.col("timestamp").max()).collect().item()
        return float(found or 0.0)

    def users(self, after: float | None) -> list[str]:
        """All of them, or those with an event after a time."""
        table = self.table if after is None else self.table.filter(pl.col("timestamp") > after)
        return sorted(table.select(pl.col("user_id").drop_nulls().unique()).collect()["user_id"].to_list())


def chunk_of(user: str, chunks: int) -> int:
    return zlib.crc32(user.encode()) % chunks


def run_here(
    work: Work, events: Events, users: list[str], chunks: int, done: set[int], processes: int
) -> Iterator[dict[str, float]]:
    """The results of the chunks that are not done, from processes of this machine."""
    chosen = pl.LazyFrame(
        {"user_id": users, "chunk": [chunk_of(user, chunks) for user in users]},
        schema={"user_id": pl.String, "chunk": pl.Int64},
    )
    table = events.table.join(
        chosen.filter(~pl.col("chunk").is_in(sorted(done))), on="user_id", maintain_order="left"
    ).collect()
    parts = {int(key[0]): part.drop("chunk") for key, part in table.partition_by("chunk", as_dict=True).items()}
    empty = table.clear().drop("chunk")
    todo = [chunk for chunk in range(chunks) if chunk not in done]
    if processes == 1:
        alone = Worker(work)
        yield from (alone(chunk, parts.get(chunk, empty)) for chunk in todo)
        return
    context = multiprocessing.get_context(
        "spawn"
    )  # a fork would copy threads of torch and polars in whatever state they are
    with ProcessPoolExecutor(processes, context, start_worker, (work,)) as pool:
        try:
            for future in as_completed([pool.submit(run_chunk, chunk, parts.get(chunk, empty)) for chunk in todo]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def start_worker(work: Work) -> None:
    """In a process of the pool: it has one worker, for all chunks that it is given."""
    global worker
    worker = Worker(work)


def run_chunk(chunk: int, events: pl.DataFrame) -> dict[str, float]:
    return worker(chunk, events)


class RayWorker:
    """A `Worker` as Ray Data calls it: a group of rows that share their chunk in, one row out."""

    def __init__(self, work: Work) -> None:
        self.worker = Worker(work)

    def __call__(self, group: Any) -> Any:
        import pyarrow as pa

        events = pl.DataFrame(pl.from_arrow(group))
        return pa.Table.from_pylist([self.worker(int(events["chunk"][0]), events.drop("chunk"))])


def run_on_ray(
    work: Work, events: Events, users: list[str], chunks: int, done: set[int], processes: int
) -> Iterator[dict[str, float]]:
    """The same on a Ray cluster: it reads the files, brings a user's events together, and the workers write to the store."""
    import pyarrow as pa
    import ray

    ray.init(
        ignore_reinit_error=True, log_to_driver=False, num_cpus=None if os.environ.get("RAY_ADDRESS") else processes + 1
    )
    chosen = ray.put(set(users))

    def with_chunk(table: Any) -> Any:
        among = ray.get(chosen)
        of = [chunk_of(str(user), chunks) if str(user) in among else -1 for user in table["user_id"].to_pylist()]
        keep = [chunk >= 0 and chunk not in done for chunk in of]
        return table.append_column("chunk", pa.array(of, pa.int64())).filter(pa.array(keep, pa.bool_()))

    rows = ray.data.read_parquet([str(path.resolve()) for path in events.paths]).map_batches(
        with_chunk, batch_format="pyarrow"
    )
    results = rows.groupby("chunk").map_groups(
        RayWorker, fn_constructor_args=(work,), batch_format="pyarrow", concurrency=processes
    )
    written = set()
    for result in results.iter_rows():
        written.add(result["chunk"])
        yield result
    store = Generations(connect(work.redis_url), work.ranker, work.space)
    for chunk in sorted(set(range(chunks)) - done - written):  # no user fell into it
        store.write_chunk(work.generation, chunk, [], np.zeros((0, 0), np.float32), work.created_at, work.dtype)


def refresh(
    folder: Path,
    events: Events,
    redis_url: str,
    *,
    full: bool,
    processes: int,
    on_ray: bool,
    dtype: str,
    ttl_days: float,
) -> dict[str, Any]:
    """A new generation with the users who have events since the last one, or with all; what was done. Raises StoreError."""
    begin = time.time()
    manifest = read_manifest(folder)
    store = Generations(connect(redis_url), manifest.ranker, manifest.space, ttl_days)
    status = store.status()
    full = full or not status["live"]
    newest = events.newest()
    users = events.users(None if full else status["watermark"])
    if not users:
        return {"generation": None, "kind": "nothing new", "users": 0, "seconds": round(time.time() - begin, 2)}
    chunks = math.ceil(len(users) / CHUNK_USERS)
    parts = [
        sha256(folder / "manifest.json"),
        sha256(folder / META_BLOCK),
        full,
        status["watermark"],
        newest,
        len(users),
        chunks,
        dtype,
    ]
    plan = hashlib.sha256(repr(parts).encode()).hexdigest()
    with store.begin(plan, full) as writing:
        resumed = len(writing.done)
        work = Work(folder, redis_url, manifest.ranker, manifest.space, writing.generation, begin, dtype, ttl_days)
        results = []
        with tqdm(total=len(users), desc=f"generation {writing.generation}", unit=" users", mininterval=1) as progress:
            for result in (run_on_ray if on_ray else run_here)(work, events, users, chunks, writing.done, processes):
                results.append(result)
                progress.update(int(result["users"]))
        live = store.publish(writing, chunks, newest)
    seconds = time.time() - begin
    adapted = int(sum(r["users"] for r in results))
    cpu = sum(r["adapt_seconds"] for r in results)
    removed = store.sweep() if full else 0  # an incremental one has removed them from those it wrote
    return {
        "generation": writing.generation,
        "kind": "full" if full else "incremental",
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
        "processes": processes,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("refresh", "adapt users to their newest events and publish a generation"),
        ("status", "what is live, and what is being written"),
        ("roll-back", "take the newest generation back"),
        ("merge", "bring all live generations into one"),
        ("sweep", "remove what no generation needs any more"),
        ("forget", "remove all that is stored of a user"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("bundle", type=Path, help="<root>/<ranker>/<version>")
        command.add_argument("--redis-url", default=os.environ.get("SLATEWISE_REDIS_URL", "redis://127.0.0.1:6379/0"))
        if name == "forget":
            command.add_argument("user")
        if name == "refresh":
            command.add_argument("events", type=Path, nargs="+", help="Parquet files")
            command.add_argument(
                "--full", action="store_true", help="all users of the files, not only those with new events"
            )
            command.add_argument("--processes", type=int, default=os.cpu_count() or 1)
            command.add_argument(
                "--ray", action="store_true", help="on Ray: RAY_ADDRESS's cluster, or one on this machine"
            )
            command.add_argument(
                "--dtype", choices=("float32", "float16", "int8"), default="float32", help="of the stored vectors"
            )
            command.add_argument(
                "--ttl-days",
                type=float,
                default=0.0,
                help="after which a user who is not written again is dropped; 0: never",
            )
    args = parser.parse_args(arguments)
    try:
        if args.command == "refresh":
            options = {
                "full": args.full,
                "processes": args.processes,
                "on_ray": args.ray,
                "dtype": args.dtype,
                "ttl_days": args.ttl_days,
            }
            print(json.dumps(refresh(args.bundle, Events(args.events), args.redis_url, **options)))
            return
        manifest = read_manifest(args.bundle)
        store = Generations(connect(args.redis_url), manifest.ranker, manifest.space)
        answers = {
            "status": store.status,
            "roll-back": lambda: {"live": store.roll_back()},
            "merge": lambda: {"live": store.merge()},
            "sweep": lambda: {"fields_removed": store.sweep()},
            "forget": lambda: {"forgotten": store.delete_user(args.user)},
        }
        print(json.dumps(answers[args.command]()))
    except (StoreError, ManifestError, RedisError, pl.exceptions.PolarsError, OSError, ValueError) as error:
        sys.exit(f"{args.command}: {error}")


if __name__ == "__main__":
    main()
