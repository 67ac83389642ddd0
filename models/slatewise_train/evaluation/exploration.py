"""Fit the posterior of the last layer of the exit `point`, for exploration by Thompson sampling.

Per head, the weights of the last layer are Gaussian around the trained ones (LiRank, arXiv 2402.06859). The precision
is the Laplace approximation of a logistic regression on the features x, the input of the last layer and a 1:

    precision = PRIOR + sum over examples of p (1 - p) x x^T

with the calibrated probability p. The slope of the calibration is left out: `set` adds to the same logit and has
another one. The examples are those of the calibration, of the validation users. Each counts as often as the training
has more of them.

Called by: `export.py`, `compression/variants.py`. Calls: `calibration.py` for its examples, `rankers/families.py`.
`inference/exploration.py` of the server draws from the posterior.
"""

from __future__ import annotations

import numpy as np
import torch

from slatewise.inference.arrays import Float32
from slatewise.inference.engine import Engine
from slatewise_train.data import Data
from slatewise_train.evaluation.calibration import calibration_slates, target_of
from slatewise_train.evaluation.cases import Case, candidates_of, state_of
from slatewise_train.evaluation.sampling import in_parallel
from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerModel

PRIOR = 1.0  # precision of a weight before any example
BATCH = 50  # slates whose sum is made at once
SPREAD_SLATES = 50  # that `spread` is measured on


def factor_of(precision: np.ndarray) -> np.ndarray:
    """Return a factor F of the covariance, F F^T = precision^-1: (..., D, D) -> (..., D, D)."""
    lower = np.linalg.cholesky(precision)  # precision = lower lower^T
    return np.swapaxes(np.linalg.inv(lower), -1, -2)


class Examples:
    """The labelled candidates of the validation slates: their features and their weights in the precision."""

    def __init__(self, engine: Engine, data: Data, model: RankerModel, meta: np.ndarray) -> None:
        """engine: has the graphs of the variant; model: its weights; meta: (M,). Raises ValueError without slates."""
        self.engine = engine
        self.data = data
        self.model = model
        self.meta = meta
        self.slates = calibration_slates(data, len(engine.items))
        if not self.slates:
            raise ValueError("[export] explore = true: there are no validation users (`validation_users` in [split])")

    def of(self, slate: tuple[Case, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """Return features (n, D), weights (n,) and the number of examples that training would count, by head."""
        case, among = slate
        state = state_of(self.engine, case)
        heads = self.data.config.heads
        found = {}
        for kind, rows in (("label", case.upcoming), ("next", among)):
            if any(head.kind == kind for head in heads):
                candidates = candidates_of(self.engine, self.data, rows, case.time)
                point = self.engine.point(candidates, self.meta, state)
                with torch.no_grad():
                    x = families.features(self.model, torch.from_numpy(point.hidden)).double().numpy()
                found[kind] = point, np.concatenate([x, np.ones((len(x), 1))], axis=1)
        result = []
        for k, head in enumerate(heads):
            point, features = found[head.kind]
            target = target_of(head, k, case, among)
            known = ~np.isnan(target)
            p = point.probabilities[known, k]
            count = known.sum() if head.kind == "label" else target.sum()  # training has an example for each event
            result.append((features[known], p * (1 - p), float(count)))
        return result

    def sums(self, slates: list[tuple[Case, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums of w x x^T (heads, D, D), and the numbers of examples (heads,)."""
        found = [self.of(slate) for slate in slates]
        total = sum(np.stack([(x * w[:, None]).T @ x for x, w, _ in slate]) for slate in found)
        return np.asarray(total), np.array([[count for _, _, count in slate] for slate in found]).sum(0)

    def posterior(self) -> Float32:
        """Return the (heads, D, D) factors of the covariances."""
        batches = [self.slates[k : k + BATCH] for k in range(0, len(self.slates), BATCH)]
        found = in_parallel(self.sums, batches, "posterior of the last layer")
        total, counts = (np.sum(part, axis=0) for part in zip(*found, strict=True))
        more = np.maximum(training_examples(self.data) / np.maximum(counts, 1.0), 1.0)  # (heads,)
        precision = PRIOR * np.eye(total.shape[-1]) + more[:, None, None] * total
        return factor_of(precision).astype(np.float32)

    def spread(self, posterior: Float32) -> dict[str, float]:
        """Return by head how far a draw of scale 1 moves a logit: the mean standard deviation over candidates."""
        names = [head.name for head in self.data.config.heads]
        found = in_parallel(self.of, self.slates[:SPREAD_SLATES])
        moved = [np.concatenate([slate[k][0] for slate in found]) @ posterior[k] for k in range(len(names))]
        return {name: round(float(np.linalg.norm(x, axis=1).mean()), 4) for name, x in zip(names, moved, strict=True)}


def training_examples(data: Data) -> np.ndarray:
    """Return the number of training events whose label is known, by head: (heads,)."""
    s = data.sequences
    places = np.arange(len(s.items)) - np.repeat(s.offsets[:-1], np.diff(s.offsets))  # in the user's events
    training = places < np.repeat(data.split.train_lengths, np.diff(s.offsets))
    return (~np.isnan(s.labels[training])).sum(0)
