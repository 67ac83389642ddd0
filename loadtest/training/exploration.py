"""Regret of exploration in simulated worlds: python -m loadtest.training.exploration --out docs

In each of 10,000 rounds a policy shows one of 20 candidates. The world knows the probability of a click and draws one.
Regret is the probability of the best candidate minus that of the shown one, summed over the rounds.

The ranker is a Bayesian logistic head with a feature for each item and a bias, as the last layer of a network with wide
item embeddings. After every 100 rounds it learns from their clicks: its posterior is the prior of the next update
(Laplace approximation). Some items have a log of random impressions before the first round. The others are new.

    greedy            the candidate with the highest mean
    epsilon-greedy    in 5 % of the rounds a random candidate
    Thompson          the candidate with the highest drawn logit, by the server's own code (`inference/exploration.py`)
                      with the round as the id of the request

Candidates and clicks of a seed are the same for all policies. Brackets are 95 % bootstrap intervals over the seeds.

Called by: the command line. Its numbers appear in docs/exploration.md. Calls: `inference/exploration.py`,
`evaluation/exploration.py`, matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from loadtest.markdown import table
from slatewise.cli import run_main
from slatewise.inference.arrays import Float64, Int64
from slatewise.inference.exploration import draw
from slatewise_train.evaluation.exploration import factor_of
from slatewise_train.evaluation.report import save_figure

ROUNDS = 10_000
BATCH = 100  # rounds between two updates of the head
CANDIDATES = 20
LOGGED = 2_000  # impressions before the first round
AVERAGE = -2.0  # logit of an average item, which the head knows
RESAMPLES = 10_000  # of the seeds
BAR = 0.7  # largest share of greedy's regret


@dataclass(frozen=True)
class World:
    """Items whose logits are normal around AVERAGE; the first `known` of them have a log."""

    name: str
    items: int
    known: int


@dataclass(frozen=True)
class Policy:
    """Chooses by mean + scale * draw, and in a share of the rounds at random."""

    name: str
    scale: float = 0.0
    random: float = 0.0


WORLDS = (
    World("half of the items are new", 100, 50),
    World("a fifth of the items is new", 100, 80),
    World("no item is new", 100, 100),
)
POLICIES = (
    Policy("greedy"),
    Policy("epsilon-greedy, 5 %", random=0.05),
    Policy("Thompson, scale 0.5", scale=0.5),
    Policy("Thompson, scale 1", scale=1.0),
)
GREEDY, *_, THOMPSON = POLICIES


def sigmoid(x: Float64) -> Float64:
    return 1 / (1 + np.exp(-x))


class Head:
    """A logistic regression with a Gaussian posterior: mean (D,) and precision (D, D), with D items and a bias."""

    def __init__(self, items: int) -> None:
        self.mean = np.append(np.zeros(items), AVERAGE)
        self.precision = np.eye(items + 1)

    def learn(self, shown: Int64, clicks: Float64) -> None:
        """Update by items (n,) that were shown and clicks (n,): the mode by Newton's method, with halved steps."""
        before, prior = self.mean, self.precision
        x = np.zeros((len(shown), len(before)))
        x[np.arange(len(shown)), shown] = 1.0
        x[:, -1] = 1.0

        def loss(mean: Float64) -> float:
            logits = x @ mean
            away = mean - before
            return float(np.logaddexp(0, logits).sum() - clicks @ logits + away @ prior @ away / 2)

        moved = np.inf
        while moved > 1e-6:
            p = sigmoid(x @ self.mean)
            self.precision = prior + (x * (p * (1 - p))[:, None]).T @ x
            step = np.linalg.solve(self.precision, x.T @ (clicks - p) + prior @ (before - self.mean))
            while (moved := float(np.abs(step).max())) > 1e-6 and loss(self.mean + step) > loss(self.mean):
                step /= 2
            self.mean = self.mean + step


