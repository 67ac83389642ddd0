"""Train a ranker on new events, near the weights that it has.

A few passes over the new events, each read with the user's whole history as context, by all exits of the cascade. Old
events are replayed beside them. The penalty of `penalty.py` holds the weights. Meta-embeddings keep their meaning: the
weights through which they act do not change, so stored vectors stay valid.

An update has few steps. Adam divides each gradient by its usual size, and without a past its first steps move every
weight alike, whatever its gradient says. So the optimizer begins with the squared gradients of old events, which the
Fisher information has measured.

Called by: `update_command.py`, `loadtest/training/`. Calls: `windows.py`, `penalty.py`, `train.py`, `epochs.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from slatewise.inference.arrays import UNKNOWN_ITEM
from slatewise_train.batches import epoch_windows
from slatewise_train.epochs import gradient_step, warm_up
from slatewise_train.incremental.penalty import Penalty, fisher
from slatewise_train.incremental.windows import batches_of, new_windows, replayed_windows
from slatewise_train.train import Trainer

FISHER_BATCHES = 12
MOST_REPLAYED = 0.15  # of all old events, in a pass: a day of much news takes no more of the time of a training
PAST_STEPS = 1_000  # that the optimizer seems to have taken: it corrects its moments as in a long training
WARM_STEPS = 5
SAME = 1e-5  # largest difference of an id row from the unknown item's, for an item that was never trained


@dataclass(frozen=True)
class UpdateConfig:
    """How an update trains. The defaults are those of docs/training.md."""

    passes: int = 2  # over the new events
    learning_rate: float = 0.003  # of the first step after the warm-up; it falls to 0
    penalty: float = 100.0  # a step takes about learning_rate * penalty of the change of a weight of mean importance
    importance: Literal["fisher", "identity"] = "fisher"
    replay: float = 6.0  # old events in a pass, for each event that is read for the new ones
    batch_events: int = 4096  # of a batch, padding included
    seed: int = 0


def update(trainer: Trainer, since: np.ndarray, config: UpdateConfig, cascade: bool = True) -> float:
    """Train on the events from `since` on, and return the mean loss; 0.0 without such events, and nothing changes.

    trainer: of the ranker with the old weights and all data; since: (U,) events of each user that are old; cascade:
    also train the exits `point` and `set`.
    """
    model = trainer.model
    lengths = trainer.data.split.train_lengths
    longest = trainer.data.config.history_length
    windows = new_windows(since, lengths, longest)
    if not len(windows):
        return 0.0
    rng = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    ids = model.get_parameter("item.weight")
    with torch.no_grad():
        trainer.meta.weight.copy_(model.default_meta.expand_as(trainer.meta.weight))
        unseen = (ids[trainer.untrained] - ids[UNKNOWN_ITEM]).abs().amax(1) <= SAME
    trainer.meta.requires_grad_(False)
    model.freeze_meta()
    model.train()
    importance = None
    if config.importance == "fisher":
        importance, square = fisher(model, old_losses(trainer, since, config, cascade))
        if square:
            begin_with(trainer.optimizer, model, {name: f * square for name, f in importance.items()})
    penalty = Penalty(model, config.penalty, importance)
    read = int((windows[:, 2] - windows[:, 1]).sum())
    old = np.minimum(since, lengths)  # held-out events are not replayed
    count = round(min(config.replay * read, MOST_REPLAYED * int(old.sum())))
    batches: list[np.ndarray] = []
    for _ in range(config.passes):
        replayed = replayed_windows(old, longest, count, rng)
        batches += batches_of(np.concatenate([windows, replayed]), config.batch_events, rng)
    total = 0.0
    clipped = list(model.parameters())
    for step, batch in enumerate(batches):
        rate = config.learning_rate * warm_up(step, WARM_STEPS) * (1 - step / len(batches))
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = 0.0  # the penalty holds the weights
        total += float(gradient_step(trainer.optimizer, clipped, trainer.step_loss(batch, cascade)))
        if config.penalty:
            penalty.pull(rate)
    with torch.no_grad():  # an item that no training has seen keeps following from its fields alone
        ids[trainer.untrained[unseen]] = ids[UNKNOWN_ITEM].clone()
    model.eval()
    return total / len(batches)


def begin_with(optimizer: torch.optim.Optimizer, model: torch.nn.Module, squares: dict[str, Tensor]) -> None:
    """Let Adam begin as after a long training. squares: squared gradients by name of the parameter."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(PAST_STEPS), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": squares[name].clone(),
            }


def old_losses(trainer: Trainer, since: np.ndarray, config: UpdateConfig, cascade: bool) -> Iterator[Tensor]:
    """Yield the losses of some batches of old events, for the Fisher information."""
    rng = np.random.default_rng([config.seed, 1])
    old = np.minimum(since, trainer.data.split.train_lengths)
    if not old.any():
        return
    windows = epoch_windows(old, trainer.data.config.history_length, config.batch_events, rng)
    for batch in itertools.islice(windows, FISHER_BATCHES):
        yield trainer.step_loss(batch, cascade)
