"""Users with known weights, low rank + sparse, and the relative error with which each fit finds them.

Called by: `__main__.py`. Calls: `fits.py`.
"""

from __future__ import annotations

import numpy as np

from loadtest.training.personal.fits import Examples, one_for_all, personal, ridge, shared_directions

FEATURES = 40
RANK = 3
SPARSE = 3  # numbers of b_u that are not 0
USERS = 400
NOISE = 0.3
WEIGHTS = (0.01, 0.1, 1.0, 10.0)  # of the ridge; the best one of each fit is shown


def draw(examples: int, seed: int) -> tuple[list[Examples], np.ndarray]:
    """Return the users, and their true weights (USERS, d)."""
    rng = np.random.default_rng(seed)
    shared, _ = np.linalg.qr(rng.normal(size=(FEATURES, RANK)))
    truth = rng.normal(size=(USERS, RANK)) @ shared.T
    for row in truth:
        row[rng.choice(FEATURES, SPARSE, replace=False)] += rng.normal(size=SPARSE)
    users = []
    for row in truth:
        features = rng.normal(size=(examples, FEATURES))
        users.append(Examples(features, features @ row + NOISE * rng.normal(size=examples)))
    return users, truth


def errors(examples: int, seed: int = 0) -> dict[str, float]:
    """Return the mean of |t - truth|^2 / |truth|^2 over the users, by fit."""
    users, truth = draw(examples, seed)
    size = (truth**2).sum(axis=1).mean()

    def error(found: np.ndarray) -> float:
        return float(((found - truth) ** 2).sum(axis=1).mean() / size)

    result = {"one for all": error(np.tile(one_for_all(users, 1.0), (USERS, 1)))}
    result["ridge"] = min(error(np.stack([ridge(u.features, u.targets, weight) for u in users])) for weight in WEIGHTS)
    for name, sparse in (("low rank", 0), ("low rank + sparse", SPARSE)):
        found = []
        for weight in WEIGHTS:
            shared = shared_directions(users, RANK, sparse, weight)
            parts = [personal(user, shared, sparse, weight) for user in users]
            found.append(error(np.stack([shared @ part + change for part, change in parts])))
        result[name] = min(found)
    return result
