"""LightGBM on features made by hand: LambdaMART, and a classifier.

Features of a candidate: its numbers, genres and decade; the share of likes among its other training events; the number
of the user's events, and the share of likes among all, the newest ten, and those of the candidate's genres and decade;
the context of the request. There is no id of a user, and no similarity of two items.

Called by: `__main__.py`. Calls: lightgbm, from the folder in which `requirements.txt` is installed.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from loadtest.training.families.runs import SCORES
from slatewise.bundle.features import request_context
from slatewise_train.data import Data, request_times, training_events

POSITIONS = 6  # of each training user, at which a slate begins
PRIOR = 10.0  # events at the mean rate that a share of likes begins with
NEWEST = 10
FOLDS = 5
TREES = 400
PATIENCE = 30  # trees without a better validation
SETTINGS = {"learning_rate": 0.05, "num_leaves": 63, "min_data_in_leaf": 100, "feature_fraction": 0.8, "verbose": -1}
OBJECTIVES = {"LambdaMART": "lambdarank", "boosted trees": "binary"}
METRICS = {"lambdarank": "ndcg", "binary": "auc"}


def one_hot(rows: np.ndarray) -> np.ndarray:
    """Return which values each item has: rows (items, V), 0 is padding -> (items, values) float64."""
    result = np.zeros((len(rows), int(rows.max()) + 1))
    np.put_along_axis(result, rows, 1.0, axis=1)
    result[:, 0] = 0
    return result


class Features:
    """Computes the features of slates from training events."""

    def __init__(self, data: Data) -> None:
        self.data = data
        users, items = training_events(data.sequences, data.split)
        lengths = data.split.train_lengths
        rows = np.repeat(data.sequences.offsets[:-1] - np.cumsum(lengths) + lengths, lengths) + np.arange(len(users))
        labels = data.sequences.labels[rows, 0]
        shape = FOLDS, len(data.catalogue.numeric)
        places = users % FOLDS * shape[1] + items
        self.likes = np.bincount(places, labels, shape[0] * shape[1]).reshape(shape)
        self.events = np.bincount(places, minlength=shape[0] * shape[1]).reshape(shape)
        self.mean = float(labels.mean())
        self.values = {name: one_hot(rows) for name, rows in data.catalogue.field_values.items()}

    def slate(self, user: int, first: int, last: int, trained: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return features (n, F) and labels (n,) of a user's events first to last - 1, after the events before them.

        trained: these events are training events. The items' shares then leave out a fifth of the users, this one among
        them: with the own label in a share, or with the own label alone left out, trees read the label from it.
        """
        s = self.data.sequences
        start = int(s.offsets[user])
        ahead = slice(start + first, start + last)
        items, labels = s.items[ahead], s.labels[ahead, 0]
        before = s.labels[start : start + first, 0]
        rate = (before.sum() + PRIOR * self.mean) / (first + PRIOR)
        newest = before[-NEWEST:]
        context = request_context(request_times(s.timestamps[start : start + max(1, first)])[-1])
        folds = np.arange(FOLDS) != (user % FOLDS if trained else FOLDS)
        events = self.events[folds][:, items].sum(axis=0)
        columns = [
            (self.likes[folds][:, items].sum(axis=0) + PRIOR * self.mean) / (events + PRIOR),
            np.log1p(events * FOLDS / folds.sum()),
            *(np.full(len(items), value) for value in (first, rate, newest.mean() if len(newest) else rate, *context)),
            *self.data.catalogue.numeric[items].T,
        ]
        for values in self.values.values():
            has = values[items]
            seen = values[s.items[start : start + first]]
            often = seen.sum(axis=0)
            shares = (before @ seen + PRIOR * rate) / (often + PRIOR)
            columns += [(has @ shares) / np.maximum(has.sum(axis=1), 1), has @ often / max(1, first), *has.T]
        return np.stack(columns, axis=1), labels

    def table(self, slates: list[tuple[int, int, int]], trained: bool) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Return features (E, F), labels (E,) and the size of each slate."""
        features, labels = zip(*(self.slate(*slate, trained) for slate in slates), strict=True)
        return np.concatenate(features), np.concatenate(labels), [len(part) for part in labels]


def slates_of(data: Data, users: np.ndarray) -> list[tuple[int, int, int]]:
    """Return the held-out slates of users: user, first event, one past the last."""
    size = data.config.slate_size
    return [(int(u), int(data.split.train_lengths[u]), int(data.split.train_lengths[u]) + size) for u in users]


def training_slates(data: Data, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Draw slates of training events. Every doubling of the events before a slate is about equally likely."""
    lengths = data.split.train_lengths
    result = []
    for user in np.flatnonzero(lengths > 1):
        firsts = np.exp(rng.uniform(0, np.log(lengths[user]), POSITIONS)).astype(int)
        ends = np.minimum(firsts + data.config.slate_size, lengths[user])
        result += [(int(user), int(a), int(b)) for a, b in zip(firsts, ends, strict=True) if a < b]
    return result


def run_trees(data: Data, name: str, seed: int, threads: int, folder: Path) -> None:
    """Train trees, and write their scores. Does nothing if they are there. Raises ImportError without LightGBM."""
    if (folder / SCORES).exists():
        return
    import lightgbm

    begin = time.perf_counter()
    features = Features(data)
    objective = OBJECTIVES[name]
    x, y, sizes = features.table(training_slates(data, np.random.default_rng(seed)), trained=True)
    known = lightgbm.Dataset(x, y, group=sizes if objective == "lambdarank" else None)
    x, y, sizes = features.table(slates_of(data, data.split.validation_users), trained=False)
    unseen = lightgbm.Dataset(x, y, group=sizes if objective == "lambdarank" else None, reference=known)
    settings = SETTINGS | {"objective": objective, "metric": METRICS[objective], "seed": seed, "num_threads": threads}
    settings["eval_at"] = [10]  # of the ten best of a slate, which LambdaMART stops by
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    trees = lightgbm.train(settings, known, TREES, valid_sets=[unseen], callbacks=[stop])
    seconds = time.perf_counter() - begin
    x, _, _ = features.table(slates_of(data, data.split.slate_users), trained=False)
    raw = trees.predict(x)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / SCORES, raw=raw, fitted=raw, seconds=seconds, parity=np.nan)
    print(f"{name}, seed {seed}: {trees.best_iteration} trees, {x.shape[1]} features, {seconds:.0f} s", flush=True)
