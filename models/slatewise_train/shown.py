"""Train on slates that users were shown: draw them for a batch, and compute their losses.

An item that was shown and not chosen is a negative of heads of kind `next`, and has the label 0 of these heads. If no
item of a slate was chosen, the exit `dot` learns that the user preferred the next event to the slate.

Three things can be added to the losses of these slates; none of them is part of the ranker that is exported:

- `slate_loss` in [train]: a list-wise loss of the exits `point` and `set`, beside the binary cross-entropy, which
  keeps the probabilities calibrated.
- `position_bias`: a learned logit for each position, the chance that users look there (Guo et al., PAL, RecSys 2019).
- `propensity_power`: a positive label at position r has the weight r ** power, the inverse of the chance that users
  look there, over the mean weight. A list-wise loss of choices is then, up to a factor, that of users who look at all
  positions alike (Joachims et al., WSDM 2017). The weighted binary cross-entropy is not unbiased: an item of relevance
  p at position r gets the odds p / (1 - p / r ** power), up to a factor, and not p / (1 - p). The order changes little.
  The unbiased one (Saito et al., WSDM 2020) has labels above 1, so it has no minimum on the clicks of few slates.

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
from slatewise_train.losses import label_losses
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
MOST_WEIGHT = 20.0  # of a positive label: a click at a rare place must not outweigh all others


def position_buckets(positions: Tensor) -> Tensor:
    """Return buckets of positions from 1 on, of the same shape; 0 is unknown. 300 is in bucket 32."""
    far = OWN_POSITIONS + (4 * torch.log2(positions.clamp(min=1) / OWN_POSITIONS)).floor().long()
    return torch.where(positions <= OWN_POSITIONS, positions, far).clamp(max=BUCKETS - 1)


def list_loss(name: str, scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the list-wise loss of slates for each positive label: scores, labels, weights (R, C) -> ().

    labels: NaN if unknown or padding; weights: of positive labels. Slates with one kind of label do not count.
    """
    mask = ~labels.isnan()
    chosen = labels.nan_to_num()
    gain = chosen * weights
    ordered = listwise.has_order(chosen, mask)
    # A list-wise loss does not change with the scale of a slate's gains, so the sum of the weights multiplies it.
    losses = gain.sum(dim=1) * LIST_LOSSES[name](scores, gain, mask)
    return losses.where(ordered, 0.0).sum() / chosen[ordered].sum().clamp(min=1)


