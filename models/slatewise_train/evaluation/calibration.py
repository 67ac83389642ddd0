"""Strictly increasing maps from logit to calibrated logit, one per head, exit and variant (after LiRank's isotonic layer).

Before: a variant's uncalibrated graphs have scored the validation users. After: `graphs.py` writes the map into the graph.
"""

import numpy as np
import torch
from torch.nn import functional as F

from slatewise_train.rankers.base import Calibration

LEAST_SLOPE = 1e-3
MOST_SLOPE = 2.0  # beyond the latter, logits that differ could meet at a probability of 1
MOST_BIAS = 10.0


def fit_calibration(logits: np.ndarray, labels: np.ndarray, knots: int = 6, steps: int = 300) -> Calibration:
    """Least cross-entropy over piecewise linear maps with slopes from 1e-3 to 2, linear outside the knots.

    logits, labels: (E,), labels 0 or 1. The knots stand at quantiles of the logits; slopes of neighbouring pieces are
    drawn together by a small penalty, so that a thin sample gives nearly a straight line. Fewer than 50 examples of
    either label: the identity.
    """
    labels = labels.astype(np.float64)
    if min(labels.sum(), (1 - labels).sum()) < 50:
        return Calibration.identity()
    positions = np.unique(np.quantile(logits, np.linspace(0.05, 0.95, knots)))
    x = torch.tensor(logits, dtype=torch.float64)
    y = torch.tensor(labels)
    at = torch.tensor(positions)
    raw = torch.zeros(len(positions) + 1, dtype=torch.float64, requires_grad=True)  # slopes of about 1
    raw_bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    over = (x[:, None] - at).clamp(min=0)

    def pieces() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        slopes = LEAST_SLOPE + (MOST_SLOPE - LEAST_SLOPE) * torch.sigmoid(raw)
        bias = MOST_BIAS * torch.tanh(raw_bias)
        return slopes, bias, bias + slopes[0] * x + over @ slopes.diff()

    optimizer = torch.optim.LBFGS([raw, raw_bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        slopes, _, mapped = pieces()
        loss = F.binary_cross_entropy_with_logits(mapped, y) + 1e-3 * slopes.log().diff().square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    slopes, bias, _ = pieces()
    found = slopes.detach().numpy()
    return Calibration(float(found[0]), float(bias.detach()), positions, np.diff(found))
