"""The training events as a sparse matrix, and the users on which a baseline is tuned.

Called by: `baselines.py`, `ease.py`, `offline.py`, `trained.py`, `held_out.py`. Calls: `cases.py`, `metrics.py`,
`sampling.py`, scipy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import sparse
from tqdm import tqdm

from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.data import Data, training_events
from slatewise_train.evaluation.cases import Case, make_case
from slatewise_train.evaluation.metrics import DEPTH, gains, ranks_of, top_rows
from slatewise_train.evaluation.sampling import held_out_users, in_parallel, sample_users

TUNING_USERS = 1_000
READ_EVENTS = 1_000  # newest training events of a user that are counted: pairs grow with the square of this number
MOST_PAIRS = 200_000_000  # pairs of items of one user, over all users; beyond that a sample of the users is counted
BLOCK_PAIRS = 20_000_000  # pairs that are counted at once
CHUNK_SCORES = 5_000_000  # scores of one chunk, of which each CPU has one in memory

W = TypeVar("W")


@dataclass(frozen=True)
class Baseline:
    """A function that scores all items from histories, and a description of its settings.

    score: n arrays of item rows -> (n, rows of the item table). Each distinct item of a history counts once.
    """

    score: Callable[[Sequence[np.ndarray]], np.ndarray]
    settings: str = ""


def linear(weights: sparse.csr_array | np.ndarray, settings: str) -> Baseline:
    """Build a baseline that scores items by the sum of the weights (rows, rows) of the history's items."""
    rows = weights.shape[1]

    def score(histories: Sequence[np.ndarray]) -> np.ndarray:
        found = indicator(histories, rows) @ weights
        return found.toarray() if sparse.issparse(found) else found

    return Baseline(score, settings)


