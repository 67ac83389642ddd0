"""Measure latency and resident memory of variants on this machine, with one thread.

Called by: `bundle_writer.py`, `compress.py`, `compression/variants.py`, `loadtest/`. Calls: `inference/engine.py`,
tqdm; `parity.py` for random requests.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from slatewise.bundle.manifest import Manifest
from slatewise.inference.arrays import FIRST_ITEM, Candidates
from slatewise.inference.engine import Engine
from slatewise.inference.item_table import read_item_table
from slatewise.process import cpu_name
from slatewise_train.evaluation.parity import Requests

SLATES = (50, 200, 500)  # candidates
STATUS = Path("/proc/self/status")  # only Linux has this file


def measure_latency(engines: dict[str, Engine], manifest: Manifest, repeats: int = 60) -> dict[str, dict[str, Any]]:
    """Measure the time of engines on random requests. Returns, by engine: machine, threads and rows.

    A row has p50 and p99 in milliseconds for one length of history and one size of slate. `encode` is the time to
    encode the history, `score` the time to score the slate at the highest exit. The engines take turns, so that a
    change of the machine's speed affects all of them.
    """
    draw = Requests(next(iter(engines.values())), manifest)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    shapes = list(itertools.product((50, min(200, manifest.limits.history_used)), SLATES))
    for events, n in tqdm(shapes, desc="latency", mininterval=1):
        for name, quantiles in measure_shape(engines, draw, events, n, repeats).items():
            rows[name].append({"history": events, "candidates": n} | quantiles)
    return {name: {"machine": cpu_name(), "threads": 1, "rows": found} for name, found in rows.items()}


def measure_shape(
    engines: dict[str, Engine], draw: Requests, events: int, n: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Measure one history length and one slate size.

    Returns, by engine: encode_p50, encode_p99, score_p50 and score_p99 in milliseconds.
    """
    history = draw.history(events)
    drawn = draw.candidates(n)
    meta = draw.meta()
    rows = draw.rng.integers(FIRST_ITEM, len(draw.engine.items), n)
    states = {name: engine.extend(engine.start, history) for name, engine in engines.items()}
    seconds: dict[str, dict[str, list[float]]] = {name: {"encode": [], "score": []} for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            begin = time.perf_counter()
            engine.extend(engine.start, history)
            seconds[name]["encode"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            candidates = Candidates(engine.items.take(rows, axis=0), drawn.numeric, drawn.context)
            point = engine.point(candidates, meta, states[name])
            if "set" in draw.manifest.exits:
                engine.set(point)
            seconds[name]["score"].append(time.perf_counter() - begin)
    return {
        name: {
            f"{stage}_p{percent}": round(float(np.quantile(values, percent / 100)) * 1e3, 3)
            for stage, values in stages.items()
            for percent in (50, 99)
        }
        for name, stages in seconds.items()
    }


def resident_bytes(folder: Path, table: Path, exits: list[str]) -> int | None:
    """Return the resident memory that one variant adds to a fresh process, with its whole item table read.

    The result is None on an operating system that does not report resident memory in STATUS.
    """
    if not STATUS.exists():
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(resident_growth, (folder, table, exits))


def resident_growth(folder: Path, table: Path, exits: list[str]) -> int:
    """Load a variant and return the bytes of resident memory that it adds to this process."""
    before = process_bytes()
    engine = Engine(folder, read_item_table(table), exits)
    after = process_bytes()
    del engine  # it must live until the second measurement
    return after - before


def process_bytes() -> int:
    """Return the resident memory of this process. Raises OSError if STATUS does not exist."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
