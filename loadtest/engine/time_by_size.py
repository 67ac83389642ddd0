"""Engine time by request size, in chunks as in a server: python -m loadtest.engine.time_by_size

One thread, medians of interleaved runs: encoding by number of events, the exit `point` and the set-wise part by number
of candidates, both together with a prune, and one appended event by the length of the cached history. Then the share of
causal attention that the mask discards. The last line is JSON.

Called by: the command line, after `make reference-bundle`. Its numbers appear in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from loadtest.markdown import table
from slatewise.bundle.loader import load_rankers
from slatewise.inference.arrays import Candidates, History, KeptState
from slatewise.inference.chunks import run_all
from slatewise.inference.engine import HISTORY_CHUNK, Engine
from slatewise.process import cpu_name
from slatewise.pruning import Pruned
from slatewise.ranking.cascade import extend, run_cascade, run_pruned

EVENTS = (256, 512, 1_024, 2_048)
CANDIDATES = (200, 512, 1_024, 2_048, 4_096)
SLATES = (200, 512, 1_024)
PRUNES = (Pruned("set", 4_096, 200), Pruned("set", 1_024, 200), Pruned("set", 512, 100), Pruned("point", 1_024, 1_024))


def milliseconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: round(median(times) * 1e3, 3) for name, times in seconds.items()}


def masked_share(events: int) -> float:
    """Share of the products of causal attention that the mask discards, in chunks of HISTORY_CHUNK events."""
    rows = np.arange(events)
    computed = np.minimum((rows // HISTORY_CHUNK + 1) * HISTORY_CHUNK, events) + 1
    return float(1 - (rows + 2).sum() / computed.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, default=Path("build/bundles"))
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    ranker = next(iter(load_rankers(args.bundles).values()))
    engine = ranker.engines[ranker.default_variant]
    meta = ranker.default_meta
    rng = np.random.default_rng(0)

    def history(n: int) -> History:
        return History(
            rng.integers(2, len(engine.items), n),
            rng.integers(0, len(ranker.manifest.actions), n),
            rng.integers(2, 9, n),
        )

    def candidates(n: int) -> Candidates:
        vectors = engine.items.take(rng.integers(2, len(engine.items), n), axis=0)
        numeric = rng.normal(size=(n, len(ranker.manifest.features))).astype(np.float32)
        return Candidates(vectors, numeric, np.zeros((1, 4), np.float32))

    def encode(of: Engine, events: History) -> KeptState:
        return run_all(extend(of, of.start, 0, events, pack=False))

    histories = {n: history(n) for n in EVENTS}
    slates = {n: candidates(n) for n in CANDIDATES}
    states = {n: encode(engine, events) for n, events in histories.items()}
    state = states[256]
    more = history(1)

    def point(n: int) -> object:
        return run_all(run_cascade(engine, slates[n], state, meta, "point", False, []))

    def pruned(to: Pruned) -> object:
        weights = ranker.score_weights(None)
        return run_all(run_pruned(engine, slates[CANDIDATES[-1]], state, meta, to, weights, []))

    cached = {n: engine.prefix(states[n].unpacked(), n - 1) for n in EVENTS}
    points = {n: engine.point(slates[n], meta, state.unpacked()) for n in SLATES}
    runs: dict[str, Callable[[], object]] = {}
    runs |= {f"encode {n}": partial(encode, engine, histories[n]) for n in EVENTS}
    runs |= {f"one event after {n - 1}": partial(engine.extend, cached[n], more) for n in EVENTS}
    runs |= {f"point {n}": partial(point, n) for n in CANDIDATES}
    runs |= {f"set-wise part {n}": partial(engine.set, points[n]) for n in SLATES}
    runs |= {f"{CANDIDATES[-1]}, point {to.point}, {to.exit} {to.last}": partial(pruned, to) for to in PRUNES}
    found = milliseconds(runs, args.repeats)
    print(f"{cpu_name()}, one thread, medians of {args.repeats} runs\n")
    print(table(("work", "ms"), ((name, f"{ms:.2f}") for name, ms in found.items())))
    ratios = {
        "encode 2,048 / 256": found["encode 2048"] / found["encode 256"],
        "point 4,096 / 512": found["point 4096"] / found["point 512"],
        "set-wise part 1,024 / 512": found["set-wise part 1024"] / found["set-wise part 512"],
        "masked share of causal attention, 256": masked_share(256),
        "masked share of causal attention, 2,048": masked_share(2_048),
    }
    print(json.dumps({"machine": cpu_name(), "ms": found} | {name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
