"""The largest requests on one thread: python -m loadtest.engine.large_requests [--agreement]

Shape W with 4,096 candidates by exit, in the chunks of a server, with all, half or one of the blocks for candidates,
in float32 and with integer products. The weights are random, whose values do not change the time. Medians of
interleaved runs in milliseconds.

With `--agreement` the trained demo instead: how many of the first ten of all films that are new to a user are those of
the exit `point` in float32, and the ranking of the 20 films that the user rated next. Held-out users of MovieLens 1M;
needs `make movielens`.

Called by: the command line. Its numbers appear in docs/performance.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

from loadtest.engine.drawn import Request, draw_request
from loadtest.engine.low_rank import integers
from loadtest.markdown import table
from slatewise.bundle.loader import load_rankers
from slatewise.bundle.ranker import Ranker, weighted_mean
from slatewise.inference.arrays import FIRST_ITEM
from slatewise.inference.chunks import run_all
from slatewise.inference.engine import Engine
from slatewise.process import cpu_name
from slatewise.ranking.cascade import StageScores, run_cascade
from slatewise_train.bundle_writer import write_graphs
from slatewise_train.compression.quantize import RecordingEngine
from slatewise_train.config import read_config
from slatewise_train.data import Data, load_data
from slatewise_train.demo.reference import reference_model
from slatewise_train.evaluation.cases import Case, candidates_of, slate_cases, state_of
from slatewise_train.evaluation.metrics import DEPTH, interval, ndcg, top_rows
from slatewise_train.evaluation.sampling import in_parallel, sample_users
from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerModel, uncalibrated

EVENTS = 256
CANDIDATES = 4_096
CALIBRATION = 200  # candidates of the request that gives the ranges of the integers
DECODER_BLOCKS = (4, 2, 1)
EXITS = ("dot", "point", "set")


def engines_of(model: RankerModel, items: np.ndarray, scratch: Path) -> Iterator[tuple[str, Engine]]:
    """Yield each form of the reference model by name."""
    exits = list(EXITS)
    calibration = draw_request(model, items, EVENTS, CALIBRATION, np.random.default_rng(0))
    for blocks in DECODER_BLOCKS:
        form = families.shrink(model, {"decoder_blocks": blocks})
        plain = families.graphs(form, uncalibrated(model.exits, model.config.heads), EVENTS).all()
        for name in ("fp32", "int8"):
            folder = scratch / f"{blocks}-{name}"
            write_graphs(folder, plain)
            if name == "int8":
                write_graphs(folder, integers(plain, RecordingEngine(folder, items, exits), calibration))
            yield f"{blocks} {name}", Engine(folder, items, exits)


def measure(engines: dict[str, Engine], request: Request, repeats: int) -> dict[str, list[float]]:
    """Return the median milliseconds of each exit, by engine. They take turns; the history is encoded before."""
    history, candidates, meta = request
    states = {name: engine.extend(engine.start, history) for name, engine in engines.items()}
    seconds: dict[str, list[list[float]]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            run = []
            for exit in EXITS:
                begin = time.perf_counter()
                run_all(run_cascade(engine, candidates, states[name], meta, exit, False, []))
                run.append(time.perf_counter() - begin)
            seconds[name].append(run)
    return {name: [1e3 * median(column) for column in zip(*runs, strict=True)] for name, runs in seconds.items()}


def measure_times(repeats: int) -> str:
    model = reference_model()
    items = model.item_table().detach().numpy()
    with tempfile.TemporaryDirectory() as scratch:
        engines = dict(engines_of(model, items, Path(scratch)))
        request = draw_request(model, items, EVENTS, CANDIDATES, np.random.default_rng(0))
        found = measure(engines, request, repeats)
    rows = ((*name.split(), *(f"{ms:.1f}" for ms in times)) for name, times in found.items())
    return table(("blocks of candidates", "numbers", *(f"`{exit}`" for exit in EXITS)), rows)


def rank_new_films(ranker: Ranker, data: Data, case: Case) -> dict[str, tuple[float, float]]:
    """Rank all films that are new to a user, by variant and exit.

    Returns the share of the first ten that fp32's `point` has too, and the NDCG@10 of the next films.
    """
    weights = ranker.score_weights(None)
    rows = np.setdiff1d(np.arange(FIRST_ITEM, len(ranker.items)), np.setdiff1d(case.seen, case.upcoming))
    chosen = np.isin(rows, case.upcoming).astype(float)
    scores = {}
    for name, engine in ranker.engines.items():
        candidates, state = candidates_of(engine, data, rows, case.time), state_of(engine, case)
        for exit in EXITS:
            completed: list[StageScores] = []
            run_all(run_cascade(engine, candidates, state, ranker.default_meta, exit, False, completed))
            scores[f"{name} {exit}"] = weighted_mean(completed[-1].probabilities, weights)
    first = top_rows(scores["fp32 point"][None])[0]
    return {
        name: (len(np.intersect1d(first, top_rows(of_way[None])[0])) / DEPTH, ndcg(of_way, chosen))
        for name, of_way in scores.items()
    }


def measure_agreement(bundles: Path, toml: Path, users: int) -> str:
    config = read_config(toml)
    data = load_data(config.data, config.tables, config.stated)
    ranker = load_rankers(bundles)[config.data.name]
    cases = slate_cases(data, sample_users(data.split.slate_users, users))
    found = in_parallel(lambda case: rank_new_films(ranker, data, case), cases, "users")
    reference = np.array([each["fp32 point"][1] for each in found])
    rows = []
    for name in found[0]:
        agreement, gain = np.array([each[name] for each in found]).T
        difference, low, high = interval(gain - reference)
        share = f"{gain.mean() / reference.mean():.1%}"
        variant, exit = name.split()
        cells = f"{agreement.mean():.3f}", f"{gain.mean():.4f}", share, f"{difference:+.4f} ({low:+.4f} to {high:+.4f})"
        rows.append((variant, f"`{exit}`", *cells))
    return table(("variant", "exit", "of the first ten", "NDCG@10", "of fp32's `point`", "difference"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agreement", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--users", type=int, default=400, help="of the agreement (default: %(default)s)")
    parser.add_argument("--bundles", type=Path, default=Path("models/bundles"), help="of the demo")
    parser.add_argument("--toml", type=Path, default=Path("models/movielens.toml"), help="of the demo")
    args = parser.parse_args()
    if args.agreement:
        print(measure_agreement(args.bundles, args.toml, args.users))
        return
    print(f"{cpu_name()}, one thread, {EVENTS} events, {CANDIDATES:,} candidates, medians of {args.repeats} runs\n")
    print(measure_times(args.repeats))


if __name__ == "__main__":
    main()
