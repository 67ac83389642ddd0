"""Train on slates that users were shown: draw them for a batch, and compute their losses.

An item that was shown and not chosen is a negative of heads of kind `next`, and has the label 0 of these heads. Three
things can be added to the losses of these slates; none of them is part of the ranker that is exported:

- `slate_loss` in [train]: a list-wise loss of the exits `point` and `set`, beside the binary cross-entropy, which
  keeps the probabilities calibrated.
- `position_bias`: a learned logit for each position, the chance that users look there (Guo et al., PAL, RecSys 2019).
- `propensity_power`: a positive label at position r counts r ** power times, the inverse of the chance that users look
  there (Joachims et al., WSDM 2017). The binary cross-entropy then is that of Saito et al., WSDM 2020.

Called by: `train.py`. Calls: `exposures.py`, `slates.py`, `losses.py`, `listwise.py`.

Letters in shapes: R slates of a batch, C items of the longest slate, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slatewise.bundle.features import request_context
from slatewise.inference.arrays import UNKNOWN_ITEM
from slatewise_train import listwise
from slatewise_train.batches import Batch
from slatewise_train.config import TrainConfig
from slatewise_train.data import Data, request_times
from slatewise_train.exposures import training_slates
from slatewise_train.rankers.base import EncodedHistory, RankerModel
from slatewise_train.slates import MISSING_NUMERIC, Slates, read_slates

ListLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
LIST_LOSSES: dict[str, ListLoss] = {
    "softmax": listwise.slate_softmax,
    "neural_ndcg": listwise.neural_ndcg,
    "lambda": listwise.lambda_loss,
}
OWN_POSITIONS = 16  # positions with a bias of their own; behind them, every quarter of a doubling has one
BUCKETS = 40
MOST_WEIGHT = 100.0  # of a positive label: a click at a rare place must not outweigh all others


def position_buckets(positions: Tensor) -> Tensor:
    """Return buckets of positions from 1 on, of the same shape; 0 is unknown. 300 is in bucket 32."""
    far = OWN_POSITIONS + (4 * torch.log2(positions.clamp(min=1) / OWN_POSITIONS)).floor().long()
    return torch.where(positions <= OWN_POSITIONS, positions, far).clamp(max=BUCKETS - 1)


def list_loss(name: str, scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the mean list-wise loss of slates: scores, labels, weights (R, C); labels NaN if unknown or padding -> ().

    weights: of positive labels. A slate counts as much as its positive labels do on average.
    """
    mask = ~labels.isnan()
    chosen = labels.nan_to_num()
    slate_weight = (chosen * weights).sum(dim=1) / chosen.sum(dim=1).clamp(min=1)
    return (LIST_LOSSES[name](scores, chosen * weights, mask) * slate_weight).mean()


