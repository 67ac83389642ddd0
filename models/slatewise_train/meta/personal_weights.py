"""Weights of a user's own in the last layer: the part of a meta-embedding that changes the order of a list.

For each head of kind `label`, a user has one weight for each normalised hidden state of the exit `point`, and a bias:

    logit for u = logit of the ranker + w_u . x            x: `personal_features` of the candidate
    w_u = argmax  sum over examples log p(label | x, w) - 1/2 sum_k precision_k w_k^2

The examples are the user's newest events with a known label. The precision of the prior is the only thing that all
users share. It is learned so that users who are adapted to some of their events predict the next ones best. This is
meta-learning of the last layer alone (ANIL, arXiv 1909.09157) with an inner loop that is solved, not iterated by
learned steps (R2-D2, arXiv 1805.08136).

A user without examples has zero weights, and is ranked as before.

Called by: `limaml.py`. Calls: `tasks.py`, `slates.py`, `rankers/base.py`.

Letters in shapes: U users, P examples of a user, L heads of kind `label`, D = h + 1 weights of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

from slatewise_train.config import MetaConfig
from slatewise_train.data import Data, Sequences
from slatewise_train.meta.tasks import MetaCase, RankerTables, read_events
from slatewise_train.rankers.base import personal_features
from slatewise_train.slates import Slates, read_slates

LEARNING_USERS = 2_000  # whose events the precision is learned from
CHECKED = 5  # one of so many of these users decides whether the weights help
STEPS = 300  # of the precision
STEP_USERS = 128
LEARNING_RATE = 0.03
FIRST_PRECISION = 3.0
NEWTON_STEPS = 20  # at most
HALVINGS = 6  # of a step, at most
CONVERGED = 1e-6  # largest change of a weight
AT_ONCE = 64  # users whose histories are encoded together


@dataclass(frozen=True)
class Examples:
    """Events of U users, each scored by the ranker with the default meta-embedding."""

    features: Tensor  # (U, P, D)
    logits: Tensor  # (U, P, L) of the exit `point`
    labels: Tensor  # (U, P, L), NaN if unknown or padding

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.features, self.logits, self.labels

    def double(self) -> Examples:
        """Return them in double precision: the products of the features of one user are nearly singular."""
        return Examples(*(part.double() for part in self.tensors()))

    def users(self, rows: slice | Tensor) -> Examples:
        return Examples(*(part[rows] for part in self.tensors()))

    def columns(self, first: int, last: int) -> Examples:
        return Examples(*(part[:, first:last] for part in self.tensors()))


@torch.no_grad()
def read_examples(
    tables: RankerTables, sequences: Sequences, cases: Sequence[MetaCase], longest: int, support: int, query: int
) -> Examples:
    """Return the `support` events before each case and the `query` events after it, oldest first.

    longest: as in `read_events`. As in `make_tasks`, only the query has numeric features.
    """
    ranker = tables.ranker
    events = read_events(tables, sequences, cases, longest, support, query)
    u, p = events.target.shape
    labels = events.at_events(events.batch.labels, 1).masked_fill(~events.real[..., None], torch.nan)
    candidates = events.target[..., None]
    numeric = tables.numeric[candidates]
    numeric[:, :support] = torch.nan
    none = torch.zeros(u, p, 0)
    contexts = events.at_events(events.batch.contexts)
    slates = Slates(events.column, candidates, numeric, contexts, none, labels[:, :, None], none)
    meta = ranker.default_meta.detach().expand(u, p, -1)
    vectors = F.embedding(candidates, tables.items)
    dot, hidden = read_slates(ranker, slates, events.history, events.users, vectors, meta)
    heads = list(ranker.config.personal_heads)
    point = ranker.point(dot, hidden).view(u, p, -1)
    features = personal_features(hidden).view(u, p, -1)
    return Examples(features, point[..., heads], labels[..., heads])


def fit(examples: Examples, precision: Tensor) -> Tensor:
    """Return the weights (U, L, D) of the examples, by Newton's method. precision: (L, D) of the prior."""
    return torch.stack([fit_head(examples, precision[k], k) for k in range(len(precision))], dim=1)


