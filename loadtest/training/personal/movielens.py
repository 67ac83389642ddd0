"""Personal weights on top of a trained ranker: do they improve `like` on the slates of MovieLens 1M?

The target is what the ranker leaves: the label minus its probability at the exit `point`. The features are the hidden
states of that exit, scaled by their deviations, with a constant. Weights are fitted to a user's newest events before
the held-out slate, at most 5, 20 or 50 of them; the ranker reads these events and all before them. U and the strength
of the ridge come from other users.

Called by: `__main__.py`. Calls: `fits.py`, `slatewise_train`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loadtest.training.personal.fits import Examples, one_for_all, personal, shared_directions
from slatewise_train.batches import make_batch, served_window_start
from slatewise_train.data import Data
from slatewise_train.evaluation.metrics import interval, ndcg
from slatewise_train.rankers.base import RankerModel

LEARNING_USERS = 800  # for U and the strength of the ridge
RANK = 4
SPARSE = 4
WEIGHTS = (3.0, 30.0, 300.0, 3_000.0)
LEAST, MOST = 0.01, 0.99  # of a probability after a personal change


@dataclass(frozen=True)
class User:
    """The events before the slate, oldest first, and those of the slate."""

    before: Examples  # targets: label minus probability
    slate: np.ndarray  # (n, d) features
    chance: np.ndarray  # (n,) probabilities of the ranker
    labels: np.ndarray  # (n,) 0 or 1

    def newest(self, count: int) -> Examples:
        return Examples(self.before.features[-count:], self.before.targets[-count:])


@torch.no_grad()
def read_user(model: RankerModel, data: Data, user: int, start: int, head: int, count: int) -> User:
    """Read a user whose slate begins behind `start` events: features of `count` events before it, and of the slate."""
    s = data.sequences
    first = served_window_start(start, data.config.history_length)
    end = min(start + data.config.slate_size, int(s.offsets[user + 1] - s.offsets[user]))
    batch = make_batch(s, [(user, first, start)])
    table = model.item_table()
    history, users = model.encode(model.tokens(table[batch.items], batch.actions, batch.gaps))
    places = np.r_[max(first, start - count) : end]  # events of the user that are candidates
    read = torch.from_numpy(np.minimum(places, start) - first)  # events that each candidate reads
    rows = torch.from_numpy(s.items[s.offsets[user] + places])
    mask = torch.arange(batch.items.shape[1]) <= read[:, None]
    numeric = torch.from_numpy(data.catalogue.numeric)[rows][None]
    context = batch.contexts[0, read][None]
    fused = model.fuse(numeric, model.default_meta, context)
    hidden = model.hidden(table[rows][None], history, (read + 1)[None], mask[None, None], fused)
    # each candidate has the user vector of its own place
    dot = model.dot_logits(users[0, read][:, None], table[rows][:, None])[:, 0][None]
    chance = torch.sigmoid(model.point(dot, hidden)[0, :, head]).numpy().astype(float)
    labels = s.labels[s.offsets[user] + places, head].astype(float)
    features = hidden[0].numpy().astype(float)
    is_slate = places >= start
    return User(
        Examples(features[~is_slate], (labels - chance)[~is_slate]),
        features[is_slate],
        chance[is_slate],
        labels[is_slate],
    )


def scaled(users: list[User], mean: np.ndarray, deviation: np.ndarray) -> list[User]:
    """Return the users with features of deviation 1 / sqrt(d), and a constant feature of 1."""

    def change(features: np.ndarray) -> np.ndarray:
        moved = (features - mean) / (deviation * np.sqrt(len(mean)))
        return np.concatenate([np.ones((len(features), 1)), moved], axis=1)

    return [
        User(Examples(change(u.before.features), u.before.targets), change(u.slate), u.chance, u.labels) for u in users
    ]


def log_losses(user: User, change: np.ndarray) -> float:
    """Return the mean log loss of the slate after a change of its probabilities (n,)."""
    chance = np.clip(user.chance + change, LEAST, MOST)
    return float(-np.where(user.labels == 1, np.log(chance), np.log(1 - chance)).mean())


def measure(learning: list[User], users: list[User], count: int) -> dict[str, dict[str, list[float]]]:
    """Return log loss and NDCG@10 minus those of the ranker, by fit, over the users: mean and interval."""
    d = learning[0].slate.shape[1]
    few = [user.newest(count) for user in learning]

    def fits(name: str, weight: float) -> tuple[np.ndarray, int]:
        """U and the number of sparse entries."""
        if name == "bias":
            return np.eye(d)[:, :1], 0
        if name == "ridge":
            return np.eye(d), 0
        sparse = SPARSE if name == "low rank + sparse" else 0
        return shared_directions(few, RANK, sparse, weight), sparse

    def changes(user: User, fit: tuple[np.ndarray, int], weight: float) -> np.ndarray:
        part, sparse = personal(user.newest(count), fit[0], fit[1], weight)
        found: np.ndarray = user.slate @ (fit[0] @ part + sparse)
        return found

    common = one_for_all(few, 1.0)
    found: dict[str, list[np.ndarray]] = {"one for all": [user.slate @ common for user in users]}
    for name in ("bias", "ridge", "low rank", "low rank + sparse"):
        tried = []
        for weight in WEIGHTS:
            fit = fits(name, weight)
            mean = np.mean([log_losses(user, changes(user, fit, weight)) for user in learning])
            tried.append((float(mean), weight, fit))
        _, weight, fit = min(tried, key=lambda row: row[0])
        found[name] = [changes(user, fit, weight) for user in users]
    rows = {}
    for name, change in found.items():
        loss = [log_losses(u, c) - log_losses(u, 0 * c) for u, c in zip(users, change, strict=True)]
        order = [ndcg(u.chance + c, u.labels) - ndcg(u.chance, u.labels) for u, c in zip(users, change, strict=True)]
        gains = np.array(order)
        rows[name] = {"log loss": interval(np.array(loss)), "NDCG@10": interval(gains[~np.isnan(gains)])}
    return rows
