"""What a server needs for a large catalogue: python -m loadtest.server.catalogue --items 100000 1000000

Makes a bundle of the reference ranker with so many items, each with a title, and the variants of `--variants`. Version
1 has fp32, and version 2 all of them. A bundle that the folder has already is kept. Then each variant is served alone:
the time from the start of the process to its answer on `/readyz`, its resident memory then and the most until then, and
its resident memory after 200 requests of shape W with users of their own, from one connection. The history cache has
32 MB, so that the memory is that of the catalogue.

Called by: the command line. Linux only: it reads /proc. Its numbers appear in docs/performance.md. Calls:
`demo/reference.py`, `compress.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.client import closed_loop, post
from loadtest.markdown import table
from loadtest.server_process import ServerProcess, exit_on_sigterm
from loadtest.workload import W, Workload
from slatewise.bundle.manifest import read_manifest
from slatewise.cli import run_main
from slatewise.process import cpu_name
from slatewise_train.compress import compress
from slatewise_train.compression.bases import Options
from slatewise_train.compression.source import Source
from slatewise_train.demo.reference import NAME, publish_uncalibrated, reference_content

REQUESTS = 200
EXPORT = "export.json"
HISTORY_CACHE_MB = "32"
COLUMNS = ("items", "variant", "export s", "item table MB", "bundle MB", "ready s", "most MB", "MB ready", "MB after")


def make_bundle(folder: Path, items: int, variants: Sequence[str]) -> None:
    """Publish version 1 with fp32, and version 2 with the variants, unless the folder has it. Writes export.json."""
    if (folder / EXPORT).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)  # a stopped run
    root = folder / "bundles"
    content = reference_content(items)
    titles = {item: {"title": f"The title of item {item}"} for item in content.ids}
    begin = time.perf_counter()
    first = publish_uncalibrated(dataclasses.replace(content, titles=titles), root / NAME, 1)
    seconds = time.perf_counter() - begin
    names = [name for name in variants if name != "fp32"]
    compress(Source(first, None), root, names, Options(checkpoints=folder / "compress"), names)
    (folder / EXPORT).write_text(json.dumps({"seconds": seconds}))


def status_mb(process: int, name: str) -> float:
    """Return a number of /proc/PID/status in MiB: VmRSS, the resident memory, or VmHWM, the most of it so far."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def measure(folder: Path, items: int, variant: str) -> dict[str, Any]:
    root = folder / "bundles"
    bundle = root / NAME / "2"
    manifest = read_manifest(bundle)
    requests = [post("/rerank", body) for body in Workload(root, NAME).distinct(W, REQUESTS)]
    settings = {"BUNDLES": str(root), "VARIANTS": variant, "HISTORY_CACHE_MB": HISTORY_CACHE_MB}
    begin = time.perf_counter()
    with ServerProcess(settings) as server:
        ready = time.perf_counter() - begin
        process = server.process.pid
        most, before = status_mb(process, "VmHWM"), status_mb(process, "VmRSS")
        outcome = closed_loop(server.port, requests, 1)
        if set(outcome.statuses) != {200}:
            raise RuntimeError(f"answers: {dict(outcome.statuses)}")
        after = status_mb(process, "VmRSS")
    table_bytes = (bundle / manifest.variants[variant].items).stat().st_size
    return {
        "items": items,
        "variant": variant,
        "export_s": json.loads((folder / EXPORT).read_text())["seconds"] if variant == "fp32" else None,
        "table_mb": table_bytes / 2**20,
        "bundle_mb": sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) / 2**20,
        "ready_s": ready,
        "most_mb": most,
        "ready_mb": before,
        "after_mb": after,
    }


def cell(value: object) -> object:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.server.catalogue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--items", type=int, nargs="+", default=[100_000], help="default: %(default)s")
    parser.add_argument("--variants", default="fp32,tables8", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("build/catalogue"), help="default: %(default)s")
    parser.add_argument("--only-make", action="store_true", help="make the bundles, and measure nothing")
    args = parser.parse_args(argv)
    exit_on_sigterm()
    variants = args.variants.split(",")
    rows = []
    for items in args.items:
        folder = args.out / str(items)
        make_bundle(folder, items, variants)
        rows += [] if args.only_make else [measure(folder, items, variant) for variant in variants]
    print(f"{cpu_name()}\n")
    print(table(COLUMNS, ([cell(value) for value in row.values()] for row in rows)))
    print(json.dumps({"machine": cpu_name(), "rows": rows}))


if __name__ == "__main__":
    sys.exit(run_main("python -m loadtest.server.catalogue", main, sys.argv[1:]))
