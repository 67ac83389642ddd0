"""Recovery: train a low-rank model or a student, so that it ranks as well as its teacher.

The training data are the users' histories, slates that the teacher draws, and the training slates that users were
shown. There are two losses: in distillation the teacher's probabilities are the labels (Hinton et al., arXiv
1503.02531); the loss of the task is that of the training itself. The item table does not change, because variants
share it, unless the student has a table of codes, which is trained with it. Every step of a model with nested ranks
trains one of its shares, drawn at random. A stopped run resumes after its last complete epoch.

Called by: `bases.py`, `compress.py`. Calls: `nested.py`, `item_codes.py`, `train.py` (a trainer with the teacher and
the data), `batches.py`, `epochs.py`, `losses.py`, `checkpoint.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train import checkpoint
from slatewise_train.batches import Batch, make_batch
from slatewise_train.compression.item_codes import LearnedCodes
from slatewise_train.compression.nested import choose, shares_of
from slatewise_train.epochs import cosine, one_epoch, warm_up
from slatewise_train.losses import distillation_loss, listwise_kl
from slatewise_train.rankers.base import EncodedHistory, RankerModel
from slatewise_train.slates import Slates, read_slates
from slatewise_train.train import Trainer

LOSSES = ("teacher", "task")
PADDED = -1e4  # logit of padding for student and teacher: its probability is 0 and adds nothing to a loss


@dataclass(frozen=True)
class DistillConfig:
    epochs: int = 20
    loss: str = "teacher"  # one of LOSSES
    batch_events: int = 8192
    learning_rate: float = 0.003
    warmup_steps: int = 100
    positions: int = 512  # positions of a batch at which the exit `dot` learns to order items
    items: int = 2048  # items to order at each position
    windows: int = 32  # windows of a batch that get slates, for the other exits
    seed: int = 0


class Encoded(NamedTuple):
    """Sequences as a model encodes them, and the item table that it reads."""

    history: EncodedHistory
    users: Tensor  # (B, T, d)
    table: Tensor  # (items, d)

    def take(self, rows: Tensor) -> Encoded:
        return Encoded([(key[rows], value[rows]) for key, value in self.history], self.users[rows], self.table)


class Distiller:
    """Trains `student` towards `trainer.model` on the trainer's data.

    vectors: (U, M) users' meta-embeddings, from which the slates get random ones. codes: the student's item table, if
    it is not the teacher's; only distillation trains it.
    """

    def __init__(
        self,
        student: RankerModel,
        trainer: Trainer,
        vectors: np.ndarray,
        config: DistillConfig,
        codes: LearnedCodes | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        self.student = student
        self.teacher = trainer.model.eval()
        self.trainer = trainer
        self.config = config
        self.vectors = torch.from_numpy(np.array(vectors))
        self.table = trainer.model.item_table().detach()
        self.codes = codes
        self.task = self.task_trainer() if config.loss == "task" else None
        # The teacher's item table is shared, and default_meta by the whole bundle.
        for name in ("item.weight", "default_meta", "dot_scale", "dot_bias"):
            student.get_parameter(name).requires_grad_(False)
        self.shown = None if self.task is None else self.task.shown  # it learns how much a position in a slate matters
        others = [module for module in (self.shown, codes) if module is not None]
        trained = [*student.parameters(), *(parameter for module in others for parameter in module.parameters())]
        self.parameters = [parameter for parameter in trained if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True
        )
        self.epoch = 0
        self.shares = shares_of(student)
        self.identity = self.digest()

    def task_trainer(self) -> Trainer:
        """Return a trainer of the student. Users have meta-embeddings drawn from `vectors`: a bundle has no others."""
        trainer = Trainer(self.trainer.data, self.student, self.trainer.config)
        drawn = torch.randint(len(self.vectors), (len(trainer.meta.weight),))
        trainer.meta.load_state_dict({"weight": self.vectors[drawn, : self.student.meta_size]})
        trainer.meta.requires_grad_(False)
        return trainer

    def loss(self, windows: np.ndarray) -> Tensor:
        """Return the sum of the losses of all exits on a batch of windows.

        In distillation, the loss of `dot` uses random positions of all windows, the other exits use slates from a
        random part of them.
        """
        if self.shares:
            choose(self.student, int(torch.randint(len(self.shares), ())))
        batch = make_batch(self.trainer.data.sequences, windows)
        if self.task is not None:
            return self.task.loss(batch, cascade=True)
        with torch.no_grad():
            theirs = encoded(self.teacher, batch, self.table)
        mine = encoded(self.student, batch, self.table if self.codes is None else self.codes())
        loss = self.dot_loss(batch, mine, theirs)
        rows = torch.randperm(len(batch.users))[: self.config.windows]
        return sum(self.slate_losses(batch.take(rows), mine.take(rows), theirs.take(rows)), loss)

    def dot_loss(self, batch: Batch, mine: Encoded, theirs: Encoded) -> Tensor:
        """Return `listwise_kl` of random items at random positions. mine, theirs: of student and teacher."""
        real = (torch.arange(batch.items.shape[1]) <= batch.lengths[:, None]).flatten().nonzero()[:, 0]
        places = real[torch.randperm(len(real))[: self.config.positions]]
        items = FIRST_ITEM + torch.randperm(len(self.table) - FIRST_ITEM)[: self.config.items]
        scale = self.teacher.dot_scale.detach().abs().max()
        found, target = (
            (scale * (one.users.flatten(0, 1)[places] @ one.table[items].T))[..., None] for one in (mine, theirs)
        )
        return listwise_kl(found, target)

    def slate_losses(self, batch: Batch, mine: Encoded, theirs: Encoded) -> list[Tensor]:
        """Return the losses of slates that the teacher draws, and of slates that users were shown, if there are any."""
        slates = self.trainer.draw_slates(batch, theirs.users, self.table)
        losses = self.exit_losses(slates, mine, theirs)
        shown = None if self.trainer.shown is None else self.trainer.shown.draw(batch)
        if shown is not None:
            exists = shown.slates.exists[:, 0]
            losses += self.exit_losses(shown.slates, mine.take(shown.rows), theirs.take(shown.rows), exists)
        return losses

    def exit_losses(self, slates: Slates, mine: Encoded, theirs: Encoded, exists: Tensor | None = None) -> list[Tensor]:
        """Return `distillation_loss` of each exit above `dot`.

        Half of the positions have the default meta-embedding, the other half a random user's. mine, theirs: of student
        and teacher; exists: (R, C) of shown slates, False for padding.
        """
        drawn = self.vectors[torch.randint(len(self.vectors), slates.read.shape)]
        meta = torch.where(torch.rand(*slates.read.shape, 1) < 0.5, drawn, self.teacher.default_vector())

        def logits(model: RankerModel, read: Encoded) -> dict[str, Tensor]:
            dot, hidden = read_slates(model, slates, read.history, read.users, read.table[slates.candidates], meta)
            if exists is None:
                return model.logits_by_exit(dot, hidden, meta=meta.flatten(0, 1))
            found = model.logits_by_exit(dot, hidden, exists[:, None, None], meta.flatten(0, 1))
            return {exit: value.where(exists[..., None], PADDED) for exit, value in found.items()}

        with torch.no_grad():
            wanted = logits(self.teacher, theirs)
        found = logits(self.student, mine)
        return [distillation_loss(found[exit], wanted[exit]) for exit in found if exit != "dot"]

    def run_epoch(self) -> float:
        """Train for one pass over the training events and return the mean loss."""
        self.student.train(self.task is not None)  # no dropout in distillation: the teacher labels every input
        config = self.config

        def rate(step: int, steps: int) -> float:
            warm = warm_up(self.epoch * steps + step, config.warmup_steps)
            return config.learning_rate * warm * cosine((self.epoch + step / steps) / config.epochs)

        mean = one_epoch(config, self.trainer.data, self.epoch + 1, self.optimizer, self.parameters, rate, self.loss)
        self.epoch += 1
        self.student.eval()
        return mean

    def digest(self) -> str:
        """Return the checkpoint's identity, computed from teacher, initial student, data and configs."""
        trainer = self.trainer
        values = (
            self.student.config,
            self.config,
            trainer.config,
            trainer.data.config,
            trainer.data.split.train_lengths.tolist(),
        )
        nested = (self.shares,) if self.shares else ()  # the smaller ranks are not in the shapes of the weights
        learned = [] if self.codes is None else [self.codes]
        weights = [value for part in (self.teacher, self.student, *learned) for value in part.state_dict().values()]
        return checkpoint.identity((*values, *nested), [self.vectors, *weights])


