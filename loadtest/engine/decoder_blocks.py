"""Engine time by blocks of the candidates: python -m loadtest.engine.decoder_blocks

The reference model with all of its blocks for the history, and with all, half or one of them for candidates; the values
of weights do not change the time. One thread, a history of 200 events, medians of interleaved runs in milliseconds.

Called by: the command line. Its numbers appear in docs/compression.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from loadtest.engine.drawn import draw_candidates, draw_request
from loadtest.markdown import table
from slatewise.inference.arrays import Candidates, HistoryState
from slatewise.inference.engine import Engine, chunk_of
from slatewise.process import cpu_name
from slatewise_train.bundle_writer import write_graphs
from slatewise_train.demo.reference import reference_model
from slatewise_train.rankers import families
from slatewise_train.rankers.base import uncalibrated

EVENTS = 200
SLATES = (200, 4_096)
DECODER_BLOCKS = (4, 2, 1)


def score(engine: Engine, candidates: Candidates, meta: np.ndarray, state: HistoryState) -> tuple[float, float]:
    """Return the seconds of the exit `point` in chunks, and of the set-wise part of the first chunk."""
    begin = time.perf_counter()
    chunks = range(0, len(candidates), chunk_of(len(candidates)))
    points = [engine.point(candidates, meta, state, slice(first, first + chunks.step)) for first in chunks]
    middle = time.perf_counter()
    engine.set(points[0])
    return middle - begin, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    model = reference_model()
    items = model.item_table().detach().numpy()
    rng = np.random.default_rng(0)
    history, few_candidates, meta = draw_request(model, items, EVENTS, SLATES[0], rng)
    slates = few_candidates, draw_candidates(model, items, SLATES[1], rng)
    with tempfile.TemporaryDirectory() as folder:
        engines = {}
        for count in DECODER_BLOCKS:
            student = families.shrink(model, {"decoder_blocks": count})
            graphs = families.graphs(student, uncalibrated(model.exits, model.config.heads), EVENTS)
            write_graphs(Path(folder) / str(count), graphs.all())
            engines[count] = Engine(Path(folder) / str(count), items, list(model.exits))
    states = {count: engine.extend(engine.start, history) for count, engine in engines.items()}
    seconds: dict[int, list[list[float]]] = {count: [] for count in engines}
    for _ in range(args.repeats):
        for count, engine in engines.items():
            begin = time.perf_counter()
            engine.extend(engine.start, history)
            encode = time.perf_counter() - begin
            few, many = (score(engine, slate, meta, states[count]) for slate in slates)
            seconds[count].append([encode, few[0], few[0] + few[1], many[0]])
    print(f"{cpu_name()}, one thread, {EVENTS} events, medians of {args.repeats} runs\n")
    titles = (
        "blocks of candidates",
        "encode",
        *(f"`point` of {n:,}" for n in SLATES),
        f"`set` of {SLATES[0]}",
        "KB kept",
    )
    lines = []
    for count, runs in seconds.items():
        encode, few, whole, many = (f"{median(column) * 1e3:.2f}" for column in zip(*runs, strict=True))
        lines.append((str(count), encode, few, many, whole, f"{states[count].nbytes / 1024:.0f}"))
    print(table(titles, lines))


if __name__ == "__main__":
    main()
