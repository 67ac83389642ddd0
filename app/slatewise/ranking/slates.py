"""The exit `set` for any number of candidates. Above the set-wise limit they are dealt into several slates.

Each candidate is in one slate and has the probabilities that this slate gives it. The slates are alike: candidates are
dealt like cards, in the order of `point`, so each slate has as many good ones as any other, and its best ones meet good
neighbours. The deal depends on the scores alone, so the order of the candidates in the request does not matter.

models/LOG.md compares it with one slate of all candidates, with several slates for each candidate, and with JointRank
(arXiv 2506.22262).

Called by: `cascade.py`, as chunks on a worker thread. Calls: `inference/slates.py`, `engine.py`.
"""

from __future__ import annotations

import numpy as np

from slatewise.inference.arrays import Float64, PointScores
from slatewise.inference.engine import Engine
from slatewise.inference.slates import deal
from slatewise.inference.workers import Chunks


def run_set(engine: Engine, point: PointScores) -> Chunks[Float64]:
    """Compute the (N, heads) probabilities of the exit `set`, a slate in each chunk. Raises EngineError."""
    count = len(point)
    if count <= engine.slate:
        yield count
        return engine.set(point)
    probabilities = np.empty_like(point.probabilities)
    for rows in deal(point, engine.slate):
        yield len(rows)
        probabilities[rows] = engine.set(point[rows])
    return probabilities
