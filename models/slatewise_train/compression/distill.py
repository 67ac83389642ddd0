"""A ranker learns to score and to order as another: the recovery of a low-rank ranker, and the training of a student.

What it learns from is histories and drawn slates alone; the teacher's probabilities are the labels (Hinton et al., arXiv 1503.02531).
The item table stays as it is: it is one for all variants. Stop it when you like: the same call goes on after the last whole epoch.
Before: `low_rank.py` or `student.py` made the ranker, `restore.py` its teacher. After: `compress.py` quantizes and measures it.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.batches import make_batch, read_slates
from slatewise_train.epochs import one_epoch
from slatewise_train.losses import distillation_loss, listwise_kl
from slatewise_train.rankers.ligr import Ligr
from slatewise_train.train import Trainer


@dataclass(frozen=True)
class DistillConfig:
    epochs: int = 20
    batch_events: int = 8192
    learning_rate: float = 0.003
    warmup_steps: int = 100
    positions: int = 512  # of a batch, at which the exit `dot` orders items
    items: int = 2048  # that it orders there
    windows: int = 32  # of a batch, with slates for the exits above
    seed: int = 0


class Distiller:
    """`student` learns from `trainer.model`, whose data it reads; `vectors` (U, M) are users' meta-embeddings to draw from."""

    def __init__(self, student: Ligr, trainer: Trainer, vectors: np.ndarray, config: DistillConfig) -> None:
        torch.manual_seed(config.seed)
        self.student = student
        self.teacher = trainer.model.eval()
        self.trainer = trainer
        self.config = config
        self.vectors = torch.from_numpy(np.array(vectors))
        self.table = trainer.model.item_table().detach()
        for name in (
            "item.weight",
            "default_meta",
            "dot_scale",
            "dot_bias",
        ):  # what the exit `dot` is to learn are user vectors
            student.get_parameter(name).requires_grad_(False)
        self.parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True
        )
        self.epoch, self.identity = 0, self.digest()

    def loss(self, windows: list[tuple[int, int, int]]) -> Tensor:
        """Of all exits: `dot` at some positions of the batch over some items, `point` and `set` on the slates of some windows."""
        student = self.student
        teacher = self.teacher
        config = self.config
        batch = make_batch(self.trainer.data.sequences, windows)
        vectors = self.table[batch.items]
        with torch.no_grad():
            known, wanted = teacher.encode(teacher.tokens(vectors, batch.actions, batch.gaps))
        state, users = student.encode(student.tokens(vectors, batch.actions, batch.gaps))
        real = (torch.arange(batch.items.shape[1]) <= batch.lengths[:, None]).flatten().nonzero()[:, 0]
        places = real[torch.randperm(len(real))[: config.positions]]
        items = self.table[FIRST_ITEM + torch.randperm(len(self.table) - FIRST_ITEM)[: config.items]]
        scale = teacher.dot_scale.detach().abs().max()
        found, target = (scale * (vector.flatten(0, 1)[places] @ items.T)[..., None] for vector in (users, wanted))
        loss = listwise_kl(found, target)
        rows = torch.randperm(len(batch.users))[: config.windows]
        some = batch.take(rows)
        wanted = wanted[rows]
        users = users[rows]
        known, state = ([(key[rows], value[rows]) for key, value in pairs] for pairs in (known, state))
        slates = self.trainer.draw_slates(some, wanted, self.table)
        drawn = self.vectors[torch.randint(len(self.vectors), slates.read.shape)]
        meta = torch.where(torch.rand(*slates.read.shape, 1) < 0.5, drawn, teacher.default_meta.detach())
        candidates = self.table[slates.candidates]
        with torch.no_grad():
            target, set_target = exits(teacher, *read_slates(teacher, slates, known, wanted, candidates, meta))
        point, set_wise = exits(student, *read_slates(student, slates, state, users, candidates, meta))
        loss = loss + distillation_loss(point, target)
        return loss if set_wise is None else loss + distillation_loss(set_wise, set_target)

    def run_epoch(self) -> float:
        """One pass over the training events; the mean loss."""
        self.student.eval()  # no dropout: there is a teacher's answer for every input
        mean = one_epoch(self.config, self.trainer.data, self.epoch + 1, self.optimizer, self.parameters, self.loss)
        self.epoch += 1
        return mean

    def digest(self) -> str:
        """What a checkpoint must share with whoever goes on from it: teacher, the student as it began, data and configs."""
        trainer = self.trainer
        parts = (
            self.student.config,
            self.config,
            trainer.config,
            trainer.data.config,
            trainer.data.split.train_lengths.tolist(),
        )
        digest = hashlib.sha256(repr(parts).encode() + self.vectors.numpy().tobytes())
        for model in (self.teacher, self.student):
            digest_weights(digest, model)
        return digest.hexdigest()


def digest_weights(digest: Any, model: Ligr) -> None:
    """Into a digest of hashlib."""
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)}".encode() + value.numpy().tobytes())


def exits(model: Ligr, dot: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits (rows, C, heads) of `point` and `set`; the whole of C is one slate."""
    point = dot + model.point_logits(hidden)
    return point, point + model.set_logits(hidden) if model.config.set_blocks else None


def distill(
    student: Ligr, trainer: Trainer, vectors: np.ndarray, config: DistillConfig, checkpoint: Path
) -> list[float]:
    """The student's weights change in place; the loss of each epoch. Goes on from the checkpoint where it is of the same work."""
    distiller = Distiller(student, trainer, vectors, config)
    losses = []
    if checkpoint.exists() and (saved := torch.load(checkpoint, weights_only=True))["identity"] == distiller.identity:
        student.load_state_dict(saved["student"])
        distiller.optimizer.load_state_dict(saved["optimizer"])
        distiller.epoch = len(saved["losses"])
        losses = saved["losses"]
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    while distiller.epoch < config.epochs:
        losses.append(round(distiller.run_epoch(), 5))
        print(f"{checkpoint.stem}: epoch {distiller.epoch} of {config.epochs}, loss {losses[-1]}", flush=True)
        saved = {
            "identity": distiller.identity,
            "student": student.state_dict(),
            "optimizer": distiller.optimizer.state_dict(),
            "losses": losses,
        }
        torch.save(saved, checkpoint.with_suffix(".part"))
        os.replace(checkpoint.with_suffix(".part"), checkpoint)
    return losses
