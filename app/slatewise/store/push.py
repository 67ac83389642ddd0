"""Fill a Redis store without torch: python -m slatewise.store.push FILE --redis-url redis://127.0.0.1:6379/0

FILE is a bundle's folder, a ranker's (its newest version), or an .npz with `users` (U,), `vectors` (U, M), `ranker` and `space`. All of it becomes one full
generation, visible at the end by one change of the pointer; a push that was stopped goes on where it was.
The last line is JSON. Before: a bundle, or vectors of your own. After: `meta_embeddings.RedisStore` reads what this wrote.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slatewise.bundle.loader import versions
from slatewise.bundle.manifest import ManifestError, read_manifest
from slatewise.inference.arrays import Float32
from slatewise.store.client import connect
from slatewise.store.codec import DTYPES
from slatewise.store.generations import BATCH, Generations


def push(
    store: Generations,
    users: list[str],
    vectors: Float32,
    dtype: str = "float32",
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Write and publish one full generation: its number, users, bytes, seconds and live list."""
    begin = time.perf_counter()
    plan = hashlib.sha256(json.dumps([dtype, vectors.shape, users]).encode() + vectors.tobytes()).hexdigest()
    size = 0
    now = time.time()
    chunks = range(-(-len(users) // BATCH))
    with store.begin(plan, full=True) as writing:
        for chunk in chunks:
            rows = slice(chunk * BATCH, (chunk + 1) * BATCH)
            if chunk not in writing.done:
                size += store.write_chunk(writing.generation, chunk, users[rows], vectors[rows], now, dtype)
            progress(min(rows.stop, len(users)))
        live = store.publish(writing, len(chunks))
    seconds = time.perf_counter() - begin
    return {
        "generation": writing.generation,
        "users": len(users),
        "users_per_second": round(len(users) / seconds),
        "bytes": size,  # of the values written now
        "seconds": round(seconds, 3),
        "live": live,
    }


def read(path: Path) -> tuple[str, str, list[str], Float32]:
    """(ranker, space, users, vectors) of a bundle's folder, of a ranker's newest bundle, or of an .npz."""
    if path.is_dir():
        path = path if (path / "manifest.json").exists() else path / str(max(versions(path), default=0))
        manifest = read_manifest(path)
        users = json.loads((path / "users.json").read_text())
        return manifest.ranker, manifest.space, users, np.load(path / "meta_embeddings.npy", allow_pickle=False)
    with np.load(path, allow_pickle=False) as arrays:
        return (
            str(arrays["ranker"]),
            str(arrays["space"]),
            arrays["users"].astype(str).tolist(),
            arrays["vectors"].astype(np.float32),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="<root>/<ranker>/<version>, <root>/<ranker>, or an .npz")
    parser.add_argument("--redis-url", default=os.environ.get("SLATEWISE_REDIS_URL") or "redis://127.0.0.1:6379/0")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--ttl-days", type=float, default=0.0, help="forget users that were not written for so long; 0: never"
    )
    args = parser.parse_args()
    try:
        ranker, space, users, vectors = read(args.file)
    except (ManifestError, OSError, ValueError, KeyError) as error:
        sys.exit(f"{args.file}: {error}")
    said = time.monotonic()

    def progress(done: int) -> None:
        nonlocal said
        if time.monotonic() - said > 2:
            said = time.monotonic()
            print(f"{done:,} of {len(users):,} users", file=sys.stderr)

    with connect(args.redis_url) as client:
        result = push(Generations(client, ranker, space, args.ttl_days), users, vectors, args.dtype, progress)
    print(json.dumps({"ranker": ranker, "space": space} | result))


if __name__ == "__main__":
    main()
