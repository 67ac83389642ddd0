"""A training that is killed and resumed equals one that was not stopped, bit for bit."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slatewise_train import checkpoint
from slatewise_train.config import TrainConfig
from slatewise_train.data import Data
from slatewise_train.progress import Progress
from slatewise_train.time_left import TimeLeft, time_ratio, words
from slatewise_train.train import Trainer, train, train_epoch
from slatewise_train.training_log import rows_up_to, write_log
from tests.support.killed_training import CONFIG, MODEL, make_table

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table() -> Data:
    return make_table()


@pytest.fixture(scope="module")
def through(table: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    folder = tmp_path_factory.mktemp("through")
    return train(table, MODEL, CONFIG, folder), folder


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    states: dict[str, Any] = {name: part.state_dict() for name, part in trainer.parts().items() if name != "optimizer"}
    moments = trainer.optimizer.state_dict()["state"]
    states["moments"] = {f"{k}.{name}": value for k, state in moments.items() for name, value in state.items()}
    return {f"{part}.{name}": value for part, state in states.items() for name, value in state.items()}


def assert_equal(found: Trainer, wanted: Trainer) -> None:
    assert weights_of(found).keys() == weights_of(wanted).keys()
    for name, value in weights_of(wanted).items():
        torch.testing.assert_close(weights_of(found)[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


# The last epochs begin after epoch `joined`, and the training ends after `joined` + 2.
@pytest.mark.parametrize(("moment", "after"), [("step", -1), ("save", 0), ("log", 0), ("save", 2)])
def test_killed_training_resumes_bit_for_bit(
    moment: str, after: int, table: Data, through: tuple[Trainer, Path], tmp_path: Path
) -> None:
    whole, folder = through
    assert whole.progress.joined is not None and 2 <= whole.progress.joined < CONFIG.epochs - CONFIG.cascade_epochs
    epoch = whole.progress.joined + after
    command = [sys.executable, "-m", "tests.support.killed_training", str(tmp_path), moment, str(epoch)]
    killed = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"]
    assert saved == (epoch if moment == "log" else epoch - 1)
    assert len(log_of(tmp_path)) == epoch - 1
    resumed = train(table, MODEL, CONFIG, tmp_path)
    assert_equal(resumed, whole)
    assert resumed.progress.best is not None and whole.progress.best is not None
    assert resumed.progress.best["epoch"] == whole.progress.best["epoch"]
    assert log_of(tmp_path) == log_of(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "log.csv", "log.png"]


def test_best_weights_have_the_position_bias(through: tuple[Trainer, Path], table: Data) -> None:
    best = through[0].progress.best
    assert best is not None and best.keys() >= {"model", "meta", "shown"}
    trainer = Trainer(table, MODEL, CONFIG)
    assert trainer.shown is not None
    trainer.progress.epoch = 1
    trainer.progress.compare(0.5)
    with torch.no_grad():
        trainer.shown.position_bias.fill_(7.0)
    trainer.progress.restore_best()
    assert not trainer.shown.position_bias.any()
    best = trainer.progress.best
    assert best is not None
    del best["shown"]  # as a checkpoint of an older version
    trainer.progress.restore_best()


def test_log_keeps_epochs_of_the_checkpoint_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    assert rows_up_to(path, 2, [{"epoch": 1, "loss": 3.0}]) == [{"epoch": 1, "loss": 3.0}]
    write_log(path, [{"epoch": k, "loss": 9 - k} for k in (1, 2, 3)])
    found = rows_up_to(path, 2, [{"epoch": 2, "loss": 5.0}])
    assert [(int(row["epoch"]), float(row["loss"])) for row in found] == [(1, 8.0), (2, 5.0)]
    write_log(path, found)
    assert [row["epoch"] for row in log_of(tmp_path)] == ["1", "2"]


def test_folder_of_a_running_training_is_refused(table: Data, tmp_path: Path) -> None:
    short = dataclasses.replace(CONFIG, epochs=1, cascade_epochs=0)
    with checkpoint.alone(tmp_path), pytest.raises(ValueError, match="another process trains in this folder"):
        train(table, MODEL, short, tmp_path)
    assert not list(tmp_path.iterdir())
    assert train(table, MODEL, short, tmp_path).epoch == 1


def test_changed_values_are_printed_and_count(table: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = dataclasses.replace(CONFIG, patience=0, epochs=4, cascade_epochs=0)
    stopped = Trainer(table, MODEL, short)
    for _ in range(2):
        train_epoch(stopped, tmp_path)
    assert "differs" not in capsys.readouterr().out
    longer = dataclasses.replace(short, epochs=3, learning_rate=0.5, weight_decay=0.25)
    trainer = train(table, MODEL, longer, tmp_path)
    line = next(line for line in capsys.readouterr().out.splitlines() if "differs" in line)
    assert "continuing after epoch 2 of 3" in line and "counts from epoch 3 on" in line
    assert line.endswith("epochs 4 -> 3, learning_rate 0.03 -> 0.5, weight_decay 0.0 -> 0.25")
    assert trainer.epoch == 3 and {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.25}
    train(table, MODEL, dataclasses.replace(longer, negatives=64), tmp_path)
    out = capsys.readouterr().out
    assert "finished after epoch 3; remove it to train again" in out and "no effect on it: negatives 32 -> 64" in out


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (dataclasses.replace(CONFIG, patience=0, epochs=3, cascade_epochs=0), {"epochs": 5}),
        (dataclasses.replace(CONFIG, patience=0, epochs=3, cascade_epochs=1), {"cascade_epochs": 3, "epochs": 9}),
        (dataclasses.replace(CONFIG, epochs=20, cascade_epochs=1), {"cascade_epochs": 5}),
        (dataclasses.replace(CONFIG, epochs=20, cascade_epochs=0), {"patience": 9}),
    ],
)
def test_finished_training_stays_finished(
    table: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str], config: TrainConfig, changes: dict[str, int]
) -> None:
    whole = train(table, MODEL, config, tmp_path)
    again = train(table, MODEL, dataclasses.replace(config, **changes), tmp_path)
    assert_equal(again, whole)
    assert again.epoch == whole.epoch and again.progress.finished and len(log_of(tmp_path)) == whole.epoch
    out = capsys.readouterr().out
    assert f"finished after epoch {whole.epoch}; remove it to train again, or use another folder. [train]" in out
    line = out.splitlines()[-1 if again.progress.best is None else -2]
    assert "which has no effect on it: " in line and all(f"{key} " in line for key in changes)
    if again.progress.best is not None:
        assert out.splitlines()[-1].startswith(f"the result has the weights of epoch {again.progress.best['epoch']},")


def test_last_epochs_that_have_begun_keep_their_number(
    table: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(CONFIG, patience=0, epochs=5, cascade_epochs=3)
    stopped = Trainer(table, MODEL, config)
    for _ in range(3):
        train_epoch(stopped, tmp_path)
    changed = dataclasses.replace(config, epochs=9, cascade_epochs=2, negatives=16)
    trainer = train(table, MODEL, changed, tmp_path)
    out = capsys.readouterr().out
    assert "continuing after epoch 3 of 5" in out and "which counts from epoch 4 on: negatives 32 -> 16. [train]" in out
    assert "no effect, as the last epochs have begun: epochs 5 -> 9, cascade_epochs 3 -> 2" in out
    assert (trainer.epoch, trainer.progress.joined) == (5, 2)
    train(table, MODEL, changed, tmp_path)
    assert "finished after epoch 5" in capsys.readouterr().out


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.time = 1_000.0

    def __call__(self) -> float:
        return self.time


@pytest.mark.parametrize(("patience", "end"), [(0, ""), (3, " at most")])
def test_time_left_follows_the_measured_epochs(patience: int, end: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(CONFIG, epochs=10, cascade_epochs=4, patience=patience)
    progress, clock = Progress(config, {}, False), Clock()
    left = TimeLeft(progress, lambda: 3.0, clock)

    def epoch(seconds: float) -> str:
        clock.time += seconds
        progress.epoch += 1
        cascade = progress.joined is not None
        progress.join()
        left.end_epoch(cascade)
        return left.text()

    assert epoch(50.0) == "", "the first minute"
    clock.time += 9.0
    left.step(0.18)
    clock.time += 1.0
    assert capsys.readouterr().out == ""
    left.step(0.2)  # 60 of 300 seconds before the last epochs are over; these take 4 * 150
    left.step(0.3)
    assert capsys.readouterr().out == f"about 14 min left{end}\n"
    assert epoch(40.0) == f"about 13 min left{end}"  # 4 * 50 + 4 * 150
    for _ in range(3):
        epoch(50.0)
    assert epoch(50.0) == "about 10 min left", "the last epochs have begun: their number is known"
    assert epoch(1_000.0) == "about 50 min left"
    for _ in range(2):
        epoch(1_000.0)
    assert epoch(1_000.0) == "" and progress.finished


def test_time_left_of_a_resumed_training_in_its_last_epochs() -> None:
    config = dataclasses.replace(CONFIG, epochs=10, cascade_epochs=4, patience=1)
    progress, clock = Progress(config, {}, False), Clock()
    progress.epoch, progress.joined = 5, 4
    left = TimeLeft(progress, lambda: 1 / 0, clock)
    clock.time += 75.0
    assert left.text(0.25) == "about 14 min left"  # 2.75 epochs of 300 seconds


def test_duration_in_words() -> None:
    assert [words(s) for s in (0, 89.4, 90, 5399, 5400, 86400)] == ["0 s", "89 s", "2 min", "90 min", "1.5 h", "24.0 h"]


def test_time_ratio_leaves_out_the_first_pair() -> None:
    durations = itertools.chain([100.0, 1.0, 2.0, 5.0, 2.0, 7.0])
    clock = Clock()

    def step(cascade: bool) -> None:
        clock.time += next(durations)

    assert time_ratio(step, clock) == 12 / 4


def test_trial_steps_change_nothing(table: Data) -> None:
    trainer = Trainer(table, MODEL, CONFIG)
    trainer.run_epoch(False)
    before = {name: value.clone() for name, value in weights_of(trainer).items()}
    state = torch.get_rng_state()
    assert trainer.cascade_cost() > 0
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in weights_of(trainer).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    other = Trainer(table, MODEL, CONFIG)
    other.run_epoch(False)
    for one in (trainer, other):
        one.run_epoch(True)
    assert_equal(trainer, other)
