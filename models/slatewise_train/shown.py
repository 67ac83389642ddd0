"""Train on the slates that users were shown: find them in a batch, and compute their losses.

A slate stands at the position of its window where the user had `Exposures.history` events. Its other items are true
negatives. A head of kind `next` learns which item was taken from the softmax of the slate, beside the sampled negatives
of `train.py`. A head of kind `label` learns from the slates alone: events of the history are mostly items that were
taken, so their labels are not those of the items that are ranked.

Two corrections for the place of an item in its slate, both off by default and both absent from the exported ranker:

- `position_bias`: a learned term per place is added to the logits while training, so that they need not explain it.
- `propensity_power`: labels of 1 have the weight rank ** power, at most 20, over its mean. If an item at rank r is seen
  with probability r ** -power, the weighted list-wise loss of the clicks is, up to a factor, the expected loss of the
  labels that every seen item would get (Joachims et al., WSDM 2017). The weighted cross-entropy is not unbiased.

Called by: `train.py`. Calls: `exposures.py`, `slates.py`, `losses.py`, `listwise.py`.

Letters in shapes: B windows, T the longest window, S slates of a window, N slates, C items of the longest, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from slatewise.bundle.features import request_context
from slatewise_train.batches import Batch
from slatewise_train.config import TrainConfig
from slatewise_train.data import Data, request_times
from slatewise_train.exposures import Exposures, training_slates
from slatewise_train.listwise import SLATE_LOSSES, has_order
from slatewise_train.losses import label_losses
from slatewise_train.rankers.base import EncodedHistory, RankerModel
from slatewise_train.slates import MISSING_NUMERIC, Slates, read_slates

BCE = "bce"
SINGLE_PLACES = 16  # places with a term of their own; later ones share a term, four for every doubling
PLACES = SINGLE_PLACES + 24  # terms: up to 1,024 places; 0 is the unknown place
MOST_WEIGHT = 20.0
MOST_ITEMS = 65_536  # of the slates of a batch, padding included, for each of the two losses


def place_buckets(positions: Tensor) -> Tensor:
    """Return the term of each position, 0 for an unknown position: int64 of any shape -> the same shape."""
    later = SINGLE_PLACES + 1 + (4 * torch.log2(positions.clamp(min=1) / SINGLE_PLACES)).floor().long()
    return torch.where(positions <= SINGLE_PLACES, positions, later.clamp(max=PLACES - 1))


def propensity_weights(positions: Tensor, power: float) -> Tensor:
    """Return the weights rank ** power of labels of 1, at most 20: int64 of any shape -> float32, 1 if unknown."""
    return positions.clamp(min=1).float().pow(power).clamp(max=MOST_WEIGHT)


def slate_loss(kind: str, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return a list-wise loss -> (): the mean over the slates with both labels, or with weights over their labels of 1.

    kind: a key of `SLATE_LOSSES`; scores, labels: (N, C), NaN if unknown or padding; weights: (N, C) of labels of 1.
    """
    known = ~labels.isnan()
    liked = labels.nan_to_num()
    ordered = has_order(liked, known)
    if weights is None:
        return SLATE_LOSSES[kind](scores, liked, known).sum() / ordered.sum().clamp(min=1)
    gain = liked * weights
    # A list-wise loss does not change with the scale of a slate's gains, so the sum of the weights multiplies it.
    losses = gain.sum(1) * SLATE_LOSSES[kind](scores, gain, known)
    return losses.where(ordered, 0.0).sum() / liked[ordered].sum().clamp(min=1)


@dataclass(frozen=True)
class Shown:
    """Slates of any shape (...), padded on the right."""

    items: Tensor  # (..., C) int64, item rows; the unknown item for padding
    exists: Tensor  # (..., C) bool, False for padding
    labels: Tensor  # (..., C, heads) float32, NaN if unknown or padding
    positions: Tensor  # (..., C) int64, 0 if unknown

    def pick(self, rows: Tensor) -> Shown:
        return Shown(self.items[rows], self.exists[rows], self.labels[rows], self.positions[rows])


