"""Deals more candidates than one slate holds into several slates, which are alike (docs/api.md, "Large sets").

Called by: `ranking/slates.py`, `ranking/offers.py`, and `evaluation/pruning.py` of slatewise_train. Calls: numpy.
"""

from __future__ import annotations

import numpy as np

from slatewise.inference.arrays import Int64, PointScores


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