def encoded(model: RankerModel, batch: Batch, table: Tensor) -> Encoded:
    return Encoded(*model.encode(model.tokens(table[batch.items], batch.actions, batch.gaps)), table)


def distill(
    student: RankerModel,
    trainer: Trainer,
    vectors: np.ndarray,
    config: DistillConfig,
    path: Path,
    codes: LearnedCodes | None = None,
) -> list[float]:
    """Train the student in place, with its item table of codes if it has one, and return the loss of each epoch.

    path: a checkpoint, which is resumed if it belongs to the same work and replaced otherwise.
    """
    distiller = Distiller(student, trainer, vectors, config, codes)
    parts: dict[str, checkpoint.Stateful] = {"student": student, "optimizer": distiller.optimizer}
    if codes is not None:
        parts["codes"] = codes
    if distiller.shown is not None:
        parts["shown"] = distiller.shown
    try:
        progress = checkpoint.resume(path, distiller.identity, parts, "other work")
    except checkpoint.CheckpointMismatch:
        progress = {}
    losses: list[float] = progress.get("losses", [])
    distiller.epoch = len(losses)
    while distiller.epoch < config.epochs:
        losses.append(round(distiller.run_epoch(), 5))
        print(f"{path.stem}: epoch {distiller.epoch} of {config.epochs}, loss {losses[-1]}", flush=True)
        checkpoint.save(path, distiller.identity, parts, losses=losses)
    return losses