class ShownSlates:
    """The slates of a data set that training may use, and their losses. See `shown_slates`."""

    def __init__(self, data: Data, exposures: Exposures, config: TrainConfig) -> None:
        self.config = config
        self.slates = training_slates(exposures, data.split.train_lengths)
        self.next_heads = [k for k, head in enumerate(data.config.heads) if head.kind == "next"]
        self.label_heads = [k for k, head in enumerate(data.config.heads) if head.kind == "label"]
        self.numeric = torch.from_numpy(data.catalogue.numeric)
        self.users, self.history, self.offsets = (
            torch.from_numpy(column) for column in (exposures.slate_users, exposures.history, exposures.offsets)
        )
        self.items, self.positions, self.labels = (
            torch.from_numpy(column) for column in (exposures.items, exposures.positions, exposures.labels)
        )
        self.contexts = torch.from_numpy(request_context(request_times(exposures.times)).T.copy())
        self.step = int(exposures.history.max(initial=0)) + 2
        self.keys = torch.from_numpy(exposures.slate_users * self.step + exposures.history)[self.slates]  # ascending
        self.rows = np.repeat(np.isin(np.arange(len(exposures)), self.slates), np.diff(exposures.offsets))
        self.mean_weights = self.mean_weight_of_heads()
        self.place: torch.nn.Embedding | None = None
        if config.position_bias:
            self.place = torch.nn.Embedding(PLACES, len(data.config.heads), padding_idx=0)
            torch.nn.init.zeros_(self.place.weight)

    def mean_weight_of_heads(self) -> Tensor:
        """Return the mean propensity weight of the labels of 1 in the training slates: (heads,)."""
        rows = torch.from_numpy(self.rows)
        liked = self.labels[rows] == 1
        weights = propensity_weights(self.positions[rows], self.config.propensity_power)[:, None]
        return ((weights * liked).sum(0) / liked.sum(0).clamp(min=1)).where(liked.any(0), torch.ones(()))

    def trained_items(self) -> np.ndarray:
        """Return the item rows of the training slates (n,), ascending."""
        return np.unique(self.items.numpy()[self.rows])

    def found_in(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return first and one past the last of the slates of each window, as places in `slates`: (B,), (B,)."""
        begin = batch.users * self.step + batch.firsts
        return torch.searchsorted(self.keys, begin), torch.searchsorted(self.keys, begin + batch.lengths, right=True)

    def take(self, slates: Tensor) -> Shown:
        """Look up slates by number: (...) -> padded to the longest of them."""
        lengths = self.offsets[slates + 1] - self.offsets[slates]
        column = torch.arange(int(lengths.max()))
        exists = column < lengths[..., None]
        rows = (self.offsets[slates][..., None] + column).masked_fill(~exists, 0)
        return Shown(
            self.items[rows].masked_fill(~exists, 0),
            exists,
            self.labels[rows].masked_fill(~exists[..., None], torch.nan),
            self.positions[rows].masked_fill(~exists, 0),
        )

    def all_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return window and number (N,) of the slates in a batch, or of a random part if they are too many."""
        first, last = self.found_in(batch)
        count = last - first
        windows = torch.arange(len(count)).repeat_interleave(count)
        places = torch.arange(len(windows)) - (count.cumsum(0) - count)[windows] + first[windows]
        slates = torch.from_numpy(self.slates)[places]
        if not len(slates):
            return windows, slates
        longest = int((self.offsets[slates + 1] - self.offsets[slates]).max())
        if len(slates) * longest > MOST_ITEMS:
            some = torch.randperm(len(slates))[: max(1, MOST_ITEMS // longest)]
            windows, slates = windows[some], slates[some]
        return windows, slates

    def draw(self, batch: Batch, count: int) -> Tensor:
        """Draw slates of each window, spread over the window: (B, count), -1 where a window has fewer."""
        first, last = self.found_in(batch)
        n = (last - first)[:, None]
        k = torch.arange(count)
        spread = ((k + torch.rand(len(n), count)) * n / count).long().minimum(n - 1)
        places = first[:, None] + torch.where(n > count, spread, k)
        slates = torch.from_numpy(self.slates)[places.clamp(max=len(self.slates) - 1)]
        return slates.masked_fill(k >= n, -1)

    def loss(self, logits: Tensor, shown: Shown, heads: list[int], listwise: str) -> Tensor:
        """Return the losses of some heads, summed -> (): logits (N, C, heads).

        listwise: the list-wise loss of every head, or "bce" for that of heads of kind `next` alone, the softmax. Heads
        of kind `label` have the cross-entropy too, which keeps their logits those of probabilities.
        """
        if self.place is not None:
            logits = logits + self.place(place_buckets(shown.positions))
        total = logits.new_zeros(())
        for h in heads:
            labels = shown.labels[..., h]
            weights = None
            if self.config.propensity_power:
                weights = propensity_weights(shown.positions, self.config.propensity_power) / self.mean_weights[h]
                weights = weights.where(shown.positions > 0, 1.0)
            if h in self.label_heads:
                losses = label_losses(logits[..., h], labels)
                losses = losses if weights is None else losses * weights.where(labels == 1, 1.0)
                total = total + losses.sum() / (~labels.isnan()).sum().clamp(min=1)
            kind = "softmax" if listwise == BCE else listwise
            if listwise != BCE or h in self.next_heads:
                total = total + slate_loss(kind, logits[..., h], labels, weights)
        return total

    def dot_loss(self, model: RankerModel, batch: Batch, users: Tensor, table: Tensor) -> Tensor:
        """Return the loss of the exit `dot` on the slates of a batch. users: (B, T + 1, d); table: (items, d)."""
        windows, slates = self.all_of(batch)
        if not len(slates):
            return table.new_zeros(())
        read = self.history[slates] - batch.firsts[windows]
        shown = self.with_next_event(self.take(slates), batch, windows, read)
        vectors = F.embedding(shown.items, table)
        now = users[windows, read][:, None]  # (N, 1, d)
        total = table.new_zeros(())
        if self.next_heads:
            total = total + self.loss(model.dot_logits(now, vectors), shown, self.next_heads, BCE)
            now, vectors = now.detach(), vectors.detach()  # heads of kind `label` then train scale and bias alone
        if self.label_heads:
            total = total + self.loss(model.dot_logits(now, vectors), shown, self.label_heads, BCE)
        return total

    def with_next_event(self, shown: Shown, batch: Batch, windows: Tensor, read: Tensor) -> Shown:
        """Add the user's next event as a last column to slates (N, C) of which no item was taken.

        Heads of kind `next` then learn that the user passed the shown items over.
        """
        if not self.next_heads:
            return shown
        taken = (shown.labels[..., self.next_heads[0]] == 1).any(1)
        item = batch.items[windows, (read + 1).clamp(max=batch.items.shape[1] - 1)]
        exists = ~taken & (read < batch.lengths[windows]) & (shown.items != item[:, None]).all(1)
        labels = torch.full_like(shown.labels[:, :1], torch.nan)
        labels[..., self.next_heads] = torch.where(exists, 1.0, torch.nan)[:, None, None]
        return Shown(
            torch.cat([shown.items, item.masked_fill(~exists, 0)[:, None]], 1),
            torch.cat([shown.exists, exists[:, None]], 1),
            torch.cat([shown.labels, labels], 1),
            F.pad(shown.positions, (0, 1)),
        )

    def cascade_loss(
        self,
        model: RankerModel,
        batch: Batch,
        history: EncodedHistory,
        users: Tensor,
        look_up: Callable[[Tensor], Tensor],
        draw_meta: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """Return the loss of the exits `point` and `set` on slates of a batch.

        history and users (B, T + 1, d): the encoded sequences; look_up: item rows (...) -> vectors (..., d); draw_meta:
        users (B,) and S -> meta-embeddings (B, S, M).
        """
        drawn = self.draw(batch, self.config.cascade_positions)
        rows = (drawn >= 0).any(1).nonzero()[:, 0]
        if not len(rows):
            return users.new_zeros(())
        sizes = self.offsets[drawn[rows] + 1] - self.offsets[drawn[rows]]
        rows = rows[: max(1, MOST_ITEMS // (drawn.shape[1] * int(sizes.max())))]
        drawn, batch, users = drawn[rows], batch.take(rows), users[rows]
        history = [(key[rows], value[rows]) for key, value in history]
        real = (drawn >= 0).flatten().nonzero()[:, 0]
        places = drawn.clamp(min=0)
        shown = self.take(places)
        read = (self.history[places] - batch.firsts[:, None]).masked_fill(drawn < 0, 0)
        hide = torch.rand(*drawn.shape, 1, 1) < MISSING_NUMERIC
        features = self.numeric[shown.items].masked_fill(hide, torch.nan)
        no_rate = torch.zeros(*drawn.shape, 0)
        slates = Slates(read, shown.items, features, self.contexts[places], shown.exists, shown.labels, no_rate)
        meta = draw_meta(batch.users, drawn.shape[1])
        dot, hidden = read_slates(model, slates, history, users, look_up(shown.items), meta)
        flat = Shown(*(column.flatten(0, 1) for column in (shown.items, shown.exists, shown.labels, shown.positions)))
        flat, hidden = flat.pick(real), hidden[real]
        point = dot.detach()[real] + model.point_logits(hidden)
        exits = [point]
        if "set" in model.exits:
            exits.append(point + model.set_logits(hidden, flat.exists[:, None, None]))
        heads = [*self.next_heads, *self.label_heads]
        return torch.stack([self.loss(logits, flat, heads, self.config.slate_loss) for logits in exits]).sum()


def shown_slates(data: Data, config: TrainConfig) -> ShownSlates | None:
    """Return the slates that training uses, or None if the data have no slates.

    Raises ValueError for a correction of positions that the data or the other correction do not allow.
    """
    keys = [key for key in ("position_bias", "propensity_power") if getattr(config, key)]
    if len(keys) > 1:
        raise ValueError("[train] position_bias and propensity_power correct the same bias; use one of them")
    exposures = data.exposures
    if keys and (exposures is None or not exposures.positions.any()):
        raise ValueError(f"[train] {keys[0]} needs slates with positions; the events have no column position of them")
    return None if exposures is None else ShownSlates(data, exposures, config)