def simulate(world: World, policy: Policy, seed: int, rounds: int) -> Float64:
    """Return the regret of each round: (rounds,)."""
    rng = np.random.default_rng(seed)
    chance = np.random.default_rng([seed, 1])  # of the policy
    rates = sigmoid(AVERAGE + rng.standard_normal(world.items))
    head = Head(world.items)
    logged = rng.integers(0, world.known, LOGGED)
    head.learn(logged, (rng.random(LOGGED) < rates[logged]).astype(float))
    regret = np.empty(rounds)
    for first in range(0, rounds, BATCH):
        factors = factor_of(head.precision)[None].astype(np.float32)
        batch = range(first, min(first + BATCH, rounds))
        shown, clicks = np.empty(len(batch), np.int64), np.empty(len(batch))
        for k, number in enumerate(batch):
            candidates = rng.choice(world.items, CANDIDATES, replace=False)
            weights = head.mean
            if policy.scale:
                weights = weights + draw(factors, f"{seed}-{number}", policy.scale)[0]
            chosen = candidates[np.argmax(weights[candidates])]  # the bias is the same for all
            if chance.random() < policy.random:
                chosen = chance.choice(candidates)
            regret[number] = rates[candidates].max() - rates[chosen]
            shown[k], clicks[k] = chosen, rng.random() < rates[chosen]
        head.learn(shown, clicks)
    return regret


def share(regret: Float64, greedy: Float64) -> tuple[float, float, float]:
    """Return the sum of regrets (seeds,) over greedy's, paired, with a 95 % bootstrap interval over the seeds."""
    rows = np.random.default_rng(0).integers(0, len(regret), (RESAMPLES, len(regret)))
    low, high = np.quantile(regret[rows].sum(1) / greedy[rows].sum(1), (0.025, 0.975))
    return float(regret.sum() / greedy.sum()), float(low), float(high)


def results(regrets: dict[str, dict[str, Float64]]) -> str:
    """Return the table. regrets: world -> policy -> (seeds, rounds)."""
    lines = []
    for world, found in regrets.items():
        totals = {name: regret.sum(1) for name, regret in found.items()}
        for name, total in totals.items():
            mean, low, high = share(total, totals[GREEDY.name])
            worst = f"{total.max():,.0f}"
            lines.append((world, name, f"{total.mean():,.0f}", worst, f"{mean:.0%} ({low:.0%} to {high:.0%})"))
    return table(("world", "policy", "regret, mean", "worst seed", "share of greedy's"), lines)


def plot(regrets: dict[str, dict[str, Float64]], path: Path) -> None:
    """Draw the mean cumulative regret over the rounds, one panel for each world."""
    figure = Figure(figsize=(12, 4))
    axes = figure.subplots(1, len(regrets), sharey=True, squeeze=False)[0]
    for panel, (world, found) in zip(axes, regrets.items(), strict=True):
        for name, regret in found.items():
            panel.plot(np.arange(1, regret.shape[1] + 1), regret.cumsum(1).mean(0), label=name)
        panel.set_title(world)
        panel.set_xlabel("rounds")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("cumulative regret, simulated clicks")
    axes[0].legend()
    save_figure(figure, path, 110)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.training.exploration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder of exploration.png; default: no plot")
    args = parser.parse_args(argv)
    runs = [(world, policy, seed) for world in WORLDS for policy in POLICIES for seed in range(args.seeds)]
    found: dict[str, dict[str, list[Float64]]] = {w.name: {p.name: [] for p in POLICIES} for w in WORLDS}
    for world, policy, seed in tqdm(runs, mininterval=1):
        found[world.name][policy.name].append(simulate(world, policy, seed, ROUNDS))
    regrets = {world: {name: np.array(rows) for name, rows in rows_of.items()} for world, rows_of in found.items()}
    print(results(regrets))
    first = {name: rows.sum(1) for name, rows in regrets[WORLDS[0].name].items()}
    reached = share(first[THOMPSON.name], first[GREEDY.name])[0]
    print(f"\nbar: {THOMPSON.name} has at most {BAR:.0%} of greedy's regret if {WORLDS[0].name}: {reached:.0%}")
    if args.out is not None:
        plot(regrets, args.out / "exploration.png")
    return int(reached > BAR)


if __name__ == "__main__":
    sys.exit(run_main("python -m loadtest.training.exploration", main, sys.argv[1:]))
