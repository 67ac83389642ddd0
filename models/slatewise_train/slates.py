"""Draw slates of candidates at positions of a batch, and score them.

Called by: `train.py`, `shown.py`, `meta/`, `compression/`, `demo/simulated/`. Calls: `batches.py`, and the ranker that
scores a slate.

Letters in shapes: B windows, T the longest window, S positions of a window, C candidates, K negatives, d width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slatewise.inference.arrays import UNKNOWN_ITEM
from slatewise_train.batches import Batch
from slatewise_train.config import TrainConfig
from slatewise_train.rankers.base import EncodedHistory, RankerModel

MISSING_NUMERIC = 0.3  # share of training slates without numeric features


@torch.no_grad()
def draw_negatives(users: Tensor, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw negatives with replacement: half of them uniformly, half in proportion to the softmax of the exit `dot`.

    users: (B, S, d) user vectors; vectors: (n, d) of the items to draw from. Returns rows of vectors (B, S, count) and
    the log of the expected number of draws of each (B, S, count), for `losses.sampling_offset`.
    """
    share = torch.softmax(users @ vectors.T, dim=-1)
    share = 0.5 * share + 0.5 / share.shape[-1]
    drawn = torch.multinomial(share.flatten(0, 1), count, replacement=True).view(*share.shape[:2], count)
    return drawn, torch.log(count * share.gather(2, drawn))


@dataclass(frozen=True)
class Slates:
    """Candidates at S positions of each of B sequences: the items of the next events (the slate), then K negatives."""

    read: Tensor  # (B, S) int64, number of events that have happened
    candidates: Tensor  # (B, S, C) int64, item rows; C = slate + K
    numeric: Tensor  # (B, S, C, F) float32, NaN is missing
    context: Tensor  # (B, S, 4) float32
    exists: Tensor  # (B, S, slate) bool, False for events after the end of the sequence
    labels: Tensor  # (B, S, slate, heads) float32, NaN if unknown
    log_rate: Tensor  # (B, S, K) float32, of `draw_negatives`


def draw_positions(lengths: Tensor, count: int, draw: str) -> Tensor:
    """Draw numbers of events that have happened, from 0 to the length less 1: lengths (B,) -> (B, count) int64.

    draw: "uniform", or "log": then every doubling of the events, counted from 1, is about equally likely, so that
    short histories are learned from as well as long ones. "mixed" takes every second position from each of the two.
    """
    share = torch.rand(len(lengths), count, device=lengths.device)
    uniform = (share * lengths[:, None]).long()
    if draw == "uniform":
        return uniform
    log = torch.minimum(((lengths[:, None] + 1.0) ** share).long(), lengths[:, None]) - 1
    if draw == "log":
        return log
    return torch.where(torch.arange(count, device=lengths.device) % 2 == 0, log, uniform)


def draw_slates(
    batch: Batch,
    users: Tensor,
    table: Tensor,
    numeric: Tensor,
    slate_size: int,
    config: TrainConfig,
    trained: Tensor,
) -> Slates:
    """Choose random positions of the windows, and build a slate at each.

    A slate has the items of the next `slate_size` events and drawn negatives. No position is before `batch.since`.

    users: (B, T + 1, d) user vectors; table: (items, d); numeric: (items, F); trained: (n,) item rows that may be
    negatives.
    """
    b = len(batch.users)
    s = config.cascade_positions
    device = users.device
    rows = torch.arange(b, device=device)[:, None]
    read = batch.since[:, None] + draw_positions(batch.lengths - batch.since, s, config.cascade_draw)
    drawn, log_rate = draw_negatives(users[rows, read], table[trained], config.cascade_negatives)
    ahead = read[..., None] + 1 + torch.arange(slate_size, device=device)  # (B, S, slate) columns of the next events
    exists = ahead <= batch.lengths[:, None, None]
    ahead = ahead.clamp(max=batch.items.shape[1] - 1)
    upcoming = batch.items[rows[..., None], ahead].masked_fill(~exists, UNKNOWN_ITEM)
    labels = batch.labels[rows[..., None], ahead].masked_fill(~exists[..., None], torch.nan)
    candidates = torch.cat([upcoming, trained[drawn]], dim=2)
    features = numeric[candidates].masked_fill(torch.rand(b, s, 1, 1, device=device) < MISSING_NUMERIC, torch.nan)
    return Slates(read, candidates, features, batch.contexts[rows, read], exists, labels, log_rate)


def read_slates(
    model: RankerModel, slates: Slates, history: EncodedHistory, users: Tensor, vectors: Tensor, meta: Tensor
) -> tuple[Tensor, Tensor]:
    """Return logits of the exit `dot` (B * S, C, heads) and hidden states (B * S, C, d) of the candidates.

    history and users (B, T + 1, d): the encoded sequences; vectors: (B, S, C, d) of the candidates; meta: (B, S, M).
    A candidate attends to the `slates.read` first events of its sequence.
    """
    b, s, c = slates.candidates.shape
    fused = model.fuse(slates.numeric, meta[:, :, None], slates.context[:, :, None])
    positions = (slates.read + 1).repeat_interleave(c, dim=1)  # (B, S * C)
    steps = torch.arange(users.shape[1], device=users.device)
    mask = steps <= slates.read.repeat_interleave(c, dim=1)[..., None]  # (B, S * C, T + 1)
    hidden = model.hidden(vectors.flatten(1, 2), history, positions, mask[:, None], fused.flatten(1, 2))
    now = users[torch.arange(b, device=users.device)[:, None], slates.read].view(b * s, 1, -1)
    return model.dot_logits(now, vectors.view(b * s, c, -1)), hidden.view(b * s, c, -1)
