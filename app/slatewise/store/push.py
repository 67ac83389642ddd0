"""Fills Redis with meta-embeddings: those of a bundle, or vectors of your own.

All users become one full generation, which becomes visible at the end. Repeat the command to resume an interrupted
push. The last line of the output is JSON. Neither torch nor polars is imported.
Called by: cli.py for `slatewise push`. Calls: `generations.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from slatewise.bundle.manifest import ManifestError, bundle_folder, read_manifest
from slatewise.inference.arrays import Float32
from slatewise.store.client import connect
from slatewise.store.codec import DTYPES
from slatewise.store.command_line import add_redis_url
from slatewise.store.generations import BATCH, Generations

PROGRESS_SECONDS = 2.0


def push(
    store: Generations,
    users: list[str],
    vectors: Float32,
    dtype: str = "float32",
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Write and publish the (users, M) vectors as one full generation.

    Return its number, users, bytes, seconds and the live list. `progress` is called with the number of users written.
    Raises StoreError, ValueError and redis-py's exceptions.
    """
    begin = time.perf_counter()
    plan = hashlib.sha256(json.dumps([dtype, vectors.shape, users]).encode() + vectors.tobytes()).hexdigest()
    size = 0
    now = time.time()
    chunks = range(-(-len(users) // BATCH))
    with store.begin(plan, full=True) as writer:
        for chunk in chunks:
            rows = slice(chunk * BATCH, (chunk + 1) * BATCH)
            if chunk not in writer.done:
                size += store.write_chunk(writer.generation, chunk, users[rows], vectors[rows], now, dtype)
            progress(min(rows.stop, len(users)))
        live = store.publish(writer, len(chunks))
    seconds = time.perf_counter() - begin
    return {
        "generation": writer.generation,
        "users": len(users),
        "users_per_second": round(len(users) / seconds),
        "bytes": size,  # of the values written by this call
        "seconds": round(seconds, 3),
        "live": live,
    }


def read(path: Path) -> tuple[str, str, list[str], Float32]:
    """Read (ranker, space, users, vectors) from a bundle, a ranker's newest bundle, or an .npz.

    Raises OSError, or ValueError (ManifestError included) if it cannot be read or has no meta-embeddings.
    """
    try:
        return read_bundle(bundle_folder(path)) if path.is_dir() else read_archive(path)
    except ManifestError:  # names the path
        raise
    except (ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path}: {error}") from error


def read_bundle(folder: Path) -> tuple[str, str, list[str], Float32]:
    """As `read`, from the folder of a bundle. Raises OSError, ValueError or EOFError."""
    manifest = read_manifest(folder)
    if not (folder / "meta_embeddings.npy").exists():
        raise ManifestError(f"{folder}: the bundle has no meta-embeddings")
    users = json.loads((folder / "users.json").read_text())
    return manifest.ranker, manifest.space, users, np.load(folder / "meta_embeddings.npy", allow_pickle=False)


def read_archive(path: Path) -> tuple[str, str, list[str], Float32]:
    """As `read`, from an .npz. Raises OSError, ValueError, KeyError, EOFError or BadZipFile."""
    with path.open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("not an .npz archive")
        vectors = arrays["vectors"].astype(np.float32)
        if vectors.ndim != 2:
            raise ValueError(f"`vectors` has {vectors.ndim} dimensions, expected 2")
        return str(arrays["ranker"]), str(arrays["space"]), arrays["users"].astype(str).tolist(), vectors


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises the errors of `read` and `push`."""
    parser = argparse.ArgumentParser(
        prog="slatewise push",
        description="Fill Redis with meta-embeddings and make them visible at once. Repeat the command to resume it.",
        epilog="An .npz holds `users` (U,), `vectors` (U, M), `ranker` and `space`.",
    )
    parser.add_argument(
        "file",
        type=Path,
        help="a bundle <root>/<ranker>/<version>, a ranker's newest bundle <root>/<ranker>, or an .npz",
    )
    add_redis_url(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the stored vectors (default: float32)")
    parser.add_argument(
        "--ttl-days", type=float, default=0.0, help="delete users that were not written for so many days; 0: never"
    )
    parser.add_argument(
        "--if-empty", action="store_true", help="write nothing if a generation is live, for example that of a refresh"
    )
    args = parser.parse_args(argv)
    ranker, space, users, vectors = read(args.file)
    printed_at = time.monotonic()

    def progress(done: int) -> None:
        nonlocal printed_at
        if time.monotonic() - printed_at > PROGRESS_SECONDS:
            printed_at = time.monotonic()
            print(f"{done:,} of {len(users):,} users", file=sys.stderr)

    with connect(args.redis_url) as client:
        store = Generations(client, ranker, space, args.ttl_days)
        kept = store.live() if args.if_empty else []
        result = {"kept": kept} if kept else push(store, users, vectors, args.dtype, progress)
    print(json.dumps({"ranker": ranker, "space": space} | result))
