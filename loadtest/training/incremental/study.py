"""The rankers of the study of updates: trained, updated, measured and kept, one after another.

Called by: `__main__.py`. Calls: `slatewise_train/incremental`, the trainer, `evaluation/held_out.py`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slatewise.process import cpu_name
from slatewise_train.config import Config, ModelConfig
from slatewise_train.data import Data, Split, load_data
from slatewise_train.evaluation.held_out import held_out_ranks
from slatewise_train.evaluation.metrics import gains
from slatewise_train.evaluation.verdict import read_log
from slatewise_train.incremental.stability import overlap, rank_biased_overlap, top_lists
from slatewise_train.incremental.update import UpdateConfig, update
from slatewise_train.new_model import build_model
from slatewise_train.rankers.base import RankerModel
from slatewise_train.train import Trainer, train
from slatewise_train.training_log import LOG

DAY = 86_400.0
SHAPE = {"width": 32, "blocks": 2, "decoder_blocks": 1, "attention_heads": 1, "set_blocks": 0, "meta_size": 1}
HISTORY = 128
MOST_CASES = 100  # of a user and day
PLAIN_RATE = 0.001  # of `plain`: the best of the rates that `--tune` compares
LISTS = 300  # users whose ten best are compared between versions
ARMS = ("stale", "plain", "free", "penalised", "full")
RESULTS = "results.jsonl"
Row = dict[str, Any]


class Study:
    def __init__(self, config: Config, out: Path, first: str, epochs: int, update: UpdateConfig) -> None:
        """first: the first day of the week; epochs: of a full training; update: of `penalised`."""
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.update = update
        self.start = datetime.fromisoformat(first).replace(tzinfo=UTC).timestamp()
        none = {"slate_users": 0, "validation_users": 0, "held_out_users": 0, "history_length": HISTORY}
        self.config = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, **none),
            model=ModelConfig(config.model.family, SHAPE | {"dropout": config.model.shape.get("dropout", 0.1)}),
            train=dataclasses.replace(config.train, epochs=epochs, cascade_epochs=0, patience=0),
        )
        self.all = load_data(self.config.data, self.config.tables)

    def counts(self, day: int) -> np.ndarray:
        """Return each user's events before the end of a day: (U,). Day 0 is the last one of the first training."""
        s = self.all.sequences
        known = s.timestamps < self.start + day * DAY
        return np.bincount(np.repeat(np.arange(len(s)), np.diff(s.offsets))[known], minlength=len(s))

    def until(self, day: int) -> Data:
        """Return the data with the events until the end of a day for training, and none held out."""
        none = np.zeros(0, np.int64)
        lengths = self.counts(day)
        return dataclasses.replace(self.all, split=Split(lengths, np.zeros_like(lengths), none, none, none, none))

    def cases(self, day: int) -> tuple[np.ndarray, np.ndarray]:
        """Return users and numbers of events before each case of the day after `day`: (n,) twice."""
        first, last = self.counts(day), self.counts(day + 1)
        rng = np.random.default_rng(day)
        users, lengths = [], []
        for user in np.flatnonzero(last > np.maximum(first, 1)):
            places = np.arange(max(first[user], 1), last[user])
            chosen = np.sort(rng.permutation(places)[:MOST_CASES])
            users += [user] * len(chosen)
            lengths += chosen.tolist()
        return np.array(users, np.int64), np.array(lengths, np.int64)

    def ndcg(self, model: RankerModel, day: int) -> np.ndarray:
        """Return NDCG@10 of each case of the day after `day`: (n,)."""
        users, lengths = self.cases(day)
        return gains(held_out_ranks(model, self.all, users, lengths, 0)["dot"])

    def lists(self, model: RankerModel, day: int) -> np.ndarray:
        """Return the ten best items for some users of the day after `day`, at their first case: (n, 10)."""
        users, lengths = self.cases(day)
        users, places = np.unique(users, return_index=True)
        return top_lists(model, self.all, users[:LISTS], lengths[places][:LISTS], 0)

    # Rankers

    def path(self, arm: str, day: int) -> Path:
        return self.out / ("start" if arm == "stale" or day == 0 else f"{arm}-{day}") / "model.pt"

    def load(self, arm: str, day: int) -> RankerModel:
        model = build_model(self.all.catalogue, self.all.config, self.config.model)
        model.load_state_dict(torch.load(self.path(arm, day), weights_only=True))
        return model.eval()

    def full(self, arm: str, day: int) -> float | None:
        """Train from random weights, and return the CPU seconds of all epochs, also if it continued a stopped one.

        None if the training was finished before.
        """
        path = self.path(arm, day)
        before = len(read_log(path.parent / LOG))
        begin = time.process_time()
        trainer = train(self.until(day), self.config.model, self.config.train, path.parent)
        seconds = time.process_time() - begin
        torch.save(trainer.model.state_dict(), path)
        return seconds * trainer.epoch / (trainer.epoch - before) if trainer.epoch > before else None

    def updated(self, model: RankerModel, day: int, config: UpdateConfig) -> float:
        """Update a model in place from the end of the day before to the end of `day`; return the CPU seconds."""
        data = self.until(day)
        begin = time.process_time()
        update(Trainer(data, model, self.config.train), self.counts(day - 1), config, cascade=False)
        return time.process_time() - begin

    def rows(self) -> list[Row]:
        path = self.out / RESULTS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def run(self, days: int, arms: Sequence[str] = ARMS) -> None:
        """Measure the rankers that are not measured yet."""
        if not self.path("stale", 0).exists():
            self.full("stale", 0)
        done = {(row["arm"], row["day"]) for row in self.rows()}
        numbers = range(1, days + 1)
        quick = [arm for arm in arms if arm != "full"]  # updates first, as they take little time
        slow = [arm for arm in arms if arm == "full"]
        for day, arm in itertools.chain(itertools.product(numbers, quick), itertools.product(numbers, slow)):
            if (arm, day) in done:
                continue
            seconds: float | None = 0.0
            if arm == "full":
                seconds = self.full(arm, day)
            elif arm != "stale":
                model = self.load(arm, day - 1)
                config = self.update
                if arm == "plain":
                    config = UpdateConfig(2, PLAIN_RATE, 0.0, "identity", replay=0.0)
                elif arm == "free":
                    config = dataclasses.replace(config, penalty=0.0)
                seconds = self.updated(model, day, config)
                self.path(arm, day).parent.mkdir(exist_ok=True)
                torch.save(model.state_dict(), self.path(arm, day))
            self.append(self.measure(arm, day, seconds))

    def measure(self, arm: str, day: int, seconds: float | None) -> Row:
        """Return the row of a ranker. Its lists are compared with those of yesterday's, if that one exists."""
        model = self.load(arm, day)
        found = self.ndcg(model, day)
        stable: dict[str, float | None] = {"overlap10": None, "rbo": None}
        if self.path(arm, day - 1).exists():
            before, now = self.lists(self.load(arm, day - 1), day), self.lists(model, day)
            stable["overlap10"] = round(float(overlap(before, now).mean()), 4)
            stable["rbo"] = round(float(rank_biased_overlap(before, now).mean()), 4)
        return stable | {
            "arm": arm,
            "day": day,
            "date": datetime.fromtimestamp(self.start + (day - 1) * DAY, UTC).date().isoformat(),
            "events": int(self.counts(day).sum() - self.counts(day - 1).sum()),
            "cases": len(found),
            "ndcg10": round(float(found.mean()), 5),
            "gains": [round(float(value), 4) for value in found],
            "seconds": None if seconds is None else round(seconds, 2),
            "cpu": cpu_name(),
            "update": dataclasses.asdict(self.update),
            "epochs": self.config.train.epochs,
        }

    def append(self, row: Row) -> None:
        with (self.out / RESULTS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({name: value for name, value in row.items() if name != "gains"}, flush=True)

    def tune(self) -> None:
        """Print NDCG@10 after an update of the first day with several settings."""
        if not self.path("stale", 0).exists():
            self.full("stale", 0)
        start = self.load("stale", 0)
        print(f"stale {self.ndcg(start, 1).mean():.5f}", flush=True)
        for config in settings():
            model = copy.deepcopy(start)
            seconds = self.updated(model, 1, config)
            stable = overlap(self.lists(start, 1), self.lists(model, 1)).mean()
            print(f"{config} {self.ndcg(model, 1).mean():.5f} overlap {stable:.3f}, {seconds:.1f} s", flush=True)


def settings() -> Iterator[UpdateConfig]:
    """Yield the settings that `--tune` compares."""
    for replay, rate, penalty in itertools.product((0.0, 2.0, 6.0), (0.0015, 0.003, 0.006), (0.0, 30.0, 100.0, 300.0)):
        yield UpdateConfig(2, rate, penalty, replay=replay)
    for rate, penalty in itertools.product((0.001, 0.003, 0.006), (0.0, 30.0)):
        yield UpdateConfig(2, rate, penalty, "identity", replay=0.0)