def distinct_pairs(users: np.ndarray, items: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    """Return a float32 matrix (users, items) with a 1 for each distinct pair of a user and a known item."""
    known = items >= FIRST_ITEM
    pairs = np.unique(users[known] * shape[1] + items[known])
    places = (pairs // shape[1], pairs % shape[1])
    return sparse.csr_array((np.ones(len(pairs), np.float32), places), shape=shape)


def indicator(histories: Sequence[np.ndarray], rows: int) -> sparse.csr_array:
    """Return a float32 matrix (n, rows) with a 1 for each distinct known item of each of n histories."""
    users = np.repeat(np.arange(len(histories)), [len(items) for items in histories])
    return distinct_pairs(users, np.concatenate([np.zeros(0, np.int64), *histories]), (len(histories), rows))


class Interactions:
    """Training events as a matrix of users and items, without repeated pairs.

    A user's newest READ_EVENTS events count. If there are more than MOST_PAIRS pairs of items, `counted` is the share
    of the users that the matrix has, drawn with a fixed seed.
    """

    def __init__(self, data: Data) -> None:
        self.rows = len(data.catalogue.numeric)
        users, items = training_events(data.sequences, data.split)
        self.popularity = np.bincount(items, minlength=self.rows).astype(np.float64)  # events of each item (rows,)
        ends = np.cumsum(data.split.train_lengths)
        newest = ends[users] - np.arange(len(users)) <= READ_EVENTS
        matrix = distinct_pairs(users[newest], items[newest], (len(data.sequences), self.rows))
        pairs = np.diff(matrix.indptr).astype(np.float64) ** 2
        self.counted = 1.0
        if pairs.sum() > MOST_PAIRS:
            drawn = np.random.default_rng(0).permutation(len(pairs))
            drawn = np.sort(drawn[np.cumsum(pairs[drawn]) <= MOST_PAIRS])
            self.counted = len(drawn) / max(1, int(np.count_nonzero(pairs)))
            matrix = matrix[drawn]
        self.matrix = matrix
        self.tuning = validation_cases(data, TUNING_USERS)

    def note(self) -> str:
        """Return a remark for the settings of a baseline: the users who are counted, and whether it is tuned."""
        counted = "" if self.counted == 1.0 else f", counted on {self.counted:.0%} of the users"
        return counted if self.tuning else f"{counted}, not tuned without validation users"

    def co_occurrences(self, desc: str) -> Iterator[tuple[int, sparse.csr_array]]:
        """Yield blocks of the matrix of the users that two items share: the first row, and (block, rows) float32."""
        by_item = self.matrix.T.tocsr()
        cost = np.cumsum(by_item @ np.diff(self.matrix.indptr).astype(np.float64))  # pairs up to and including a row
        edges = [0, *(np.flatnonzero(np.diff(cost // BLOCK_PAIRS)) + 1).tolist(), self.rows]
        for first, end in tqdm(list(itertools.pairwise(edges)), desc=desc, mininterval=2):
            yield first, by_item[first:end] @ self.matrix

    def quality(self, baseline: Baseline) -> float:
        """Return mean NDCG@10 of the tuning users."""
        return float(gains(baseline_ranks(baseline, self.tuning, self.rows, listed=False)[0]).mean())


def best_of(seen: Interactions, models: Iterable[tuple[Baseline, W]]) -> tuple[Baseline, W]:
    """Return the baseline with the highest NDCG@10 of the tuning users, with its weights; without users the first."""
    best = None
    most = -1.0
    for model in models:
        if not seen.tuning:
            return model
        quality = seen.quality(model[0])
        if quality > most:
            best, most = model, quality
    assert best is not None
    return best


def hidden_rows(seen: np.ndarray, target: int) -> np.ndarray:
    """Return the item rows that are not ranked: those of the events before, or no rows if the target is one of them.

    A repeated target alone among the hidden items of its history would be found by any scorer of the history.
    """
    return seen[:0] if (seen == target).any() else seen


def validation_cases(data: Data, most: int | None = None) -> list[Case]:
    """Return a case for each of `held_out_users`: the first event after the training events.

    most: the most users, drawn with a fixed seed; None: all of `held_out_users`.
    """
    users = sample_users(held_out_users(data), most)
    return [make_case(data, int(user), int(data.split.train_lengths[user]), 1) for user in users]


def chunks_of(cases: Sequence[Case], rows: int) -> list[Sequence[Case]]:
    """Split cases into chunks with at most CHUNK_SCORES scores of `rows` items."""
    size = max(1, CHUNK_SCORES // rows)
    return [cases[k : k + size] for k in range(0, len(cases), size)]


def baseline_ranks(
    baseline: Baseline, cases: Sequence[Case], rows: int, desc: str = "", *, listed: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Rank the first upcoming item of each case among all items of `rows` without `hidden_rows`.

    Returns ranks (n,), 0 for the best, and the item rows of the best lists (n, 10), 0 beyond a list's end. The lists
    are empty unless `listed`. Items with equal scores are ranked in the order of the catalogue. desc: the title of the
    progress bar; empty: no bar.
    """
    empty = (np.zeros(0, np.int64), np.zeros((0, DEPTH), np.int64))

    def rank(chunk: Sequence[Case]) -> tuple[np.ndarray, np.ndarray]:
        scores = baseline.score([case.seen for case in chunk])
        targets = np.array([case.upcoming[0] for case in chunk])
        scores[:, :FIRST_ITEM] = -np.inf
        for row, case in enumerate(chunk):
            scores[row, hidden_rows(case.seen, case.upcoming[0])] = -np.inf
        return ranks_of(scores, targets), top_rows(scores) if listed else empty[1]

    found = [empty, *in_parallel(rank, chunks_of(cases, rows), desc)]
    ranks, lists = (np.concatenate(column) for column in zip(*found, strict=True))
    return ranks, lists


def baseline_slates(baseline: Baseline, cases: Sequence[Case], rows: int, desc: str = "") -> list[np.ndarray]:
    """Return the scores of the upcoming items of each case: n arrays (m,). desc: see `baseline_ranks`."""

    def score(chunk: Sequence[Case]) -> list[np.ndarray]:
        scores = baseline.score([case.seen for case in chunk])
        return [scores[row, case.upcoming] for row, case in enumerate(chunk)]

    return list(itertools.chain.from_iterable(in_parallel(score, chunks_of(cases, rows), desc)))
