"""Fit the field vectors to items whose id is unknown, after training.

In training, the vectors of fields are parts of the vectors of known items, whose ids make up for what the fields do not
say. The exit `dot` never scores an item by its fields alone. Here, the ids of all candidates are hidden, the ranker and
the vectors of known items are frozen, and the field vectors move from their trained values f0 to the minimum of

    STRENGTH * |f - f0|^2
    + mean over events, heads `label`:   LABELS * -log p(label | fields)    exit `point`
    + mean over events, heads `next`:    log(1 + exp(L - z))                z = scale (user . fields), exit `dot`
          + sum over the trained items:  log(1 + exp(z - L))                L = logsumexp of the known items

The last sum stands for the items without an id that were not taken. Without it, all of them would be favourites.

A tenth of the trained items takes no part in the fit. It is kept if it lowers the loss of their events. The id rows of
trained items take up the change of their fields, so known items keep their vectors, up to rounding.

Called by: `export.py`, `loadtest/training/new_items.py`. Calls: `tasks.py`, `losses.py`, `slates.py`, the ranker.

Letters in shapes: U users, P events of a user, n items, d width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ITEM
from slatewise_train.data import Data, training_events
from slatewise_train.losses import label_losses
from slatewise_train.meta.tasks import RankerTables, ReadEvents, read_events
from slatewise_train.rankers.base import RankerModel
from slatewise_train.slates import Slates, read_slates

USERS = 1_400
EVENTS = 24  # of each user, the newest
CHUNK_USERS = 28  # in a step
EPOCHS = 4
RATE = 0.01
STRENGTH = 1e-3
LABELS = 3.0  # at 1, the labels of held-out items of MovieLens are predicted worse after the fit than before it
OTHERS = 128  # items that stand for all in a step
MOST_HELD_OUT = 1_000  # items that stand for all in the loss of held-out items
MOST_KNOWN = 20_000  # known items in `logsumexp`; of a larger catalogue a sample
HELD_OUT = 0.1  # of the trained items


@dataclass(frozen=True)
class Chunk:
    """Events of U users, and what the frozen ranker computes for them."""

    read: ReadEvents
    users: Tensor  # (U, P, d) user vectors right before the events
    labels: Tensor  # (U, P, heads)
    rivals: Tensor  # (U, P, heads) L of each head of kind `next`


class FieldFit:
    """The fit of the field vectors of one ranker. `model` is a copy, whose field vectors `fit` changes.

    seed: of the users, the items that take no part, the order of the steps, and the items that stand for all.
    """

    def __init__(self, model: RankerModel, data: Data, seed: int = 0) -> None:
        self.data = data
        self.kinds = [head.kind for head in data.config.heads]
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.table = self.model.item_table()  # (items, d) before the fit
        self.fields = [self.model.field_table(name) for name in model.config.fields]
        self.rng = np.random.default_rng(seed)
        trained = np.unique(training_events(data.sequences, data.split)[1])
        self.trained = self.rng.permutation(trained[trained >= FIRST_ITEM])  # rows
        held_out = round(HELD_OUT * len(self.trained))
        self.held_out, self.fitted = self.trained[:held_out], self.trained[held_out:]
        known = self.trained[:MOST_KNOWN]
        self.known = self.table[torch.from_numpy(known)]
        self.missing = float(np.log(max(1, len(self.trained)) / max(1, len(known))))  # of the sum over a sample
        lengths = data.split.train_lengths
        users = self.rng.permutation(np.flatnonzero(lengths))[:USERS]
        users = users[np.argsort(lengths[users], kind="stable")]  # little padding
        self.chunks = [users[first : first + CHUNK_USERS] for first in range(0, len(users), CHUNK_USERS)]

    @torch.no_grad()
    def read(self, users: np.ndarray) -> Chunk:
        """Read the newest events of users (U,). They are read anew for each step: histories can be large."""
        cases = [(int(user), int(self.data.split.train_lengths[user]) - EVENTS) for user in users]
        tables = RankerTables(self.model, self.table, torch.zeros(0))
        read = read_events(tables, self.data.sequences, cases, self.data.config.history_length, 0, EVENTS)
        now = read.at_events(read.users)
        rivals = torch.zeros(*read.target.shape, len(self.kinds))
        for k, kind in enumerate(self.kinds):
            if kind == "next":
                rivals[..., k] = torch.logsumexp(now @ self.known.T * self.model.dot_scale[k], dim=-1) + self.missing
        return Chunk(read, now, read.at_events(read.batch.labels, 1), rivals)

    def cold(self, rows: Tensor) -> Tensor:
        """Return the vectors of items from their fields alone: rows (...) -> (..., d)."""
        with_unknown = F.pad(rows.flatten(), (1, 0), value=UNKNOWN_ITEM)
        return self.model.item_vectors(with_unknown)[1][1:].unflatten(0, rows.shape)

    def logits(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Return the logits of `dot` and `point` of each event's item with its id hidden: (U, P, heads) twice.

        The request has no numeric features and no meta-embedding, as for `meta/new_items.py`.
        """
        model, read = self.model, chunk.read
        u, p = read.target.shape
        slates = Slates(
            read=read.column,
            candidates=read.target[..., None],
            numeric=torch.full((u, p, 1, model.config.numeric), torch.nan),
            context=read.at_events(read.batch.contexts),
            exists=read.real[..., None],
            labels=chunk.labels[:, :, None],
            log_rate=torch.zeros(u, p, 0),
        )
        vectors = self.cold(read.target)[:, :, None]
        dot, hidden = read_slates(model, slates, read.history, read.users, vectors, model.default_meta.expand(u, p, -1))
        return dot.view(u, p, -1), model.point(dot, hidden).view(u, p, -1)

    def loss(self, chunk: Chunk, items: np.ndarray, others: np.ndarray) -> tuple[Tensor, int]:
        """Return the loss summed over the events of `items` (n,), and their number. others: rows that stand for all."""
        counted = chunk.read.real & torch.isin(chunk.read.target, torch.from_numpy(items))
        dot, point = self.logits(chunk)
        not_taken = chunk.users[counted] @ self.cold(torch.from_numpy(others)).T  # (events, others)
        loss = dot.new_zeros(())
        for k, kind in enumerate(self.kinds):
            if kind == "label":
                loss = loss + LABELS * label_losses(point[..., k], chunk.labels[..., k])[counted].sum()
            else:
                rivals = chunk.rivals[..., k][counted]
                z = dot[..., k][counted] - self.model.dot_bias[k]
                rest = F.softplus(not_taken * self.model.dot_scale[k] - rivals[:, None]).mean(1) * len(self.trained)
                loss = loss + (F.softplus(rivals - z) + rest).sum()
        return loss, int(counted.sum())

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the mean loss of the events of the items that take no part. NaN without such events."""
        total, events = 0.0, 0
        for users in self.chunks:
            loss, count = self.loss(self.read(users), self.held_out, self.held_out[:MOST_HELD_OUT])
            total, events = total + float(loss), events + count
        return total / events if events else float("nan")

    def fit(self) -> None:
        """Move the field vectors, and keep the vectors of known items."""
        before = [table.clone() for table in self.fields]
        for table in self.fields:
            table.requires_grad_(True)
        optimizer = torch.optim.Adam(self.fields, lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(self.chunks))
        for _ in range(EPOCHS):
            for k in self.rng.permutation(len(self.chunks)):
                others = self.rng.choice(self.fitted, OTHERS)
                loss, count = self.loss(self.read(self.chunks[k]), self.fitted, others)
                loss = loss / max(1, count)
                for table, start in zip(self.fields, before, strict=True):
                    loss = loss + STRENGTH * (table - start).square().sum()
                optimizer.zero_grad()
                loss.backward()
                for table in self.fields:
                    if table.grad is not None:
                        table.grad[0] = 0.0  # the row of a missing value is also a part of the unknown item
                optimizer.step()
                schedule.step()
        self.model.requires_grad_(False)
        rows = torch.from_numpy(self.trained)
        self.model.get_parameter("item.weight")[rows] += (self.table - self.model.item_table())[rows]


def fit_fields(model: RankerModel, data: Data) -> RankerModel:
    """Return a copy of a trained ranker with fitted field vectors, or the ranker itself if the fit does not help.

    Prints the loss of the items that take no part. A ranker without fields is returned as it is.
    """
    if not model.config.fields:
        return model
    fit = FieldFit(model, data)
    before = fit.held_out_loss()
    if np.isnan(before):
        return model
    fit.fit()
    after = fit.held_out_loss()
    kept = after < before
    line = f"loss of held-out items without their ids {before:.4f}, with fitted field vectors {after:.4f}"
    print(line if kept else f"{line}: not kept", flush=True)
    return fit.model if kept else model
