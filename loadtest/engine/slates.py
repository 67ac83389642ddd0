"""Ways to rank more candidates set-wise than one slate holds: python -m loadtest.engine.slates

Each way cuts the candidates into slates, ranks each slate by the exit `set`, and makes one order of the results. It is
compared with one slate of all candidates, and with the films that the user rated next.

    served        `inference/slates.py`: each candidate in one slate, the slates alike
    sorted        one slate too: the best by `point` in the first one, the next best in the second one
    mean, r       r random slates; the mean of the probabilities
    win rate, r   the same slates, but only their orders count: the share of its neighbours that a candidate beats
    PageRank, r   the same orders as a graph, from each candidate to those that beat it (JointRank, arXiv 2506.22262)

The requests: held-out users of MovieLens 1M after their training events. The candidates are the next 20 films of a
user, and others that are new to the user, drawn from a seed. With `--random`: the reference ranker, whose set-wise
block has random weights and moves more candidates, and random requests of shape W with 4,096 candidates.

Called by: the command line, after `make movielens`, or `make reference-bundle`. Its numbers appear in models/LOG.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from loadtest.markdown import table
from slatewise.bundle.loader import load_rankers
from slatewise.bundle.ranker import Ranker, weighted_mean
from slatewise.inference.arrays import CONTEXT_SIZE, FIRST_ITEM, Candidates, History, PointScores
from slatewise.inference.engine import Engine
from slatewise.inference.slates import deal, slate_count
from slatewise_train.config import read_config
from slatewise_train.data import Data, load_data
from slatewise_train.evaluation.cases import Case, candidates_of, slate_cases, state_of
from slatewise_train.evaluation.metrics import DEPTH, interval, ndcg, top_rows
from slatewise_train.evaluation.sampling import in_parallel, sample_users

SIZES = ((2_048, 1_024), (3_072, 1_024), (2_048, 256))  # candidates, and the set-wise limit
RANDOM_SIZE = (4_096, 1_024)
RANDOM_EVENTS = 256
REPLICAS = (1, 2, 3)  # random slates of a candidate
COMPARED = 3  # of them, for the orders
DAMPING = 0.85  # of PageRank
STEPS = 50

Slates = Sequence[np.ndarray]  # rows of the candidates in each slate
Request = tuple[PointScores, np.ndarray | None]  # candidates, and labels (N,) if they are known


def random_slates(count: int, most: int, replicas: int, rng: np.random.Generator) -> Slates:
    """Put each candidate into `replicas` slates: so many random partitions."""
    parts = slate_count(count, most)
    return [slate for _ in range(replicas) for slate in np.array_split(rng.permutation(count), parts)]


def mean(slates: Slates, found: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Return each candidate's mean probabilities over its slates: (count, heads)."""
    total, times = np.zeros((count, found[0].shape[1])), np.zeros((count, 1))
    for rows, probabilities in zip(slates, found, strict=True):
        total[rows] += probabilities
        times[rows] += 1
    return total / times


