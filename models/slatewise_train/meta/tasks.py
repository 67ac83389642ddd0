"""Build the tasks of meta-learning from users' events, and compute the loss of a meta-embedding on them.

A task contains everything that the frozen ranker computes for an event without a meta-embedding.

Called by: `limaml.py`, `personal_weights.py`, `personalization.py`. Calls: `batches.py`, `losses.py`.

Letters in shapes: U users, P events of a user, C candidates of an event, d width, M numbers of a meta-embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ITEM
from slatewise_train.batches import Batch, make_batch, newest_window_start
from slatewise_train.config import MetaConfig
from slatewise_train.data import Sequences
from slatewise_train.losses import label_losses, log_likelihood, sampling_offset
from slatewise_train.rankers.base import EncodedHistory, RankerModel
from slatewise_train.slates import Slates, draw_negatives, read_slates

POOL = 4096  # one call draws its negatives from at most this many items
MetaCase = tuple[int, int]  # a user, and the number of the user's events before the prediction


@dataclass(frozen=True)
class Tasks:
    """P events of each of U users, scored by the ranker without a meta-embedding.

    Each event has C candidates: column 0 is the event's own item, all other columns are negatives.
    """

    base: Tensor  # (U, P, C, d) hidden states for a meta-embedding of zero
    dot: Tensor  # (U, P, C, heads) logits of the exit `dot`
    offset: Tensor  # (U, P, C) of `losses.sampling_offset`
    labels: Tensor  # (U, P, heads) NaN if unknown
    real: Tensor  # (U, P) float32, 1 for events that exist

    def columns(self, first: int, last: int) -> Tasks:
        return Tasks(*(getattr(self, f.name)[:, first:last] for f in dataclasses.fields(self)))

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))


def point_with(ranker: RankerModel, vectors: Tensor, base: Tensor, dot: Tensor) -> Tensor:
    """Return logits (..., P, C, heads) of the exit `point` with meta-embeddings (..., M).

    base, dot: as in `Tasks`.
    """
    return ranker.point(dot, base + ranker.meta_shift(vectors)[..., None, None, :])


def event_losses(
    ranker: RankerModel, kinds: list[str], vector: Tensor, base: Tensor, dot: Tensor, offset: Tensor, labels: Tensor
) -> Tensor:
    """Return losses (..., P) of the exit `point`, summed over the heads.

    kinds: of the heads; vector: meta-embeddings (..., M); the other tensors are those of `Tasks`.
    """
    logits = point_with(ranker, vector, base, dot)
    losses = torch.zeros_like(base[..., 0, 0])
    for head, kind in enumerate(kinds):
        if kind == "next":
            losses = losses - log_likelihood(logits[..., head], offset)
        else:
            losses = losses + label_losses(logits[..., 0, head], labels[..., head])
    return losses


@dataclass(frozen=True)
class RankerTables:
    """A ranker, and the tables from which tasks are built."""

    ranker: RankerModel
    items: Tensor  # (items, d), `RankerModel.item_table`
    numeric: Tensor  # (items, F) that a request would have, NaN for missing


@dataclass(frozen=True)
class ReadEvents:
    """P events of each of U users, and the encoded windows in which they lie."""

    batch: Batch  # the windows
    history: EncodedHistory
    users: Tensor  # (U, T + 1, d) user vectors
    column: Tensor  # (U, P) events of the window before each event
    target: Tensor  # (U, P) the event's item row
    real: Tensor  # (U, P) whether the event exists, and its item is known

    def at_events(self, values: Tensor, shift: int = 0) -> Tensor:
        """Return values (U, T + 1, ...) right before the events, or `shift` positions later: (U, P, ...)."""
        return values[torch.arange(len(values))[:, None], self.column + shift]


@torch.no_grad()
def read_events(
    tables: RankerTables, sequences: Sequences, cases: Sequence[MetaCase], longest: int, support: int, query: int
) -> ReadEvents:
    """Read the `support` events before each case and the `query` events after it, oldest first.

    The ranker reads the history of an event in a window of at most `longest` events.
    """
    windows = [(user, newest_window_start(now + query, longest), now + query) for user, now in cases]
    batch = make_batch(sequences, windows)
    tokens = tables.ranker.tokens(F.embedding(batch.items, tables.items), batch.actions, batch.gaps)
    history, users = tables.ranker.encode(tokens)
    now = torch.tensor([now - first for (_, first, _), (_, now) in zip(windows, cases, strict=True)])
    read = now[:, None] + torch.arange(-support, query)
    column = read.clamp(min=0)
    target = batch.items[torch.arange(len(read))[:, None], column + 1]
    return ReadEvents(batch, history, users, column, target, (read >= 0) & (target != UNKNOWN_ITEM))


@torch.no_grad()
def make_tasks(
    tables: RankerTables, sequences: Sequences, cases: list[MetaCase], longest: int, config: MetaConfig
) -> Tasks:
    """Build one `Tasks` of the `config.support` events before each case and the `config.query` events after it.

    longest: as in `read_events`. The support has no numeric features, because the refresh job has no requests; only the
    query uses `tables.numeric`.
    """
    ranker = tables.ranker
    support = config.support
    events = read_events(tables, sequences, cases, longest, support, config.query)
    target = events.target
    u, p = target.shape
    pool = torch.arange(FIRST_ITEM, len(tables.items))
    if len(pool) > POOL:
        pool = torch.randint(FIRST_ITEM, len(tables.items), (POOL,))
    now = events.at_events(events.users)
    drawn, log_rate = draw_negatives(now, F.embedding(pool, tables.items), config.negatives)
    candidates = torch.cat([target[..., None], pool[drawn]], dim=2)  # (U, P, C)
    labels = events.at_events(events.batch.labels, 1)
    unused = torch.full((u, support, *candidates.shape[2:], tables.numeric.shape[1]), torch.nan)
    numeric = torch.cat([unused, tables.numeric[candidates[:, support:]]], dim=1)
    contexts = events.at_events(events.batch.contexts)
    real = events.real
    slates = Slates(events.column, candidates, numeric, contexts, real[..., None], labels[:, :, None], log_rate)
    no_meta = torch.zeros(u, p, ranker.meta_size)
    vectors = F.embedding(candidates, tables.items)
    dot, base = read_slates(ranker, slates, events.history, events.users, vectors, no_meta)
    offset = sampling_offset(log_rate, candidates[..., 1:] == target[..., None])
    return Tasks(base.view(u, p, *base.shape[1:]), dot.view(u, p, *dot.shape[1:]), offset, labels, real.float())