def weighted_label_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the mean binary cross-entropy, that of positive labels times their weight: all (R, C) -> ().

    Unknown labels are NaN.
    """
    losses = label_losses(logits, labels) * weights.where(labels == 1, 1.0)
    return losses.sum() / (~labels.isnan()).sum().clamp(min=1)


@dataclass(frozen=True)
class ShownSlates:
    """R slates of a batch, padded to C items."""

    rows: Tensor  # (R,) int64, the row of the batch
    slates: Slates  # candidates (R, 1, C) without drawn negatives
    weights: Tensor  # (R, C, heads) float32 of positive labels
    buckets: Tensor  # (R, C) int64 of positions

    @property
    def labels(self) -> Tensor:
        return self.slates.labels[:, 0]  # (R, C, heads), NaN if unknown or padding

    def of(self, batch_rows: Tensor) -> ShownSlates | None:
        """Return the slates of some rows of the batch (n,), numbered as in that selection; None without any."""
        place = torch.full((int(max(self.rows.max(), batch_rows.max())) + 1,), -1, device=batch_rows.device)
        place[batch_rows] = torch.arange(len(batch_rows), device=batch_rows.device)
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
        self.mean_weights = self.mean_weight_of_heads()
        self.position_bias = nn.Parameter(torch.zeros(BUCKETS, len(self.heads)))
        self.position_bias.requires_grad_(config.position_bias)

    def trained_items(self) -> np.ndarray:
        """Return the item rows of the training slates, ascending."""
        used = np.zeros(len(self.exposures), bool)
        used[self.slates] = True
        return np.unique(self.exposures.items[np.repeat(used, np.diff(self.exposures.offsets))])

    def propensity_weights(self, positions: Tensor) -> Tensor:
        """Return the weights of positive labels, not yet over their mean: int64 -> float32 of the same shape."""
        return positions.clamp(min=1).float().pow(self.config.propensity_power).clamp(max=MOST_WEIGHT)

    def mean_weight_of_heads(self) -> Tensor:
        """Return the mean weight of the positive labels of the training slates with a known position: (heads,)."""
        used = np.zeros(len(self.exposures), bool)
        used[self.slates] = True
        rows = np.repeat(used, np.diff(self.exposures.offsets)) & (self.exposures.positions > 0)
        weights = self.propensity_weights(torch.from_numpy(self.exposures.positions[rows]))
        positive = torch.from_numpy(self.exposures.labels[rows] == 1)
        mean = (weights[:, None] * positive).sum(0) / positive.sum(0).clamp(min=1)
        return mean.where(positive.any(0), 1.0)

    def draw(self, batch: Batch) -> ShownSlates | None:
        """Return up to `cascade_positions` slates of each window that were shown before its last event, or None.

        A slate reads the events of the window that are older. In a window that does not begin with the user's first
        event, it needs at least one of them.
        """
        most = self.config.cascade_positions
        user = batch.users.numpy() * self.span
        firsts = batch.firsts.numpy()
        low = np.searchsorted(self.keys, user + firsts + np.maximum(firsts > 0, batch.since.numpy()))
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
        weights = self.propensity_weights(positions)[..., None] / self.mean_weights
        weights = weights.where(positions[..., None] > 0, 1.0)
        return ShownSlates(torch.from_numpy(rows), drawn, weights, position_buckets(positions))

    def dot_loss(self, model: RankerModel, batch: Batch, shown: ShownSlates, users: Tensor, table: Tensor) -> Tensor:
        """Return the loss of the exit `dot`. users: (B, T, d) user vectors of the batch; table: (items, d)."""
        read = shown.slates.read[:, 0]
        items = shown.slates.candidates[:, 0]
        u = users[shown.rows, read]  # (R, d)
        product = (F.embedding(items, table) * u[:, None]).sum(-1)  # (R, C)
        following = batch.items[shown.rows, read + 1]  # (R,) the next event, which the window has
        further = (F.embedding(following, table) * u).sum(-1)[:, None]  # (R, 1)
        is_shown = (items == following[:, None]).any(1)
        loss = product.new_zeros(())
        learned = product.detach() if any(head.kind == "next" for head in self.heads) else product
        for k, head in enumerate(self.heads):
            bias = self.position_bias[shown.buckets, k]
            labels = shown.labels[..., k]
            if head.kind == "next":
                passed = ~(labels == 1).any(1) & ~is_shown
                scores = torch.cat([product * model.dot_scale[k] + bias, further * model.dot_scale[k]], dim=1)
                labels = torch.cat([labels, torch.where(passed, 1.0, torch.nan)[:, None]], dim=1)
                weights = F.pad(shown.weights[..., k], (0, 1), value=1.0)
                loss = loss + list_loss("softmax", scores, labels, weights)
            else:
                logits = learned * model.dot_scale[k] + model.dot_bias[k] + bias
                loss = loss + weighted_label_loss(logits, labels, shown.weights[..., k])
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
        meta = torch.where(torch.rand(len(rows), 1, 1, device=meta.device) < 0.5, meta, model.default_meta)
        mine = [(key[rows], value[rows]) for key, value in history]
        dot, hidden = read_slates(model, shown.slates, mine, users[rows], vectors, meta)
        exits = [model.point(dot.detach(), hidden)]  # the exit `dot` has a loss of its own
        if "set" in model.exits:
            exits.append(exits[0] + model.set_logits(hidden, shown.slates.exists[:, None]))
        loss = dot.new_zeros(())
        for logits in exits:
            for k, head in enumerate(self.heads):
                scores = logits[..., k] + self.position_bias[shown.buckets, k]
                labels = shown.labels[..., k]
                if head.kind == "next":
                    name = self.config.slate_loss if self.config.slate_loss in LIST_LOSSES else "softmax"
                    loss = loss + list_loss(name, scores, labels, shown.weights[..., k])
                    continue
                loss = loss + weighted_label_loss(scores, labels, shown.weights[..., k])
                if self.config.slate_loss in LIST_LOSSES:
                    loss = loss + list_loss(self.config.slate_loss, scores, labels, shown.weights[..., k])
        return loss


def shown_losses(data: Data, config: TrainConfig) -> ShownLosses | None:
    """Return the losses of the slates that users were shown, or None if the data have no slates.

    Raises ValueError for a correction of positions that the data or the other correction do not allow.
    """
    keys = [key for key in ("position_bias", "propensity_power") if getattr(config, key)]
    if len(keys) > 1:
        raise ValueError("[train] position_bias and propensity_power correct the same bias; use one of them")
    if keys and (data.exposures is None or not data.exposures.positions.any()):
        raise ValueError(f"[train] {keys[0]} needs slates with positions; the events have no column position of them")
    return None if data.exposures is None else ShownLosses(data, config)
