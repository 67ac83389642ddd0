"""Baselines that a ranker must beat: popularity, item-kNN, and the linear model EASE.

Each scores the whole catalogue from the distinct items of a history. Its settings are those with the highest NDCG@10
on the validation users: for each of them, the first held-out event is ranked in the full catalogue. Without validation
users the first settings are used.

Called by: `offline.py`, `trained.py`. Calls: `interactions.py`, `ease.py`, scipy, tqdm.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from tqdm import tqdm

from slatewise_train.data import Data
from slatewise_train.evaluation.ease import ease
from slatewise_train.evaluation.interactions import Baseline, Interactions, best_of, linear

SHRINKAGES = (10.0, 0.0, 50.0)
NEIGHBOURS = (100, 20, 50, 200)  # the first of each is used without validation users

Baselines = dict[str, Baseline]


def make_baselines(data: Data) -> tuple[Baselines, dict[str, str]]:
    """Build and tune all baselines. Returns them, and the reason for each one that is left out, as a sentence."""
    seen = Interactions(data)
    neighbours, similar = item_knn(seen)
    baselines = {"popularity": popularity(seen), "item-kNN": neighbours}
    linear = ease(seen, similar)
    if isinstance(linear, str):
        return baselines, {"EASE": f"the baseline EASE: {linear}"}
    return baselines | {"EASE": linear}, {}


def popularity(seen: Interactions) -> Baseline:
    """Build a baseline that scores each item by its number of training events."""
    return Baseline(lambda histories: np.tile(seen.popularity, (len(histories), 1)))


class Similarities:
    """The similarities of items at one shrinkage, by the number of neighbours that are kept."""

    def __init__(self, users: np.ndarray, shrinkage: float, counts: Sequence[int]) -> None:
        """users: (rows,) of each item; counts: the numbers of neighbours, ascending."""
        self.users = users
        self.shrinkage = shrinkage
        self.counts = list(counts)
        self.blocks: list[sparse.csr_array] = []
        self.floors: list[np.ndarray] = []  # of each block: (block, counts) the least similarity that is kept

    def add(self, first: int, shared: sparse.csr_array) -> None:
        """Add the rows from `first` on. shared: (block, rows), the users that two items share."""
        lengths = np.diff(shared.indptr)
        rows = np.repeat(np.arange(first, first + len(lengths)), lengths)
        values = shared.data / (np.sqrt(self.users[rows] * self.users[shared.indices]) + self.shrinkage)
        values[rows == shared.indices] = 0
        floors = np.zeros((len(lengths), len(self.counts)))
        for row in np.flatnonzero(lengths > self.counts[0]):
            mine = values[shared.indptr[row] : shared.indptr[row + 1]]
            for k, count in enumerate(self.counts):
                if len(mine) > count:
                    floors[row, k] = np.partition(mine, -count)[-count]
        kept = (values >= floors[rows - first, -1]) & (values > 0)
        places = (rows[kept] - first, shared.indices[kept])
        self.blocks.append(sparse.csr_array((values[kept], places), shape=shared.shape))
        self.floors.append(floors)

    def nearest(self, count: int) -> sparse.csr_array:
        """Return the similarities (rows, rows) float32 of each item and its nearest neighbours."""
        whole = sparse.vstack(self.blocks, format="csr", dtype=np.float64)
        floors = np.concatenate(self.floors)[:, self.counts.index(count)]
        rows = np.repeat(np.arange(whole.shape[0]), np.diff(whole.indptr))
        kept = whole.data >= floors[rows]
        return sparse.csr_array(
            (whole.data[kept].astype(np.float32), (rows[kept], whole.indices[kept])), shape=whole.shape
        )


def item_knn(
    seen: Interactions, shrinkages: Sequence[float] = SHRINKAGES, neighbours: Sequence[int] = NEIGHBOURS
) -> tuple[Baseline, sparse.csr_array]:
    """Build a baseline that scores an item by the sum of its similarities to the items of the history.

    The similarity of items i and j is the cosine of their users in the training events, damped by a shrinkage h:
    c_ij / (sqrt(c_ii c_jj) + h), with c_ij the users of both (Ferrari Dacrema et al., RecSys 2019). It is 0 beyond the
    nearest neighbours of the history's item; neighbours as near as the last one are kept. Returns the baseline with the
    best of the settings, and its similarities (rows, rows).
    """
    users = np.asarray(seen.matrix.sum(axis=0), np.float64)
    found = {shrinkage: Similarities(users, shrinkage, sorted(neighbours)) for shrinkage in shrinkages}
    for first, shared in seen.co_occurrences("item-kNN"):
        for similarities in found.values():
            similarities.add(first, shared)
    settings = [(shrinkage, count) for shrinkage in shrinkages for count in neighbours]
    models = (
        (linear(similar, f"shrinkage {shrinkage:g}, {count} neighbours{seen.note()}"), similar)
        for shrinkage, count in tqdm(settings, desc="item-kNN, settings", mininterval=1)
        for similar in [found[shrinkage].nearest(count)]
    )
    return best_of(seen, models)
