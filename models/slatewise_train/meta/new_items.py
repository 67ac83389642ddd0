"""Adapt the vectors of new items, which a ranker was not trained on, to their first events: the item half of LiMAML.

The ranker is frozen. The vector of a new item moves from its prior mean e0 to the maximum of the posterior (Gaussian
prior, likelihoods of the training):

    minimise  1/2 (e - e0)' P (e - e0)                                     prior
            + sum over its events, heads `label`:  -log p(label | e)       exit `point`
            + sum over its events, heads `next`:   log(1 + exp(L - z))     z = scale (user . e), exit `dot`
            + n * mean over other events:          log(1 + exp(z - L))     L = logsumexp of the known items

The prior is what training added to the fields of the known items: e0 is the vector from fields alone plus the mean
addition, P the inverse of the covariance of the additions. n is the number of events in which the item could have been
taken and was not (`events_of_others`). Without that term, every item with an event would be a favourite.

Called by: `refresh_items.py`. Calls: `batches.py`, the ranker, `slatewise.bundle.features`.

Letters in shapes: n new items, E events of them, d width, T history positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ITEM
from slatewise_train.batches import make_batch, served_window_start
from slatewise_train.data import Sequences
from slatewise_train.rankers.base import EncodedHistory, RankerModel

MOST_EVENTS = 50  # of an item, the newest: more move its vector little, and the next training learns them
CHUNK_EVENTS = 512  # of the items that are adapted together
OTHERS = 1_024  # events that stand for all those in which an item was not taken
MOST_KNOWN = 20_000  # known items in `logsumexp`; of a larger catalogue a sample
STEPS = 100
RATE = 0.05
UNTRAINED = 1e-5  # difference from the vector of the fields alone, up to rounding, of an item without training events
LEAST_RIDGE = 1e-3  # of the mean variance, added to each: few known items, or many dimensions without variance


@dataclass(frozen=True)
class Positions:
    """Events of the sequences: (n,) users and the numbers of the users' events before each."""

    users: np.ndarray
    lengths: np.ndarray

    def take(self, rows: np.ndarray) -> Positions:
        return Positions(self.users[rows], self.lengths[rows])


@dataclass(frozen=True)
class Contexts:
    """What the ranker knows right before each of n events."""

    users: Tensor  # (n, d) user vectors
    history: EncodedHistory
    mask: Tensor  # (n, 1, 1, T) bool, the positions that were there
    positions: Tensor  # (n, 1) the candidate's place
    time: Tensor  # (n, 1, 4)


@torch.no_grad()
def encode(model: RankerModel, sequences: Sequences, at: Positions, longest: int) -> Contexts:
    """Encode the histories before some events, as a server would read them. Items above the table are unknown."""
    firsts = [served_window_start(length, longest) for length in at.lengths.tolist()]
    batch = make_batch(sequences, np.stack([at.users, firsts, at.lengths], axis=1))
    table = model.item_table()
    items = batch.items.masked_fill(batch.items >= len(table), UNKNOWN_ITEM)
    history, users = model.encode(model.tokens(table[items], batch.actions, batch.gaps))
    rows = torch.arange(len(items))
    mask = torch.arange(items.shape[1]) <= batch.lengths[:, None]
    time = batch.contexts[rows, batch.lengths][:, None]
    return Contexts(users[rows, batch.lengths], history, mask[:, None, None], batch.lengths[:, None] + 1, time)


def point_logits(model: RankerModel, contexts: Contexts, vectors: Tensor) -> Tensor:
    """Return the logits (n, N, heads) of the exit `point` of N candidates (n, N, d) of each context.

    They have no numeric features and no meta-embedding: the first events of an item come from any users.
    """
    numeric = torch.full((*vectors.shape[:2], model.config.numeric), torch.nan)
    fused = model.fuse(numeric, model.default_meta, contexts.time)
    positions = contexts.positions.expand(-1, vectors.shape[1])
    hidden = model.hidden(vectors, contexts.history, positions, contexts.mask, fused)
    return model.point(model.dot_logits(contexts.users[:, None], vectors), hidden)


