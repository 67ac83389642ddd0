"""The store of meta-embeddings with a real Redis: python -m loadtest.store [--users 200000]

    updates   generations are pushed, switched and rolled back while the demo answers requests (open loop, HTTP)
    look-ups  p50 and p99 without the cache, one at a time and 64 concurrent ones
    faults    look-ups through a proxy: added latency of each fault, and when the circuit opens and closes
    memory    bytes of a user in Redis, by data type and number of live generations

Prints Markdown tables, then a line of JSON. Client, server and Redis share this machine's cores.

Called by: the command line. Its numbers appear in docs/store.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import uvloop

from loadtest.server_process import exit_on_sigterm
from loadtest.store.faults import measure_faults
from loadtest.store.lookups import measure_look_ups, ranker_stub
from loadtest.store.memory import measure_memory
from loadtest.store.report import report
from loadtest.store.updates import measure_updates
from slatewise.bundle.manifest import read_manifest
from slatewise.process import cpu_name
from tests.support.redis_server import run_redis


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundles", type=Path, default=Path("models/bundles"))
    parser.add_argument("--ranker", default="movielens")
    parser.add_argument("--users", type=int, default=200_000)
    args = parser.parse_args()
    exit_on_sigterm()
    folder = max((args.bundles / args.ranker).glob("[0-9]*"), key=lambda path: int(path.name))
    manifest = read_manifest(folder)
    users = [f"u{k}" for k in range(args.users)]
    target = (manifest.ranker, manifest.space, manifest.meta_size)
    ranker = ranker_stub(*target)
    result: dict[str, Any] = {"machine": cpu_name(), "users": args.users, "dim": manifest.meta_size}
    with tempfile.TemporaryDirectory() as home, run_redis(Path(home)) as port:
        result["serve"] = measure_updates(args.bundles, *target, users, port)
        result["look_ups"] = uvloop.run(measure_look_ups(ranker, users, port))
        result["faults"] = uvloop.run(measure_faults(ranker, users, port))
        result["memory"] = measure_memory(*target, users, port)
    print(report(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