def weighted_label_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the binary cross-entropy with labels that are weighted by their inverse propensity: all (R, C) -> ().

    The label of a chosen item is its weight, so that its mean is the probability after a look at the item (Saito et
    al., equation 9). Unknown labels are NaN.
    """
    known = ~labels.isnan()
    if not known.any():
        return logits.new_zeros(())
    return (F.softplus(logits[known]) - (labels * weights)[known] * logits[known]).mean()


@dataclass(frozen=True)
class ShownSlates:
    """R slates of a batch, padded to C items."""

    rows: Tensor  # (R,) int64, the row of the batch
    slates: Slates  # candidates (R, 1, C) without drawn negatives
    weights: Tensor  # (R, C) float32 of positive labels
    buckets: Tensor  # (R, C) int64 of positions

    @property
    def labels(self) -> Tensor:
        return self.slates.labels[:, 0]  # (R, C, heads), NaN if unknown or padding

    def of(self, batch_rows: Tensor) -> ShownSlates | None:
        """Return the slates of some rows of the batch (n,), numbered as in that selection; None without any."""
        place = torch.full((int(max(self.rows.max(), batch_rows.max())) + 1,), -1)
        place[batch_rows] = torch.arange(len(batch_rows))
        kept = (place[self.rows] >= 0).nonzero()[:, 0]
        if not len(kept):
            return None
        s = self.slates
        part = Slates(*(x[kept] for x in (s.read, s.candidates, s.numeric, s.context, s.exists, s.labels, s.log_rate)))
        return ShownSlates(place[self.rows[kept]], part, self.weights[kept], self.buckets[kept])


class ShownLosses(nn.Module):
    """The training slates of the data, and their losses. The position bias is its only weight."""

    def __init__(self, data: Data, config: TrainConfig) -> None:
        super().__init__()
        exposures = data.exposures
        assert exposures is not None
        self.config = config
        self.exposures = exposures
        self.heads = data.config.heads
        self.numeric = data.catalogue.numeric
        self.slates = training_slates(exposures, data.split.train_lengths)
        self.span = 1 + int(exposures.history.max(initial=0)) + int(data.split.train_lengths.max(initial=0))
        self.keys = exposures.slate_users[self.slates] * self.span + exposures.history[self.slates]
        self.times = request_times(exposures.times)
        self.position_bias = nn.Parameter(torch.zeros(BUCKETS, len(self.heads)))
        self.position_bias.requires_grad_(config.position_bias)

    def trained_items(self) -> np.ndarray:
        """Return the item rows of the training slates, ascending."""
        used = np.zeros(len(self.exposures), bool)
        used[self.slates] = True
        return np.unique(self.exposures.items[np.repeat(used, np.diff(self.exposures.offsets))])

    def draw(self, batch: Batch) -> ShownSlates | None:
        """Return up to `cascade_positions` slates of each window that were shown before its last event, or None.

        A slate reads the events of the window that are older. In a window that does not begin with the user's first
        event, it needs at least one of them.
        """
        most = self.config.cascade_positions
        user = batch.users.numpy() * self.span
        firsts = batch.firsts.numpy()
        low = np.searchsorted(self.keys, user + firsts + (firsts > 0))
        count = np.searchsorted(self.keys, user + firsts + batch.lengths.numpy()) - low
        if not count.any():
            return None
        start = (torch.rand(len(count)).numpy() * count).astype(np.int64)
        step = np.arange(most) * np.maximum(count, most)[:, None] // most  # without repetition
        spread = (start[:, None] + step) % np.maximum(count, 1)[:, None]
        rows, place = np.nonzero(np.arange(most) < count[:, None])
        slates = self.slates[low[rows] + spread[rows, place]]
        return self.padded(slates, rows, self.exposures.history[slates] - firsts[rows])

    def padded(self, slates: np.ndarray, rows: np.ndarray, read: np.ndarray) -> ShownSlates:
        """Return slates (R,) of rows (R,) of a batch, with `read` (R,) events before each."""
        e = self.exposures
        sizes = np.diff(e.offsets)[slates]
        place = e.offsets[slates][:, None] + np.arange(sizes.max())
        exists = np.arange(sizes.max()) < sizes[:, None]  # (R, C)
        place[~exists] = 0
        items = np.where(exists, e.items[place], UNKNOWN_ITEM)
        labels = np.where(exists[..., None], e.labels[place], np.float32(np.nan))
        positions = torch.from_numpy(np.where(exists, e.positions[place], 0))
        numeric = torch.from_numpy(self.numeric[items])[:, None]
        numeric = numeric.masked_fill(torch.rand(len(slates), 1, 1, 1) < MISSING_NUMERIC, torch.nan)
        times = self.times[slates]
        drawn = Slates(
            torch.from_numpy(read)[:, None],
            torch.from_numpy(items)[:, None],
            numeric,
            torch.from_numpy(request_context(times).T.copy())[:, None],
            torch.from_numpy(exists)[:, None],
            torch.from_numpy(labels)[:, None],
            torch.zeros(len(slates), 1, 0),
        )
        weights = positions.clamp(min=1).float().pow(self.config.propensity_power).clamp(max=MOST_WEIGHT)
        return ShownSlates(torch.from_numpy(rows), drawn, weights, position_buckets(positions))

    def dot_loss(self, model: RankerModel, shown: ShownSlates, users: Tensor, table: Tensor) -> Tensor:
        """Return the loss of the exit `dot`. users: (B, T + 1, d) user vectors of the batch; table: (items, d)."""
        u = users[shown.rows, shown.slates.read[:, 0]]  # (R, d)
        product = (F.embedding(shown.slates.candidates[:, 0], table) * u[:, None]).sum(-1)  # (R, C)
        loss = product.new_zeros(())
        learned = product.detach() if any(head.kind == "next" for head in self.heads) else product
        for k, head in enumerate(self.heads):
            bias = self.position_bias[shown.buckets, k]
            labels = shown.labels[..., k]
            if head.kind == "next":
                scores = product * model.dot_scale[k] + bias
                loss = loss + list_loss("softmax", scores, labels, shown.weights)
            else:
                logits = learned * model.dot_scale[k] + model.dot_bias[k] + bias
                loss = loss + weighted_label_loss(logits, labels, shown.weights)
        return loss

    def cascade_loss(
        self,
        model: RankerModel,
        shown: ShownSlates,
        history: EncodedHistory,
        users: Tensor,
        vectors: Tensor,
        meta: Tensor,
    ) -> Tensor:
        """Return the loss of the exits `point` and `set`.

        history and users (B, T + 1, d): the encoded batch; vectors: (R, 1, C, d) of the candidates; meta: (R, 1, M) of
        the users, which every other slate reads.
        """
        rows = shown.rows
        meta = torch.where(torch.rand(len(rows), 1, 1) < 0.5, meta, model.default_meta)
        mine = [(key[rows], value[rows]) for key, value in history]
        dot, hidden = read_slates(model, shown.slates, mine, users[rows], vectors, meta)
        exits = [dot.detach() + model.point_logits(hidden)]  # the exit `dot` has a loss of its own
        if "set" in model.exits:
            exits.append(exits[0] + model.set_logits(hidden, shown.slates.exists[:, None]))
        loss = dot.new_zeros(())
        for logits in exits:
            for k, head in enumerate(self.heads):
                scores = logits[..., k] + self.position_bias[shown.buckets, k]
                labels = shown.labels[..., k]
                if head.kind == "next":
                    name = self.config.slate_loss if self.config.slate_loss in LIST_LOSSES else "softmax"
                    loss = loss + list_loss(name, scores, labels, shown.weights)
                    continue
                loss = loss + weighted_label_loss(scores, labels, shown.weights)
                if self.config.slate_loss in LIST_LOSSES:
                    loss = loss + list_loss(self.config.slate_loss, scores, labels, shown.weights)
        return loss