def win_rate(slates: Slates, scores: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Return the share of its neighbours that each candidate beats: (count,)."""
    wins, compared = np.zeros(count), np.zeros(count)
    for rows, of_slate in zip(slates, scores, strict=True):
        wins[rows[np.argsort(of_slate, kind="stable")]] += np.arange(len(rows))
        compared[rows] += len(rows) - 1
    return wins / compared


def page_rank(slates: Slates, scores: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Return the PageRank of each candidate (count,): from each one, an edge leads to each neighbour that beats it."""
    edges = np.zeros((count, count), np.float32)
    for rows, of_slate in zip(slates, scores, strict=True):
        edges[np.ix_(rows, rows)] += of_slate[None, :] > of_slate[:, None]
    leaving = edges.sum(axis=1, keepdims=True)
    edges /= np.maximum(leaving, 1)
    stuck = leaving[:, 0] == 0  # never beaten: its weight is spread over all
    weights = np.full(count, 1 / count, np.float32)
    for _ in range(STEPS):
        weights = DAMPING * (weights @ edges + weights[stuck].sum() / count) + (1 - DAMPING) / count
    return weights


def scores_of(engine: Engine, point: PointScores, weights: np.ndarray, most: int, seed: int) -> dict[str, np.ndarray]:
    """Return the (N,) scores of each way, of `point` and of one slate. weights: (heads,)."""
    count = len(point)
    rng = np.random.default_rng(seed)
    order = np.argsort(-point.probabilities.sum(axis=1), kind="stable")
    found = {
        "`point`": weighted_mean(point.probabilities, weights),
        "one slate": weighted_mean(engine.set(point), weights),
    }
    designs: dict[str, Slates] = {
        "served": deal(point, most),
        "sorted": np.array_split(order, slate_count(count, most)),
        **{f"mean, {r}": random_slates(count, most, r, rng) for r in REPLICAS},
    }
    for name, slates in designs.items():
        probabilities = [engine.set(point[rows]) for rows in slates]
        found[name] = weighted_mean(mean(slates, probabilities, count), weights)
        if name == f"mean, {COMPARED}":
            scores = [weighted_mean(each, weights) for each in probabilities]
            found[f"win rate, {COMPARED}"] = win_rate(slates, scores, count)
            found[f"PageRank, {COMPARED}"] = page_rank(slates, scores, count)
    return found


def held_out(ranker: Ranker, data: Data, case: Case, count: int) -> Request:
    """Return a user's next films among `count` candidates."""
    engine = ranker.engines["fp32"]
    others = np.setdiff1d(np.arange(FIRST_ITEM, len(engine.items)), np.union1d(case.seen, case.upcoming))
    rng = np.random.default_rng(case.user)
    drawn = rng.choice(others, min(count - len(case.upcoming), len(others)), replace=False)
    rows = rng.permutation(np.concatenate([case.upcoming, drawn]))
    candidates = candidates_of(engine, data, rows, case.time)
    point = engine.point(candidates, ranker.default_meta, state_of(engine, case))
    return point, np.isin(rows, case.upcoming).astype(float)


def random_request(ranker: Ranker, seed: int, count: int) -> Request:
    engine, rng = ranker.engines["fp32"], np.random.default_rng(seed)
    rows, actions = rng.integers(FIRST_ITEM, len(engine.items), RANDOM_EVENTS), len(ranker.manifest.actions) + 1
    history = History(rows, rng.integers(0, actions, RANDOM_EVENTS), rng.integers(2, 9, RANDOM_EVENTS))
    vectors = engine.items.take(rng.choice(np.arange(FIRST_ITEM, len(engine.items)), count, replace=False), axis=0)
    numeric = rng.normal(size=(count, len(ranker.manifest.features))).astype(np.float32)
    candidates = Candidates(vectors, numeric, np.zeros((1, CONTEXT_SIZE), np.float32))
    return engine.point(candidates, ranker.default_meta, engine.extend(engine.start, history)), None


def compare(ranker: Ranker, draw: Callable[[int], Request], requests: int, most: int) -> str:
    """Return the table of all ways. draw: from the number of the request."""
    weights = ranker.score_weights(None)

    def rank(number: int) -> dict[str, tuple[float, float, float]]:
        point, labels = draw(number)
        scores = scores_of(ranker.engines["fp32"], point, weights, most, number)
        whole = top_rows(scores["one slate"][None])[0]
        found = {}
        for name, of_way in scores.items():
            best = top_rows(of_way[None])[0]
            gain = np.nan if labels is None else ndcg(of_way, labels)
            found[name] = len(np.intersect1d(best, whole)) / DEPTH, float(best[0] == whole[0]), gain
        return found

    results = in_parallel(rank, range(requests), "requests")
    lines = []
    one = np.array([each["one slate"][2] for each in results])
    for name in results[0]:
        overlap, first, gain = np.array([each[name] for each in results]).T
        line = [name, f"{overlap.mean():.3f}", f"{first.mean():.3f}"]
        if not np.isnan(gain).any():
            difference, low, high = interval(gain - one)
            line += [f"{gain.mean():.4f}", f"{difference:+.4f} ({low:+.4f} to {high:+.4f})"]
        lines.append(line)
    titles = ("way", "of the first ten", "same first", "NDCG@10", "against one slate")
    return table(titles[: len(lines[0])], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toml", type=Path, default=Path("models/movielens.toml"))
    parser.add_argument("--bundles", type=Path, default=Path("models/bundles"))
    parser.add_argument("--random", action="store_true", help="the reference ranker of --bundles build/bundles")
    parser.add_argument("--requests", type=int, default=400)
    args = parser.parse_args()
    rankers = load_rankers(args.bundles)
    if args.random:
        ranker, (count, most) = rankers["reference"], RANDOM_SIZE
        print(f"\n{count:,} candidates, set-wise limit {most:,}, {args.requests} random requests\n")
        print(compare(ranker, lambda seed: random_request(ranker, seed, count), args.requests, most))
        return
    config = read_config(args.toml)
    data = load_data(config.data, config.tables, config.stated)
    ranker = rankers[config.data.name]
    cases = slate_cases(data, sample_users(data.split.slate_users, args.requests))
    for count, most in SIZES:
        print(f"\n{count:,} candidates, set-wise limit {most:,}, {len(cases)} users\n")

        def draw(number: int, count: int = count) -> Request:
            return held_out(ranker, data, cases[number], count)

        print(compare(ranker, draw, len(cases), most), flush=True)


if __name__ == "__main__":
    main()
