"""The best orders of slates in a simulated world, and NDCG of any order against the known relevance.

NDCG here has the relevance itself as its gain, the exact probability of a choice, and no labels. The relevance of an
item depends on the set of its neighbours and not on their order. Sorting by it is therefore the best order of a slate:
exchanging two items that are not sorted cannot lower a sum of gains with falling discounts.

Called by: `experiment.py`. Calls: `world.py`.
"""

from __future__ import annotations

import numpy as np

from slatewise_train.demo.simulated.world import World


def expected_ndcg(scores: np.ndarray, relevance: np.ndarray, depth: int) -> np.ndarray:
    """Return NDCG@depth of the order of scores, with the relevance as gain: (n, C), (n, C) -> (n,).

    Equal scores keep their input order.
    """
    discount = 1 / np.log2(np.arange(2, depth + 2))[: scores.shape[1]]
    order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    found = np.take_along_axis(relevance, order, axis=1) @ discount
    return found / (-np.sort(-relevance, axis=1)[:, :depth] @ discount)


def random_ndcg(relevance: np.ndarray, depth: int) -> np.ndarray:
    """Return the mean of NDCG@depth over all orders of each slate: (n, C) -> (n,)."""
    discount = 1 / np.log2(np.arange(2, depth + 2))[: relevance.shape[1]]
    return relevance.mean(axis=1) * discount.sum() / (-np.sort(-relevance, axis=1)[:, :depth] @ discount)


def context_free(
    world: World, users: np.ndarray, slates: np.ndarray, recent: np.ndarray, draws: int = 64
) -> np.ndarray:
    """Return the mean relevance of each item over random slates of its user: (n, C).

    It knows the user, the item and the user's last choices, and not the neighbours. No scorer of single items can know
    more, so this is the oracle of the exit `point`, up to the noise of `draws` slates. Arguments: see
    `World.utility_in_slate`.
    """
    n, c = slates.shape
    rng = np.random.default_rng([world.config.seed, 3])
    total = np.zeros((n, c))
    rows = np.repeat(np.arange(n), c)
    for _ in range(draws):
        others = world.draw_slates(users, None, rng)
        others = np.repeat(others, c, axis=0)  # (n * c, C), for each item of the slate a slate with it
        same = others == slates.reshape(-1, 1)
        place = np.where(same.any(axis=1), same.argmax(axis=1), 0)  # the order of a drawn slate has no meaning
        others[np.arange(len(others)), place] = slates.ravel()
        found = world.relevance(users[rows], others, recent[rows])
        total += found[np.arange(len(others)), place].reshape(n, c)
    return total / draws
