"""The penalty that keeps an update near the weights that it starts from (LiRank, arXiv 2402.06859).

    loss = L(new events; w) + weight / 2 * sum_i F_i (w_i - v_i)^2

v are the old weights, w the new ones. F is the diagonal of the Fisher information of old events at v, scaled to a mean
of 1, so that one weight of the penalty suits rankers of all sizes; or 1 for every weight. LiRank adds it up over all
days before. Here the old events are at hand: it is measured again in each update, and no bundle stores it.

Each step is one of the optimizer on L, and then the exact minimum of the penalty and of the distance to that point
(a proximal step), as AdamW takes its weight decay: Adam divides each gradient by its size, so a penalty in the gradient
would lose F. A very large weight leaves the old weights as they are.

Called by: `update.py`. Calls: torch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

LEAST = 0.1  # of the importance, whose mean is 1: a weight that the sample of old events does not reach is kept too


class Penalty:
    """The penalty of a model's trainable weights against those that it has now."""

    def __init__(self, model: nn.Module, weight: float, importance: dict[str, Tensor] | None = None) -> None:
        """importance: F by name of the parameter, as `fisher` returns it; None: 1 for every weight."""
        self.weight = weight
        self.terms = [
            (parameter, parameter.detach().clone(), None if importance is None else importance[name])
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    @torch.no_grad()
    def pull(self, rate: float) -> None:
        """Take the penalty's part of a step, after that of the loss. rate: the learning rate of the step."""
        for parameter, old, importance in self.terms:
            strength = rate * self.weight
            kept = 1 / (1 + strength) if importance is None else 1 / (1 + strength * importance)
            parameter.copy_(old + (parameter - old) * kept)


def fisher(model: nn.Module, losses: Iterable[Tensor]) -> tuple[dict[str, Tensor], float]:
    """Return the diagonal of the empirical Fisher information by name, and the mean squared gradient of a batch.

    The information is that of the squared gradients of the losses of batches. Its mean over all weights is 1 before the
    least value `LEAST` is applied. The mean squared gradient is that over all weights, 0.0 without a gradient.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    batches = 0
    for loss in losses:
        batches += 1
        model.zero_grad()
        if loss.requires_grad:  # a batch without slates may have no gradient
            loss.backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                sums[name].add_(parameter.grad.square())
    model.zero_grad()
    mean = sum(float(s.sum()) for s in sums.values()) / max(1, sum(s.numel() for s in sums.values()))
    return {name: (s / mean if mean else s).clamp(min=LEAST) for name, s in sums.items()}, mean / max(1, batches)
