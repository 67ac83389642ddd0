"""EASE, a linear model of items from items (Steck, WWW 2019, "Embarrassingly Shallow Autoencoders for Sparse Data").

With G the users that two items share, item j is predicted from all other items by the ridge regression

    w_j = (G_-j,-j + ridge I)^-1 G_-j,j

For a small catalogue all w_j follow from one inverse P = (G + ridge I)^-1: w_ij = -P_ij / P_jj (equation 8 of the
paper). For a larger one the regression of an item reads its nearest neighbours alone, which gives the same weights if
the neighbours are all other items.

Called by: `baselines.py`. Calls: `interactions.py`, `sampling.py`, scipy.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import linalg, sparse
from tqdm import tqdm

from slatewise_train.evaluation.interactions import Baseline, Interactions, best_of, linear
from slatewise_train.evaluation.sampling import in_parallel

RIDGES = (100.0, 1.0, 10.0, 1000.0)  # the first is used without validation users
EXACT_ITEMS = 5_000  # largest catalogue of the exact model: time grows with the cube
MOST_ITEMS = 50_000  # largest catalogue of the approximation, one regression for each item
NEIGHBOURS = 50  # that the regression of an item reads in a larger catalogue
BATCH = 256  # items whose regressions are solved at once
MOST_CELLS = 200_000_000  # pairs of items with a common user, in memory


def ease(seen: Interactions, similar: sparse.csr_array) -> Baseline | str:
    """Build the model with the best ridge, or return the reason for which it is left out.

    similar: (rows, rows) similarities, which give the neighbours of an item in a large catalogue.
    """
    if not seen.matrix.nnz:  # LAPACK complains about a matrix of 0 rows
        return "there is no training event to count"
    if seen.rows <= EXACT_ITEMS:
        return best_of(seen, exact_models(seen))[0]
    if seen.rows > MOST_ITEMS:
        return f"{seen.rows:,} items, its limit is {MOST_ITEMS:,}"
    shared = all_shared(seen)
    if shared is None:
        return f"more than {MOST_CELLS:,} pairs of items have a common user"
    return best_of(seen, neighbour_models(seen, shared, similar))[0]


def exact_models(seen: Interactions) -> Iterator[tuple[Baseline, np.ndarray]]:
    """Yield the model of each ridge and its weights (rows, rows) float32."""
    met = np.flatnonzero(np.diff(seen.matrix.tocsc().indptr))  # an item without events has the weight 0
    matrix = seen.matrix[:, met]
    gram = (matrix.T @ matrix).toarray().astype(np.float64)
    for ridge in tqdm(RIDGES, desc="EASE", mininterval=2):
        inverse = inverse_of(gram + ridge * np.eye(len(gram)))
        weights = np.zeros((seen.rows, seen.rows), np.float32)
        weights[np.ix_(met, met)] = -inverse / np.diag(inverse)
        np.fill_diagonal(weights, 0)
        yield linear(weights, f"ridge {ridge:g}{seen.note()}"), weights


def inverse_of(matrix: np.ndarray) -> np.ndarray:
    """Return the inverse of a symmetric, positive definite matrix. It is overwritten."""
    factor, failed = linalg.lapack.dpotrf(matrix, lower=1, overwrite_a=1)
    assert not failed, "a ridge makes the matrix positive definite"
    lower, _ = linalg.lapack.dpotri(factor, lower=1, overwrite_c=1)
    return np.tril(lower) + np.tril(lower, -1).T


def all_shared(seen: Interactions) -> sparse.csr_array | None:
    """Return the users that two items share (rows, rows), or `None` if that would not fit into memory."""
    blocks = []
    cells = 0
    for _, block in seen.co_occurrences("EASE"):
        cells += block.nnz
        if cells > MOST_CELLS:
            return None
        blocks.append(block)
    whole = sparse.vstack(blocks, format="csr")
    whole.sort_indices()
    return whole


def neighbour_models(
    seen: Interactions, shared: sparse.csr_array, similar: sparse.csr_array
) -> Iterator[tuple[Baseline, sparse.csr_array]]:
    """Yield the model of each ridge and its weights (rows, rows), of the nearest neighbours of each item alone.

    shared: (rows, rows), the users of two items.
    """
    near = nearest_rows(similar, NEIGHBOURS)
    items = np.flatnonzero((near >= 0).any(axis=1))

    def solve(batch: np.ndarray) -> np.ndarray:
        """Return the weights of the neighbours of a batch of items, by ridge: (ridges, b, n)."""
        rows = np.maximum(near[batch], 0)  # beyond the last neighbour the unknown item, which has no users
        gram = cells_of(shared, rows[:, :, None], rows[:, None, :])
        aim = cells_of(shared, rows, batch[:, None])[:, :, None]
        eye = np.eye(rows.shape[1])
        return np.stack([np.linalg.solve(gram + ridge * eye, aim)[:, :, 0] for ridge in RIDGES]).astype(np.float32)

    batches = [items[first : first + BATCH] for first in range(0, len(items), BATCH)]
    empty = np.zeros((len(RIDGES), 0, near.shape[1]), np.float32)
    solved = np.concatenate([empty, *in_parallel(solve, batches, "EASE")], axis=1)
    kept = near[items] >= 0
    places = (near[items][kept], np.repeat(items, kept.sum(axis=1)))
    for ridge, weights in tqdm(list(zip(RIDGES, solved, strict=True)), desc="EASE, ridges", mininterval=1):
        matrix = sparse.csr_array((weights[kept], places), shape=similar.shape)
        settings = f"ridge {ridge:g}, {NEIGHBOURS} neighbours{seen.note()}"
        yield linear(matrix, settings), matrix


def nearest_rows(similar: sparse.csr_array, count: int) -> np.ndarray:
    """Return the columns of the largest values of each row (rows, count), -1 if a row has fewer values."""
    result = np.full((similar.shape[0], count), -1)
    for row in np.flatnonzero(np.diff(similar.indptr)):
        part = slice(similar.indptr[row], similar.indptr[row + 1])
        order = np.argsort(-similar.data[part], kind="stable")[:count]
        result[row, : len(order)] = similar.indices[part][order]
    return result


def cells_of(matrix: sparse.csr_array, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return matrix[rows, columns] as a dense float64 array, of row and column numbers that broadcast."""
    wanted = np.broadcast_arrays(rows, columns)
    found = matrix[wanted[0].ravel(), wanted[1].ravel()]
    dense = found.toarray() if sparse.issparse(found) else np.asarray(found)
    return dense.reshape(wanted[0].shape).astype(np.float64)
