"""The exit `set` for any number of candidates. Above the set-wise limit they are dealt into several slates.

Each candidate is in one slate and has the probabilities that this slate gives it. The slates are alike: candidates are
dealt like cards, in the order of `point`, so each slate has as many good ones as any other, and its best ones meet good
neighbours. The deal depends on the scores alone, so the order of the candidates in the request does not matter.

models/LOG.md compares it with one slate of all candidates, with several slates for each candidate, and with JointRank
(arXiv 2506.22262).

Called by: `ranking/cascade.py`, as chunks on a worker thread; `ranking/offers.py` for the number of slates;
`evaluation/pruning.py` of slatewise_train. Calls: `engine.py`.
"""

from __future__ import annotations

import numpy as np

from slatewise.inference.arrays import Float64, Int64, PointScores
from slatewise.inference.chunks import Chunks, run_parts
from slatewise.inference.engine import Engine


def run_set(engine: Engine, point: PointScores) -> Chunks[Float64]:
    """Compute the (N, heads) probabilities of the exit `set`, a slate in each chunk. Raises EngineError."""
    count = len(point)
    if count <= engine.slate:
        yield count
        return engine.set(point)
    probabilities = np.empty_like(point.probabilities)
    slates = deal(point, engine.slate)

    def run_some(some: list[Int64]) -> Chunks[None]:
        for rows in some:
            yield len(rows)
            probabilities[rows] = engine.set(point[rows])

    yield from run_parts(lambda threads: [run_some(slates[k::threads]) for k in range(min(threads, len(slates)))])
    return probabilities


def slate_count(candidates: int, most: int) -> int:
    """Return the number of slates: one of at most `most` candidates, and of more candidates, several of half as many.

    The work grows with the square of a slate, and other requests wait for a whole slate.
    """
    return 1 if candidates <= most else -(-candidates // max(1, most // 2))


def deal(point: PointScores, most: int) -> list[Int64]:
    """Deal the candidates into slates: the rows of each slate, best first. Their sizes differ by one at most.

    The order is that of the sum of the heads' probabilities, whatever weights the request gives them. Equal ones are
    ordered by their logits.
    """
    order = np.lexsort((*point.logits.T, -point.probabilities.sum(axis=1)))
    slates = slate_count(len(point), most)
    return [order[first::slates] for first in range(slates)]
