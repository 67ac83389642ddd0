"""Run one epoch of gradient steps, with its learning rate, random numbers and batches.

Called by: `train.py`, `progress.py`, `compression/distill.py`. Calls: `batches.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from slatewise_train.batches import epoch_windows
from slatewise_train.data import Data


class Batches(Protocol):
    """The fields of a config that `one_epoch` reads."""

    @property
    def batch_events(self) -> int: ...
    @property
    def seed(self) -> int: ...


Rate = Callable[[int, int], float]  # (step of the epoch from 0, steps of the epoch) -> learning rate


def cosine(progress: float) -> float:
    """Return half a cosine from 1 down to 0. progress: from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def warm_up(step: int, steps: float) -> float:
    """Return the share of the learning rate that a step has (from 0), if it rises linearly over the first `steps`."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


def gradient_step(optimizer: torch.optim.Optimizer, clipped: list[torch.nn.Parameter], loss: Tensor) -> Tensor:
    """Change the weights by the loss's gradient, clipped to norm 1. Returns the loss without its graph, float64.

    A batch of users without slates has no loss for heads of kind `label`, and changes nothing.
    """
    if not loss.requires_grad:
        return loss.double()
    optimizer.zero_grad()
    loss.backward()
    gradients = [parameter.grad for parameter in clipped if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    # On a CPU the comparison costs nothing, and a factor of 1 would be a pass over the gradients of all items.
    if norm.device.type != "cpu" or norm > 1:
        torch.nn.utils.clip_grads_with_norm_(clipped, 1.0, norm)
    optimizer.step()
    return loss.detach().double()


def one_epoch(
    config: Batches,
    data: Data,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    clipped: list[torch.nn.Parameter],
    rate: Rate,
    loss: Callable[[np.ndarray], Tensor],
) -> float:
    """Train for one pass over the training events and return the mean loss of the batches.

    epoch: counted from 1. Random numbers depend on the epoch and the seed alone, so a resumed training repeats them.
    clipped: parameters whose gradient is clipped to norm 1 in each step.
    """
    rng = np.random.default_rng([config.seed, epoch - 1])
    torch.manual_seed(config.seed * 1_000_003 + epoch - 1)
    batches = list(epoch_windows(data.split.train_lengths, data.config.history_length, config.batch_events, rng))
    total: Tensor | float = 0.0  # a tensor on its device: a number of every step would wait for the GPU
    for k, windows in enumerate(tqdm(batches, desc=f"epoch {epoch}", leave=False, mininterval=2)):
        for group in optimizer.param_groups:
            group["lr"] = rate(k, len(batches))
        total = total + gradient_step(optimizer, clipped, loss(windows))
    return float(total) / len(batches)