def fit_head(examples: Examples, precision: Tensor, head: int) -> Tensor:
    """Return the weights (U, D) of one head. precision: (D,)."""
    x, logits, labels = examples.features, examples.logits[..., head], examples.labels[..., head]
    known = ~labels.isnan()
    labels = labels.nan_to_num()

    def posterior(weights: Tensor) -> Tensor:
        """Return the log posterior of each user, up to a constant: (U,)."""
        moved = logits + (x @ weights[..., None])[..., 0]
        likelihood = (labels * moved - F.softplus(moved)) * known
        return likelihood.sum(1) - 0.5 * (precision * weights**2).sum(1)

    weights = torch.zeros(len(x), x.shape[2], dtype=x.dtype)
    for _ in range(NEWTON_STEPS):
        chance = torch.sigmoid(logits + (x @ weights[..., None])[..., 0])
        slope = (((labels - chance) * known)[:, None] @ x)[:, 0] - precision * weights
        curve = x.mT @ (x * (chance * (1 - chance) * known)[..., None]) + torch.diag(precision)
        step = torch.linalg.solve(curve, slope)
        with torch.no_grad():
            before = posterior(weights)
            size = torch.ones(len(x), 1, dtype=x.dtype)
            for _ in range(HALVINGS):  # far from a label, the curve is nearly flat and a whole step goes too far
                worse = posterior(weights + size * step) < before
                if not worse.any():
                    break
                size = torch.where(worse[:, None], size / 2, size)
        weights = weights + size * step
        if step.abs().max() < CONVERGED:
            break
    return weights


def losses(examples: Examples, weights: Tensor) -> Tensor:
    """Return the log losses (U, P, L) of examples with weights (U, L, D), 0 where the label is unknown."""
    logits = examples.logits + examples.features @ weights.mT
    found = F.binary_cross_entropy_with_logits(logits, examples.labels.nan_to_num(), reduction="none")
    return found.masked_fill(examples.labels.isnan(), 0.0)


def learn_precision(tables: RankerTables, data: Data, config: MetaConfig) -> Tensor | None:
    """Learn the precision of the prior from training users: (L, D) float32.

    The ranker of the tables has `personal_heads`. Returns `None` if weights of their own do not help users whom the
    precision was not learned from, or if there are too few users.
    """
    lengths = data.split.train_lengths
    rng = np.random.default_rng(config.seed)
    users = rng.permutation(np.flatnonzero(lengths >= config.shortest + config.query))[:LEARNING_USERS]
    if len(users) < CHECKED:
        return None
    cases = [(int(user), int(lengths[user]) - config.query) for user in users]
    longest = data.config.history_length
    parts = [
        read_examples(tables, data.sequences, cases[k : k + AT_ONCE], longest, config.examples, config.query)
        for k in trange(0, len(cases), AT_ONCE, desc="examples of users", leave=False, mininterval=2)
    ]
    every = Examples(*(torch.cat(part) for part in zip(*(part.tensors() for part in parts), strict=True))).double()
    edge = len(users) // CHECKED
    log = torch.full((every.logits.shape[2], every.features.shape[2]), FIRST_PRECISION).double().log()
    log.requires_grad_(True)
    optimizer = torch.optim.Adam([log], lr=LEARNING_RATE)
    for _ in trange(STEPS, desc="prior of the users' weights", leave=False, mininterval=2):
        rows = edge + rng.choice(len(users) - edge, min(STEP_USERS, len(users) - edge), replace=False)
        some = every.users(torch.from_numpy(rows))
        count = int(np.exp(rng.uniform(0, np.log(config.examples + 1))))
        weights = fit(some.columns(config.examples - count, config.examples), log.exp())
        loss = losses(some.columns(config.examples, config.examples + config.query), weights).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    precision = log.detach().exp()
    checked = every.users(slice(0, edge))
    query = checked.columns(config.examples, config.examples + config.query)
    weights = fit(checked.columns(0, config.examples), precision)
    known = ~query.labels.isnan()
    change = (losses(query, weights) - losses(query, torch.zeros_like(weights))).sum() / known.sum().clamp(min=1)
    print(f"weights of a user's own change the log loss of the next events by {change:+.4f}", flush=True)
    return precision.float() if change < 0 else None


def personal_weights(
    tables: RankerTables, precision: Tensor, sequences: Sequences, longest: int, count: int
) -> np.ndarray:
    """Return the weights (U, L * D) float32 of users, from their newest `count` events. A user may have no event."""
    result = np.zeros((len(sequences), precision.numel()), np.float32)
    lengths = np.diff(sequences.offsets)
    users = np.flatnonzero(lengths)
    users = users[np.argsort(lengths[users], kind="stable")]  # batches of similar length
    for first in range(0, len(users), AT_ONCE):
        rows = users[first : first + AT_ONCE]
        cases = [(int(user), int(lengths[user])) for user in rows]
        examples = read_examples(tables, sequences, cases, longest, count, 0).double()
        result[rows] = fit(examples, precision.double()).flatten(1).float().numpy()
    return result
