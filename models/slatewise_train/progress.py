"""The progress of a training: its learning rate, when its last epochs begin, its end, and its best weights.

Without `patience`, a training has all its epochs, a learning rate that falls to 0 as half a cosine, and its last
weights are the result. With `patience`, the learning rate is constant until the validation NDCG@10 has not improved for
`patience` validations. Then the last epochs begin, from the best weights and with a learning rate that falls to 0.

Called by: `train.py`, `time_left.py`. Calls: `config.py`, `epochs.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from slatewise_train.checkpoint import Stateful
from slatewise_train.config import TrainConfig
from slatewise_train.epochs import cosine, warm_up

LENGTH = ("epochs", "cascade_epochs", "patience")  # keys that decide when a training ends


class Progress:
    """Counts the epochs of a training, and keeps the best weights.

    parts: whatever has weights. labels: whether the ranker has heads of kind `label`, which only the last epochs
    train.
    """

    def __init__(self, config: TrainConfig, parts: Mapping[str, Stateful], labels: bool) -> None:
        self.config = config
        self.parts = parts
        self.labels = labels
        self.epoch = 0
        self.joined: int | None = None  # the epoch after which the exits `point` and `set` are trained too
        self.stale = 0  # validations since the best one
        self.best: dict[str, Any] | None = None  # score, epoch and weights of the best validation
        self.changes: dict[str, str] = {}  # of the config since the checkpoint that was loaded, by key

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step of the current epoch, which has `steps` steps."""
        config = self.config
        warm = config.warmup * config.epochs * steps if config.warmup_steps is None else config.warmup_steps
        rate = config.learning_rate * warm_up(self.epoch * steps + step, warm)
        if not config.patience:
            return rate * cosine((self.epoch + step / steps) / config.epochs)
        if self.joined is None:
            return rate
        return rate * cosine((self.epoch - self.joined + step / steps) / config.cascade_epochs)

    @property
    def stopped(self) -> bool:
        """Whether the validation has not improved for long enough."""
        return bool(self.config.patience) and self.stale >= self.config.patience

    @property
    def finished(self) -> bool:
        config = self.config
        if self.joined is not None:
            return self.epoch >= min(config.epochs, self.joined + config.cascade_epochs)
        return self.epoch >= config.epochs or (self.stopped and not config.cascade_epochs)

    def epochs_left(self) -> tuple[int, int]:
        """Return the most epochs that are left before the last ones, and the number of last ones that are left."""
        config = self.config
        if self.joined is not None:
            return 0, max(0, min(config.epochs, self.joined + config.cascade_epochs) - self.epoch)
        if self.finished:
            return 0, 0
        return max(0, config.epochs - config.cascade_epochs - self.epoch), config.cascade_epochs

    @property
    def may_end_early(self) -> bool:
        """Whether there may be fewer epochs than `epochs_left`."""
        return bool(self.config.patience) and self.joined is None

    def join(self) -> None:
        """Begin the last epochs, which train all exits, if they are due."""
        config = self.config
        due = self.stopped or self.epoch >= config.epochs - config.cascade_epochs
        if self.joined is not None or not due or not config.cascade_epochs:
            return
        self.joined = self.epoch
        self.stale = 0
        if self.best is not None:
            self.restore_best()
            print(f"the last {config.cascade_epochs} epochs begin, with the weights of epoch {self.best['epoch']}")
            # Until now `point` gives the logits of `dot`: these weights compete, unless labels are yet to be learned.
            self.best = None if self.labels else self.best

    def compare(self, score: float) -> None:
        """Keep the weights if their validation score is the best so far. Does nothing without `patience`."""
        if not self.config.patience:
            return
        if self.best is not None and score <= self.best["score"]:
            self.stale += 1
            return
        weights = {
            name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in self.parts.items()
        }
        self.best = {"score": score, "epoch": self.epoch, **weights}
        self.stale = 0

    def restore_best(self) -> None:
        """Set the parts to the best weights, if there are any."""
        if self.best is not None:
            for name, part in self.parts.items():
                if name in self.best:  # a checkpoint of an older version lacks the part of the shown slates
                    part.load_state_dict(self.best[name])

    def kept(self) -> str:
        """Return a sentence about the weights that are the result; empty if these are the last ones."""
        if self.best is None:
            return ""
        sentence = f"the result has the weights of epoch {self.best['epoch']}, which validated best"
        if self.joined is not None and self.best["epoch"] <= self.joined:
            sentence += "; the last epochs did not improve them, so the other exits give the order of dot"
        return sentence

    def state(self) -> dict[str, Any]:
        """Return the values of a checkpoint."""
        train = dataclasses.asdict(self.config)
        return {"epoch": self.epoch, "joined": self.joined, "stale": self.stale, "best": self.best, "train": train}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from the values of a checkpoint; a finished training gets its best weights.

        A training that is finished stays finished, and last epochs that have begun keep their number.
        """
        self.epoch, self.joined = state["epoch"], state["joined"]
        self.stale, self.best = state["stale"], state["best"]
        now = dataclasses.asdict(self.config)
        saved = {key: value for key, value in state.get("train", {}).items() if key in now}
        self.changes = {key: f"{key} {old} -> {now[key]}" for key, old in saved.items() if old != now[key]}
        stated, self.config = self.config, dataclasses.replace(self.config, **saved)
        if self.joined is None and not self.finished:
            self.config = stated
        else:
            self.config = dataclasses.replace(stated, **{key: getattr(self.config, key) for key in LENGTH})
        if self.finished:
            self.restore_best()

    def resumed(self) -> str:
        """Return a sentence about a training that was loaded, with the changes of its config."""
        line = f"continuing after epoch {self.epoch} of {self.config.epochs}"
        if self.finished:
            line = f"finished after epoch {self.epoch}; remove it to train again, or use another folder"
        kept = {key for key in self.changes if self.finished or (self.joined is not None and key in LENGTH)}
        effects = {
            f"counts from epoch {self.epoch + 1} on": self.changes.keys() - kept,
            "has no effect on it" if self.finished else "has no effect, as the last epochs have begun": kept,
        }
        for effect, keys in effects.items():
            if keys:
                changes = ", ".join(text for key, text in self.changes.items() if key in keys)
                line += f". [train] differs from the checkpoint's, which {effect}: {changes}"
        return line
