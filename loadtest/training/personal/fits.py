"""Personal weights of a linear model, fitted in four ways: AMHT-LRS (arXiv 2210.03505) and what it competes with.

    y_u = X_u (U w_u + b_u) + noise       U (d, r) orthonormal and shared, w_u (r,), b_u sparse

- one for all: the same weights for every user (r = 0, no b)
- ridge: each user alone
- low rank: U and w_u
- low rank + sparse: U, w_u and b_u

Called by: `__main__.py`. Calls: numpy. Letters in shapes: d features, r rank, m examples of a user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 15
SPARSE_STEPS = 10


@dataclass(frozen=True)
class Examples:
    """The examples of one user."""

    features: np.ndarray  # (m, d)
    targets: np.ndarray  # (m,)


def ridge(features: np.ndarray, targets: np.ndarray, weight: float) -> np.ndarray:
    """Return argmin |X t - y|^2 + weight |t|^2: (d,)."""
    d = features.shape[1]
    found: np.ndarray = np.linalg.solve(features.T @ features + weight * np.eye(d), features.T @ targets)
    return found


def one_for_all(users: Sequence[Examples], weight: float) -> np.ndarray:
    features = np.concatenate([user.features for user in users])
    return ridge(features, np.concatenate([user.targets for user in users]), weight)


def first_directions(users: Sequence[Examples], rank: int) -> np.ndarray:
    """Return the start of U: the first eigenvectors of sum (y x) (y x)' (the paper's method of moments): (d, r)."""
    rows = np.concatenate([user.features * user.targets[:, None] for user in users])
    values, vectors = np.linalg.eigh(rows.T @ rows)
    return np.ascontiguousarray(vectors[:, np.argsort(-values)[:rank]])


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Keep the `count` entries that are largest in size, and set the others to 0 (hard threshold)."""
    kept = np.zeros_like(values)
    if count:
        places = np.argpartition(-np.abs(values), min(count, len(values)) - 1)[:count]
        kept[places] = values[places]
    return kept


def personal(user: Examples, shared: np.ndarray, sparse: int, weight: float) -> tuple[np.ndarray, np.ndarray]:
    """Return w_u (r,) and b_u (d,) for a given U: gradient steps with a hard threshold for b, ridge for w, in turn."""
    features, targets = user.features, user.targets
    change = np.zeros(features.shape[1])
    read = features @ shared
    part = ridge(read, targets, weight)
    if not sparse or not len(targets):
        return part, change
    step = 1 / (np.linalg.norm(features, 2) ** 2 + weight)
    for _ in range(SPARSE_STEPS):
        gradient = features.T @ (features @ change + read @ part - targets) + weight * change
        change = largest(change - step * gradient, sparse)
        part = ridge(read, targets - features @ change, weight)
    return part, change


def shared_directions(users: Sequence[Examples], rank: int, sparse: int, weight: float) -> np.ndarray:
    """Fit U (d, r) by alternating minimization over the users."""
    shared = first_directions(users, rank)
    d = len(shared)
    for _ in range(ROUNDS):
        left, right = np.zeros((d * rank, d * rank)), np.zeros((d, rank))
        for user in users:
            part, change = personal(user, shared, sparse, weight)
            left += np.kron(user.features.T @ user.features, np.outer(part, part))
            right += np.outer(user.features.T @ (user.targets - user.features @ change), part)
        solved = np.linalg.solve(left + 1e-6 * np.trace(left) / len(left) * np.eye(len(left)), right.reshape(-1))
        shared, _ = np.linalg.qr(solved.reshape(d, rank))
    return shared
