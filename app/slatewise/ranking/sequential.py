"""A sequential test: is the mean of a stream of numbers above a bound? It may be read after each number, for ever.

Testing by betting: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86, 2024.
A bettor with a wealth of 1 bets a share of it on each number being above the bound. While the mean of each number,
given those before it, is at most the bound, the wealth is a non-negative supermartingale, so it ever reaches 1 / p with
probability at most p (Ville 1939). A wealth of 1 / p is therefore an alarm whose probability of being false is at most
p, however often and however long one looks. A fixed sample size, or p-values that are read again and again, give no
such promise.

The bettor splits its wealth over several rates, because the best one depends on how far the mean is above the bound.

Called by: `rollout.py`. Calls: nothing.
"""

from __future__ import annotations

import math

RATES = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)  # shares of the wealth that may be lost by one number


class Evidence:
    """Evidence that the mean of numbers that are at least `lowest` is above `bound`, which is above `lowest`."""

    def __init__(self, bound: float, false_alarm: float, lowest: float) -> None:
        self.bound = bound
        self.range = bound - lowest
        self.enough = math.log(1 / false_alarm)
        self.count = 0
        self.logs = [0.0] * len(RATES)  # logarithm of the wealth of each bettor

    def add(self, number: float) -> bool:
        """Add a number. Return whether there is enough evidence for an alarm."""
        self.count += 1
        loss = (number - self.bound) / self.range  # at least -1
        self.logs = [log + math.log1p(rate * loss) for log, rate in zip(self.logs, RATES, strict=True)]
        return self.log_wealth >= self.enough

    @property
    def log_wealth(self) -> float:
        highest = max(self.logs)
        return highest + math.log(sum(math.exp(log - highest) for log in self.logs) / len(RATES))
