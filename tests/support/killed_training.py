"""A training that kills its own process: python -m tests.support.killed_training FOLDER MOMENT EPOCH

MOMENT: "step" in the middle of an epoch, "save" while the checkpoint is half written, or "log" between checkpoint and
log; EPOCH: the epoch, from 1.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from slatewise_train import train as training
from slatewise_train.config import DataConfig, Head, ModelConfig, TablesConfig, TrainConfig
from slatewise_train.data import Data, load_data

SHAPE = {"width": 8, "blocks": 1, "attention_heads": 2, "set_blocks": 1, "meta_size": 4, "dropout": 0.1}
MODEL = ModelConfig("ligr", SHAPE)
CONFIG = TrainConfig(
    epochs=8,
    cascade_epochs=2,
    patience=1,
    batch_events=64,
    learning_rate=0.03,
    negatives=32,
    validate_every=1,
    position_bias=True,
)


def make_table() -> Data:
    """Slates with positions of 40 users, some of whose items were bought."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for user in range(40):
        for slate in range(int(rng.integers(3, 9))):
            items = rng.choice(20, int(rng.integers(2, 6)), replace=False)
            taken = rng.random(len(items)) < 0.5
            for k, (item, bought) in enumerate(zip(items.tolist(), taken.tolist(), strict=True)):
                action = "buy" if bought else "shown"
                rows.append({"user_id": f"u{user}", "item_id": f"i{item}", "timestamp": 10 * slate, "action": action})
                rows[-1] |= {"slate_id": f"s{slate}", "position": k + 1, "label_buy": int(bought)}
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events.parquet"
        pl.DataFrame(rows).write_parquet(events)
        heads = (Head("next", "next", 1.0), Head("buy", "label", 1.0))
        tables = TablesConfig(str(events), history_actions=("buy",))
        return load_data(DataConfig("shop", heads, validation_users=10), tables)


def die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, moment: str, epoch: int) -> None:
    torch.set_num_threads(1)
    step_loss, save = training.Trainer.step_loss, torch.save
    steps = []

    def step(trainer: training.Trainer, windows: np.ndarray, cascade: bool) -> torch.Tensor:
        steps.append(trainer.epoch + 1)
        if steps.count(epoch) == 2:
            die()
        return step_loss(trainer, windows, cascade)

    def half(state: dict[str, Any], path: Path) -> None:
        if state["epoch"] == epoch:
            content = io.BytesIO()
            save(state, content)
            path.write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
            die()
        save(state, path)

    def log(path: Path, rows: list[Any]) -> None:
        if len(rows) == epoch:
            die()
        write_log(path, rows)

    write_log = training.write_log
    if moment == "step":
        training.Trainer.step_loss = step  # type: ignore[method-assign]
    elif moment == "save":
        torch.save = half  # type: ignore[assignment]
    else:
        training.write_log = log
    training.train(make_table(), MODEL, CONFIG, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