@torch.no_grad()
def prior(known: Tensor, cold: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean addition (d,) and P (d, d). known, cold: (m, d) vectors of trained items; from fields alone."""
    added = known - cold
    mean = added.mean(0)
    covariance = (added - mean).T @ (added - mean) / len(added)
    ridge = LEAST_RIDGE * covariance.diagonal().mean().clamp(min=1e-6)
    return mean, torch.linalg.inv(covariance + ridge * torch.eye(len(covariance)))


def events_of_others(events: np.ndarray, exposures: np.ndarray, known: int) -> np.ndarray:
    """Return the number of events in which each new item was not taken: (n,) float64.

    events: (n,) of each item; exposures: (n,) events of the log since the first one of the item; known: items. The rate
    events / exposures would be 1 for an item with one event, so one event among `known` is added: the rate of the mean
    item.
    """
    found: np.ndarray = events * (exposures + known) / (events + 1) - events
    return np.maximum(found, 0.0)


class ItemAdapter:
    """Adapts items to events of `sequences`, in which their rows are those above the model's item table.

    model: frozen, in serving form. kinds: of its heads. cold: (rows, d) the vectors of all items from fields alone, the
    new items included. Raises ValueError for a ranker without trained items.
    """

    def __init__(
        self, model: RankerModel, kinds: Sequence[str], cold: Tensor, sequences: Sequences, longest: int, seed: int = 0
    ) -> None:
        self.model = model
        self.kinds = kinds
        self.cold = cold
        self.sequences = sequences
        self.longest = longest
        table = model.item_table().detach()
        rows = torch.arange(FIRST_ITEM, len(table))
        trained = rows[(table[rows] - cold[rows]).abs().amax(dim=1) > UNTRAINED]
        if not len(trained):
            raise ValueError("no item of the ranker was trained, so nothing is known of what training adds to fields")
        self.addition, self.precision = prior(table[trained], cold[trained])
        rng = np.random.default_rng(seed)
        sample = rng.choice(trained.numpy(), MOST_KNOWN, replace=False) if len(trained) > MOST_KNOWN else trained
        self.items = len(trained)
        self.known = table[torch.as_tensor(sample)]
        self.missing = float(np.log(len(trained) / len(sample)))  # of the sum over a sample
        events = len(sequences.items)
        drawn = rng.choice(events, min(OTHERS, events), replace=False)
        parts = [self.contexts(part) for part in np.array_split(np.sort(drawn), -(-len(drawn) // CHUNK_EVENTS))]
        self.others = torch.cat([part.users for part in parts])

    def contexts(self, events: np.ndarray) -> Contexts:
        """Encode the histories before events, given by their rows in the sequences."""
        users = np.searchsorted(self.sequences.offsets, events, "right") - 1
        at = Positions(users, events - self.sequences.offsets[users])
        return encode(self.model, self.sequences, at, self.longest)

    def adapt(self, rows: np.ndarray, exposures: np.ndarray) -> np.ndarray:
        """Return the vectors of new items: (n, d) float32.

        rows: (n,) of the items, each with an event; exposures: (n,) events of the log since the first one of the item.
        """
        order = np.argsort(self.sequences.items, kind="stable")
        begins = np.searchsorted(self.sequences.items[order], rows, "left")
        ends = np.searchsorted(self.sequences.items[order], rows, "right")
        events = [self.newest(order[begin:end]) for begin, end in zip(begins, ends, strict=True)]
        counts = ends - begins
        others = events_of_others(counts, exposures, self.items) * (np.minimum(counts, MOST_EVENTS) / counts)
        result = np.zeros((len(rows), self.cold.shape[1]), np.float32)
        chunk: list[int] = []
        for k in range(len(rows) + 1):
            if chunk and (k == len(rows) or sum(len(events[j]) for j in [*chunk, k]) > CHUNK_EVENTS):
                result[chunk] = self.adapt_chunk(rows[chunk], others[chunk], [events[j] for j in chunk])
                chunk = []
            chunk.append(k)
        return result

    def newest(self, events: np.ndarray) -> np.ndarray:
        """Return at most MOST_EVENTS rows of the sequences, the newest of them."""
        return events[np.argsort(self.sequences.timestamps[events], kind="stable")[-MOST_EVENTS:]]

    def adapt_chunk(self, rows: np.ndarray, others: np.ndarray, events: list[np.ndarray]) -> np.ndarray:
        """As `adapt`, for items whose events (n lists of rows of the sequences) fit into memory together.

        others: (n,), of `events_of_others`.
        """
        taken = np.concatenate(events)
        owner = torch.from_numpy(np.repeat(np.arange(len(rows)), list(map(len, events))))
        contexts = self.contexts(taken)
        labels = torch.from_numpy(self.sequences.labels[taken])  # (E, heads)
        start = self.cold[torch.from_numpy(rows)] + self.addition
        weights = torch.from_numpy(others).float()
        change = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.Adam([change], lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            loss = 0.5 * ((change @ self.precision) * change).sum()
            loss = loss + self.negative_log_likelihood(start + change, owner, contexts, labels, weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found: np.ndarray = (start + change).detach().numpy()
        return found

    def negative_log_likelihood(
        self, vectors: Tensor, owner: Tensor, contexts: Contexts, labels: Tensor, others: Tensor
    ) -> Tensor:
        """Return the sum over all events. vectors: (n, d); owner: (E,) item of each event; others: (n,) weights."""
        model = self.model
        loss = vectors.new_zeros(())
        label_heads = [k for k, kind in enumerate(self.kinds) if kind == "label" and not labels[:, k].isnan().all()]
        if label_heads:
            logits = point_logits(model, contexts, vectors[owner][:, None])[:, 0]
            for k in label_heads:
                known = ~labels[:, k].isnan()
                loss = loss + F.binary_cross_entropy_with_logits(logits[known, k], labels[known, k], reduction="sum")
        for k, kind in enumerate(self.kinds):
            if kind == "next":
                scale = model.dot_scale[k]
                z = (contexts.users * vectors[owner]).sum(-1) * scale
                loss = loss + F.softplus(self.rivals(contexts.users, scale) - z).sum()
                other = F.softplus((self.others @ vectors.T) * scale - self.rivals(self.others, scale)[:, None])
                loss = loss + (other.mean(0) * others).sum()
        return loss

    @torch.no_grad()
    def rivals(self, users: Tensor, scale: Tensor) -> Tensor:
        """Return L (n,): the log of the sum of exp(scale (user . item)) over all known items. users: (n, d)."""
        return torch.logsumexp(users @ self.known.T * scale, dim=1) + self.missing
