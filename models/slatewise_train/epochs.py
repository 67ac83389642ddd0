"""Run one epoch of gradient steps, with its learning rate, random numbers and batches.

Called by: `train.py`, `compression/distill.py`. Calls: `batches.py`.
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


class Schedule(Protocol):
    """The fields of a config that `one_epoch` reads."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_events(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def seed(self) -> int: ...


def learning_rate(config: Schedule, progress: float, step: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then half a cosine down to 0 over all epochs.

    progress: from 0 to 1 over the training.
    """
    return config.learning_rate * min(1.0, (step + 1) / config.warmup_steps) * 0.5 * (1 + math.cos(math.pi * progress))


def one_epoch(
    config: Schedule,
    data: Data,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    clipped: list[torch.nn.Parameter],
    loss: Callable[[np.ndarray], Tensor],
) -> float:
    """Train for one pass over the training events and return the mean loss of the batches.

    epoch: counted from 1. Random numbers depend on the epoch and the seed alone, so a resumed training repeats them.
    clipped: parameters whose gradient is clipped to norm 1 in each step.
    """
    rng = np.random.default_rng([config.seed, epoch - 1])
    torch.manual_seed(config.seed * 1_000_003 + epoch - 1)
    batches = list(epoch_windows(data.split.train_lengths, data.config.history_length, config.batch_events, rng))
    total = 0.0
    for k, windows in enumerate(tqdm(batches, desc=f"epoch {epoch}", leave=False, mininterval=2)):
        progress = (epoch - 1 + k / len(batches)) / config.epochs
        step = (epoch - 1) * len(batches) + k
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, progress, step)
        found = loss(windows)
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(clipped, 1.0)
        optimizer.step()
        total += found.item()
    return total / len(batches)
