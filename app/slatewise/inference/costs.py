"""Predicts the time of a graph's calls from their size, and learns from every call.

    seconds = a x calls + b x rows + c x products

    graph     rows                 products
    encode    events               rows x tokens that they attend to, the encoded ones included
    dot       candidates           0
    point     candidates           rows x encoded tokens
    set       candidates           rows x candidates
    explore   candidates           0
    draw      0                    0; the draw of a request that explores, which is no graph

The weights are never negative. They start with a fit to a few timed calls (`timed_calls.py`). After each call they are
multiplied by exp(STEP x error x share): the error is relative, and the share is the part of the prediction that the
weight made (exponentiated gradient; Kivinen and Warmuth 1997). So they follow a machine that becomes slower or faster,
and one slow call moves them by a tenth at most.

Called by: `engine.py`, `timed_calls.py`, `ranking/offers.py`. Calls: numpy.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import combinations
from math import exp, inf
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

STEP = 0.1
MOST_ERROR = 1.0  # a call that took twice the prediction, or longer; a fast one counts as -0.5 at most
SLOW_CALLS = 3  # in a row that took twice the prediction or longer: then it is wrong, and FAST_STEP corrects it
FAST_STEP = 1.0
LEAST_WEIGHT = 1e-9  # seconds; a weight of zero could not grow again
UNITS = (1.0, 1e-2, 1e-4)  # calls, rows in hundreds, products in ten thousands: weights of like size


class Work(NamedTuple):
    """The size of one or more calls of a graph."""

    calls: int
    rows: int
    products: int


def work_of(graph: str, feeds: Mapping[str, NDArray[Any]]) -> Work:
    """Return the size of a call, batches included."""
    columns = feeds[{"encode": "items", "set": "hidden", "explore": "hidden"}.get(graph, "candidates")]
    batch, each = columns.shape[:2]
    tokens = 0
    if graph == "encode":
        tokens = feeds["past_key_0"].shape[1] + each
    elif graph == "point":
        tokens = next(array.shape[1] for name, array in feeds.items() if name.startswith("key_"))
    elif graph == "set":
        tokens = each
    return Work(1, batch * each, batch * each * tokens)


ONE_CALL = Work(1, 0, 0)


class GraphCosts:
    """The time of one graph's calls. Threads may learn at the same time: then one of two steps may be lost."""

    def __init__(self) -> None:
        self.weights = (1e-4, 1e-4, 1e-4)
        self.learned_at = -inf  # time.perf_counter()
        self.slow_calls = 0  # in a row
        self.timed: dict[Work, float] | None = None  # from `begin` to `fit`: the shortest time of each size

    def seconds(self, work: Work) -> float:
        a, b, c = self.weights
        return a * work.calls + b * work.rows * UNITS[1] + c * work.products * UNITS[2]

    def learn(self, work: Work, seconds: float) -> None:
        """Move the weights a step towards the time that a call took."""
        if self.timed is not None:
            self.timed[work] = min(seconds, self.timed.get(work, inf))
        predicted = self.seconds(work)
        error = min(MOST_ERROR, max(-MOST_ERROR / 2, seconds / predicted - 1))
        self.slow_calls = self.slow_calls + 1 if error == MOST_ERROR else 0
        step = STEP if self.slow_calls < SLOW_CALLS else FAST_STEP
        a, b, c = (
            max(LEAST_WEIGHT, weight * exp(step * error * weight * size * unit / predicted))
            for weight, size, unit in zip(self.weights, work, UNITS, strict=True)
        )
        self.weights = (a, b, c)
        self.learned_at = time.perf_counter()

    def begin(self) -> None:
        """Keep the times of the calls from now on, for `fit`."""
        self.timed = {}

    def fit(self) -> None:
        """Set the weights to the non-negative ones with the least relative errors for the calls since `begin`."""
        timed, self.timed = self.timed, None
        if not timed:
            return
        seconds = np.maximum(np.array(list(timed.values())), LEAST_WEIGHT)
        sizes = np.array(list(timed)) * UNITS / seconds[:, None]  # so that errors are relative
        least = inf
        for above_zero in (list(chosen) for k in (1, 2, 3) for chosen in combinations(range(3), k)):
            found = np.linalg.lstsq(sizes[:, above_zero], np.ones(len(sizes)), rcond=None)[0]
            error = float(((sizes[:, above_zero] @ found - 1) ** 2).sum())
            if found.min() >= 0 and error < least:
                least = error
                weights = np.full(3, LEAST_WEIGHT)
                weights[above_zero] = np.maximum(found, LEAST_WEIGHT)
                self.weights = (float(weights[0]), float(weights[1]), float(weights[2]))
