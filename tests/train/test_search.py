"""The hyper-parameter search: its budget, its resumption after a kill, and the use of its result by other commands."""

from __future__ import annotations

import dataclasses
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slatewise import cli
from slatewise.bundle.loader import load_bundle
from slatewise_train import compress, training_log
from slatewise_train import search as search_module
from slatewise_train.compression.source import Source
from slatewise_train.config import Config, ModelConfig, read_config
from slatewise_train.data import Data
from slatewise_train.evaluation.held_out import held_out_gains
from slatewise_train.loading import load_for_training, load_trainer
from slatewise_train.search import apply_found, clearly_better, plot, search
from slatewise_train.search_space import (
    COST,
    KEPT,
    SPACE,
    as_lines,
    cost,
    draw,
    plan,
    rungs_of,
    seconds_of,
    value_of,
    with_values,
)
from slatewise_train.search_state import State, read_state
from slatewise_train.train import Trainer, train
from tests.train.test_train import rows_of, state_of

torch.set_num_threads(1)

TRAIN = "epochs = 30\ncascade_epochs = 2\npatience = 4\nvalidate_every = 1\ncascade_windows = 4\n"
MODEL = "attention_heads = 4\nset_blocks = 0\n"
BUDGET = 64.0  # of a clock that counts epochs


def write_tables(folder: Path) -> Path:
    """Users who walk along a circle of 40 items, mostly one step ahead. Returns the TOML."""
    rng = np.random.default_rng(0)
    rows = ["user_id,item_id,timestamp"]
    for user in range(80):
        steps = rng.choice([1, 1, 1, 1, 7], size=rng.integers(6, 12))
        items = (rng.integers(40) + np.cumsum(steps)) % 40
        rows += [f"u{user},i{item},{1000 + k}" for k, item in enumerate(items)]
    (folder / "events.csv").write_text("\n".join(rows) + "\n")
    toml = folder / "shop.toml"
    toml.write_text(f'name = "shop"\n[data]\nevents = "{folder}/events.csv"\n[model]\n{MODEL}[train]\n{TRAIN}')
    return toml


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tables(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def loaded(toml: Path) -> tuple[Data, Config]:
    return load_for_training(read_config(toml))


class Clock:
    """A clock that stands still but for epochs; each takes `price(trainer)` seconds."""

    def __init__(self, patch: pytest.MonkeyPatch, price: Callable[[Trainer], float] = lambda _: 1.0) -> None:
        self.now = 0.0
        self.epochs = 0
        run_epoch = Trainer.run_epoch

        def timed(trainer: Trainer, cascade: bool) -> float:
            loss = run_epoch(trainer, cascade)
            self.now += price(trainer)
            self.epochs += 1
            return loss

        patch.setattr(Trainer, "run_epoch", timed)
        patch.setattr(search_module, "perf_counter", lambda: self.now)
        patch.setattr(search_module, "plot", lambda candidates, best, path: None)  # slower than some epochs


def compared(folder: Path) -> list[dict[str, Any]]:
    """The candidates of a search, without their seconds."""
    state = read_state(folder)
    assert state is not None
    found = [dataclasses.asdict(candidate) for candidate in state.candidates]
    for candidate in found:
        candidate["rows"] = [{k: v for k, v in row.items() if k != "seconds"} for row in candidate["rows"]]
    return found


def gains_after(data: Data, config: Config, epochs: int) -> np.ndarray:
    """NDCG@10 of each validation user by the best weights of a candidate that trains alone for so many epochs."""
    trainer = Trainer(data, config.model, config.train)
    for _ in range(epochs):
        trainer.run_epoch(cascade=False)
        trainer.progress.compare(trainer.validate(("dot",))["dot_ndcg10"])
    trainer.progress.restore_best()
    return held_out_gains(trainer.model, data, 0)


def epoch_in(folder: Path) -> int:
    """Epochs of the checkpoint that a search hands over."""
    return int(torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"])


class Killed(BaseException):
    """Ends a process as SIGKILL does: nothing but `checkpoint.alone` handles it."""


def kill(patch: pytest.MonkeyPatch, clock: Clock, epochs: int) -> None:
    """End the process after so many epochs, when the state is saved and the checkpoint is not."""
    save = Trainer.save

    def killed(trainer: Trainer, path: Path) -> None:
        if clock.epochs == epochs:
            raise Killed
        save(trainer, path)

    patch.setattr(Trainer, "save", killed)


def state_in(folder: Path) -> State:
    state = read_state(folder)
    assert state is not None
    return state


@pytest.fixture(scope="module")
def whole(loaded: tuple[Data, Config], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A search that is not stopped, and its result."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        Clock(patch)
        patch.setattr(search_module, "plot", plot)
        return folder, search(*loaded, folder, BUDGET)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5m", 90), (" 5s ", 5)])
def test_duration_has_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("45", "needs a unit: 45s, 45m or 45h"),
        ("0m", "above 0"),
        ("0", "above 0"),
        ("-5m", "such as 90s, 30m or 2h"),
        ("soon", "such as 90s"),
        ("1e3s", "such as 90s"),
        ("", "such as 90s"),
    ],
)
def test_bad_duration_is_one_line(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "missing.toml", f"--search={text}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"slatewise train: error: --search {text.strip()}") and message in error
    assert error.count("\n") == 1


def test_stated_keys_are_never_changed(loaded: tuple[Data, Config]) -> None:
    stated = frozenset({"train.learning_rate", "model.width", "train.negatives"})
    config = dataclasses.replace(loaded[1], stated=stated)
    drawn = draw(config, 60)
    assert len(drawn) == 60 and drawn[0] == {}
    assert not {key for values in drawn for key in values} & stated
    assert {key for values in drawn for key in values} == SPACE.keys() - stated
    for values in drawn:
        found = with_values(config, values)
        assert all(value_of(found, key) == value_of(config, key) for key in stated)


def test_drawn_sizes_fit_each_other(loaded: tuple[Data, Config]) -> None:
    model = ModelConfig("ligr", loaded[1].model.shape | {"width": 12, "attention_heads": 6})
    config = dataclasses.replace(loaded[1], model=model)
    widths = {with_values(config, values).model.shape["width"] for values in draw(config, 80)}
    assert widths == {12, 24}, "a width of 6 gives keys of odd size"


def test_longer_draw_begins_with_the_shorter_one(loaded: tuple[Data, Config]) -> None:
    config = loaded[1]
    assert draw(config, 20)[:7] == draw(config, 7)
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    assert draw(other, 7)[1:] != draw(config, 7)[1:]


def test_few_possible_values_give_few_candidates(loaded: tuple[Data, Config]) -> None:
    config = dataclasses.replace(loaded[1], stated=frozenset(SPACE.keys() - {"model.blocks"}))
    assert len(draw(config, 50)) == 3, "one, two or three blocks"


def test_nothing_to_search_is_refused(loaded: tuple[Data, Config], tmp_path: Path) -> None:
    config = dataclasses.replace(loaded[1], stated=frozenset(SPACE))
    with pytest.raises(ValueError, match=r"nothing to search.*learning_rate.*leave out --search"):
        search(loaded[0], config, tmp_path, 10)


@given(epochs=st.integers(1, 400), every=st.integers(1, 9), affordable=st.floats(0.1, 20_000))
def test_plan_fits_its_time(epochs: int, every: int, affordable: float) -> None:
    rungs = rungs_of(epochs, every)
    assert rungs == sorted(set(rungs)) and rungs[0] >= 1 and rungs[-1] == epochs
    assert all(rung % every == 0 for rung in rungs[:-1])
    others, used = plan(rungs, affordable)
    assert set(used) <= set(rungs)
    assert not others or cost(others, used) <= affordable
    assert len(used) == 1 or math.ceil(others / KEPT ** (len(used) - 1)) >= 2


def test_more_time_gives_more_candidates_or_longer_rungs() -> None:
    rungs = rungs_of(192, 4)
    assert rungs == [8, 24, 64, 192]
    plans = [plan(rungs, affordable) for affordable in (9, 150, 600, 2_000)]
    assert plans[0] == (0, [8])
    assert [used for _, used in plans[1:]] == [[8, 24], [8, 24, 64], [8, 24, 64, 192]]
    assert cost(6, [8, 24]) == 24 + COST * (6 * 8 + 2 * 16)


def test_search_finds_values_within_its_budget(whole: tuple[Path, Config], loaded: tuple[Data, Config]) -> None:
    folder, config = whole
    state = state_in(folder)
    assert state.spent == sum(len(candidate.rows) for candidate in state.candidates) <= BUDGET
    assert state.closed and len(state.candidates) > 5
    best = next(candidate for candidate in state.candidates if candidate.values == state.chosen)
    assert best.score(math.inf) > state.candidates[0].score(math.inf), "the default rate is low for so small a table"
    assert config == with_values(loaded[1], best.values) != loaded[1]
    assert [value_of(config, key) for key in loaded[1].stated if key in SPACE] == [
        value_of(loaded[1], key) for key in loaded[1].stated if key in SPACE
    ]
    depth = [len(candidate.rows) for candidate in state.candidates if not candidate.stopped]
    assert set(depth) == set(state.rungs) and depth.count(state.rungs[0]) > depth.count(state.rungs[-1])
    assert (folder / "search" / "search.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.rglob("*.pt")) == ["checkpoint.pt"], "of the best candidate alone"


KILLED = """
import os, signal, sys
from pathlib import Path
import pytest, torch
sys.path.insert(0, sys.argv[4])
from slatewise_train.config import read_config
from slatewise_train.loading import load_for_training
from slatewise_train.search import search
from slatewise_train.train import Trainer
from tests.train.test_search import Clock

clock = Clock(pytest.MonkeyPatch())
save = Trainer.save
def killed(trainer, path):
    if clock.epochs == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)  # after the state, before the checkpoint
    save(trainer, path)
Trainer.save = killed
search(*load_for_training(read_config(Path(sys.argv[1]))), Path(sys.argv[2]), 64.0)
"""


def test_killed_search_continues_to_the_same_result(
    toml: Path, loaded: tuple[Data, Config], whole: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = sum(len(candidate["rows"]) for candidate in compared(whole[0]))
    rung = state_in(whole[0]).rungs[0]
    assert spent > 3 * rung
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", KILLED, str(toml), str(tmp_path), str(spent - 2), root]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert state_in(tmp_path).chosen is None
    Clock(monkeypatch)
    config = search(*loaded, tmp_path, BUDGET + 1)  # one epoch was not saved
    assert config == whole[1]
    assert compared(tmp_path) == compared(whole[0])


@pytest.mark.parametrize("rung", [0, 1])
@pytest.mark.parametrize("trained", [1, 2, 3])
def test_kill_between_state_and_checkpoint_changes_nothing(
    rung: int,
    trained: int,
    loaded: tuple[Data, Config],
    whole: tuple[Path, Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process ends after the last epoch of each finalist, or of the first candidates of the first rung."""
    clock = Clock(monkeypatch)
    state = state_in(whole[0])
    first, second = state.rungs
    epochs = trained * first
    if rung:
        finalists = [candidate for candidate in state.candidates if len(candidate.rows) > first]
        assert len(finalists) >= 3 and {len(candidate.rows) for candidate in finalists[:3]} == {second}
        epochs = len(state.candidates) * first + trained * (second - first)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, clock, epochs)
        search(*loaded, tmp_path, BUDGET)
    assert search(*loaded, tmp_path, BUDGET + 1) == whole[1]
    assert compared(tmp_path) == compared(whole[0])
    assert epoch_in(tmp_path) == epoch_in(whole[0])


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_killed_search_of_one_rung_repeats_the_epoch(
    epochs: int, loaded: tuple[Data, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    train = dataclasses.replace(loaded[1].train, epochs=3, cascade_epochs=2)
    config = dataclasses.replace(loaded[1], train=train)
    found = search(loaded[0], config, tmp_path / "whole", 5)
    assert state_in(tmp_path / "whole").rungs == [1] and clock.epochs > 3
    clock.epochs = 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, clock, epochs)
        search(loaded[0], config, tmp_path / "killed", 5)
    assert search(loaded[0], config, tmp_path / "killed", 6) == found
    assert compared(tmp_path / "killed") == compared(tmp_path / "whole")
    assert epoch_in(tmp_path / "killed") == epoch_in(tmp_path / "whole") == 1


@pytest.mark.parametrize("stop", [1, 30])
def test_interrupted_search_continues_with_the_rest_of_its_time(
    stop: int, loaded: tuple[Data, Config], whole: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    run_epoch = Trainer.run_epoch

    def interrupted(trainer: Trainer, cascade: bool) -> float:
        if clock.epochs == stop:
            raise KeyboardInterrupt
        return run_epoch(trainer, cascade)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "run_epoch", interrupted)
        search(*loaded, tmp_path, BUDGET)
    assert search(*loaded, tmp_path, BUDGET) == whole[1]
    assert compared(tmp_path) == compared(whole[0])
    assert clock.epochs == sum(len(candidate["rows"]) for candidate in compared(whole[0])), "no epoch is repeated"


def test_time_that_ends_in_a_rung_compares_equal_epochs(
    loaded: tuple[Data, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(
        monkeypatch, lambda trainer: 1.0 if trainer.epoch < 4 else 3.0
    )  # later epochs are slower than planned
    given: list[tuple[np.ndarray, np.ndarray, int]] = []
    monkeypatch.setattr(search_module, "clearly_better", lambda *gains: not given.append(gains))
    search(*loaded, tmp_path, BUDGET)
    state = state_in(tmp_path)
    assert BUDGET <= clock.now < BUDGET + 3 and state.spent == clock.now, "kept within one epoch"
    first, second = state.rungs
    assert state.closed and all(candidate.reached >= first for candidate in state.candidates)
    others = sorted(state.candidates[1:], key=lambda candidate: -candidate.score(first))
    racing = [state.candidates[0], *others[: math.ceil(len(others) / KEPT)]]
    assert {len(candidate.rows) for candidate in others[len(racing) - 1 :]} == {first}
    common = min(candidate.reached for candidate in racing)
    assert common < second, "the time ended in the second rung"
    assert max(racing, key=lambda candidate: candidate.score(common)).values == state.chosen
    assert state.chosen and len(state.candidates[0].rows) == second, "the defaults are ahead of the others"
    ((gains, defaults, others),) = given
    np.testing.assert_array_equal(gains, gains_after(loaded[0], with_values(loaded[1], state.chosen), first))
    np.testing.assert_array_equal(defaults, gains_after(*loaded, first))
    assert others == len(state.candidates) - 1
    assert not list(tmp_path.rglob("*.npy"))


def test_time_that_ends_in_the_first_epochs_keeps_the_defaults(
    loaded: tuple[Data, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Clock(monkeypatch)
    assert search(*loaded, tmp_path, 1.0) == loaded[1]
    assert state_in(tmp_path).chosen == {}
    assert "no candidate of 1 is better than the defaults" in capsys.readouterr().out


def test_defaults_stay_unless_they_are_clearly_beaten(
    loaded: tuple[Data, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Clock(monkeypatch)
    monkeypatch.setattr(search_module, "clearly_better", lambda *_: False)
    assert search(*loaded, tmp_path, BUDGET) == loaded[1]
    assert state_in(tmp_path).chosen == {}
    assert "the defaults stay: candidate" in capsys.readouterr().out


def test_more_candidates_must_beat_the_defaults_by_more() -> None:
    """One of twenty searches over candidates that equal the defaults replaces them, however many there are."""
    rng = np.random.default_rng(0)
    replaced = {}
    for others in (1, 30):
        hits = rng.random((400, others + 1, 500)) < 0.12  # (searches, candidates, users)
        gains = hits * rng.choice(1 / np.log2(np.arange(2, 12)), hits.shape)
        best = 1 + gains[:, 1:].mean(2).argmax(1)
        replaced[others] = np.mean(
            [clearly_better(one[row], one[0], others) for one, row in zip(gains, best, strict=True)]
        )
    assert 0.01 < replaced[1] < 0.1 and replaced[30] < 0.1
    difference = np.array([0.5, 0.1, 0.4, 0.2, 0.0, 0.1])  # 2.7 standard errors: 1.6 suffice for one, 3.0 for 40
    assert clearly_better(difference, np.zeros(6), 1) and not clearly_better(difference, np.zeros(6), 40)
    assert not clearly_better(np.ones(1), np.zeros(1), 1), "one user shows no noise"
    assert not clearly_better(np.zeros(0), np.zeros(0), 1)


@pytest.mark.parametrize("defaults", [False, True])
def test_search_survives_candidates_that_diverge(
    defaults: bool, loaded: tuple[Data, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    base, run_epoch = loaded[1].train, Trainer.run_epoch

    def diverging(trainer: Trainer, cascade: bool) -> float:
        loss = run_epoch(trainer, cascade)
        if (trainer.config == base) is defaults and trainer.epoch == 2:
            with torch.no_grad():
                trainer.model.get_parameter("item.weight").fill_(torch.nan)
        return loss

    monkeypatch.setattr(Trainer, "run_epoch", diverging)
    monkeypatch.setattr(search_module, "clearly_better", lambda *_: False)
    search(*loaded, tmp_path, BUDGET)
    state = state_in(tmp_path)
    assert bool(state.chosen) is defaults, "defaults that diverged are beaten without a comparison"
    assert epoch_in(tmp_path) == state.rungs[-1]
    for candidate in state.candidates:
        lost = (with_values(loaded[1], candidate.values).train == base) is defaults
        assert candidate.diverged is (lost and len(candidate.rows) >= 2)
        assert not candidate.diverged or candidate.values != state.chosen
    assert any(candidate.diverged for candidate in state.candidates)


def test_late_divergence_is_the_same_after_a_stop(
    loaded: tuple[Data, Config], whole: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    state = state_in(whole[0])
    first = state.rungs[0]
    lost = with_values(loaded[1], state.chosen or {})
    run_epoch = Trainer.run_epoch

    def diverging(trainer: Trainer, cascade: bool) -> float:
        loss = run_epoch(trainer, cascade)
        shape = Trainer(loaded[0], lost.model, lost.train).model.config
        if trainer.config == lost.train and trainer.model.config == shape and trainer.epoch == first + 1:
            with torch.no_grad():
                trainer.model.get_parameter("item.weight").fill_(torch.nan)
        return loss

    monkeypatch.setattr(Trainer, "run_epoch", diverging)
    config = search(*loaded, tmp_path / "whole", BUDGET)
    assert config != lost
    diverged = [candidate for candidate in state_in(tmp_path / "whole").candidates if candidate.diverged]
    assert [candidate.values for candidate in diverged] == [state.chosen]
    spent, clock.epochs = clock.epochs, 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, clock, spent - 1)
        search(*loaded, tmp_path / "killed", BUDGET)
    assert search(*loaded, tmp_path / "killed", BUDGET + 1) == config
    assert compared(tmp_path / "killed") == compared(tmp_path / "whole")
    assert clock.epochs == spent + 1, "one epoch is repeated, and no other candidate joins the last rung"


def test_training_after_the_search_is_as_from_its_start(
    toml: Path,
    whole: tuple[Path, Config],
    loaded: tuple[Data, Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The other commands read the found values too: their checkpoint has another shape than the defaults'."""
    folder, config = whole
    state = state_in(folder)
    begun = next(len(candidate.rows) for candidate in state.candidates if candidate.values == state.chosen)
    monkeypatch.setattr(training_log, "plot_training", lambda log: None)  # slower than an epoch
    clock = Clock(monkeypatch)
    assert cli.main(["train", str(toml), "--folder", str(folder), "--search", "9m"]) == 0
    assert capsys.readouterr().out.count("found by the search in") == 1
    trainer, found, _ = load_trainer(toml, folder)
    assert found.data == trainer.data.config, "export writes what was chosen, such as history_length"
    assert found.train == config.train and found.model == config.model
    assert clock.epochs == trainer.progress.epoch - begun > 0, "the search is not repeated, and its epochs count"
    other = train(loaded[0], config.model, config.train, tmp_path)
    assert other.progress.best is not None and trainer.progress.best is not None
    assert other.progress.best["score"] == trainer.progress.best["score"]
    for name, value in state_of(other).items():
        torch.testing.assert_close(state_of(trainer)[name], value, rtol=0, atol=1e-6, equal_nan=True)
    assert [row["loss"] for row in rows_of(folder)] == [row["loss"] for row in rows_of(tmp_path)]
    assert cli.main(["export", str(toml), "--folder", str(folder), "--root", str(tmp_path), "--force"]) == 0
    assert load_bundle(tmp_path / "shop" / "1").name == "shop"
    sources: list[Source] = []
    monkeypatch.setattr(compress, "compress", lambda source, *_: sources.append(source))
    assert cli.main(["compress", str(tmp_path / "shop"), str(toml), "--folder", str(folder)]) == 0
    assert sources[0].trainer().config == found.train


def test_values_stated_after_the_search_win(
    whole: tuple[Path, Config], loaded: tuple[Data, Config], capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = state_in(whole[0]).chosen
    assert chosen
    assert apply_found(loaded[1], whole[0]) == whole[1]
    assert "found by the search in" in capsys.readouterr().out
    config = dataclasses.replace(loaded[1], stated=loaded[1].stated | chosen.keys())
    assert apply_found(config, whole[0]) == config


def test_unfinished_search_is_not_used(loaded: tuple[Data, Config], tmp_path: Path) -> None:
    assert apply_found(loaded[1], tmp_path) == loaded[1]
    State("x", 9.0).save(tmp_path / "search" / "search.json")
    assert apply_found(loaded[1], tmp_path) == loaded[1]


def test_search_that_continues_does_not_ask_for_search(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    State("another", 9.0).save(tmp_path / "search" / "search.json")
    assert cli.main(["train", str(toml), "--folder", str(tmp_path), "--search", "9s"]) == 1
    captured = capsys.readouterr()
    assert "--search continues it" not in captured.out and "belongs to other data" in captured.err


def test_found_values_that_do_not_fit_the_toml_are_named(
    toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(toml.read_text().replace("attention_heads = 4", "attention_heads = 3"))
    State("x", 9.0, chosen={"model.width": 64}).save(tmp_path / "search" / "search.json")
    for options in ([], ["--search", "9s"]):
        assert cli.main(["train", str(other), "--folder", str(tmp_path), *options]) == 1
        error = capsys.readouterr().err
        assert f"{tmp_path / 'search'} found width = 64, which does not fit the TOML" in error
        assert "remove that folder" in error and error.count("slatewise train: error") == 1


@pytest.mark.parametrize("chosen", [{"foo": 64}, {"model.foo": 64}, [64], "foo", 7])
def test_damaged_found_values_are_named(chosen: Any, loaded: tuple[Data, Config], tmp_path: Path) -> None:
    State("x", 9.0, chosen=chosen).save(tmp_path / "search" / "search.json")
    with pytest.raises(ValueError, match=r"^[^\n]*search\.json is damaged, remove [^\n]*search: [^\n]*$"):
        apply_found(loaded[1], tmp_path)


def test_found_values_are_lines_of_a_toml() -> None:
    values = {"train.learning_rate": 0.004, "model.width": 64, "train.id_dropout": 0.0}
    assert as_lines(values) == "[model]\nwidth = 64\n[train]\nlearning_rate = 0.004\nid_dropout = 0.0"


def test_folder_of_another_work_is_refused(loaded: tuple[Data, Config], tmp_path: Path) -> None:
    State("another", 9.0).save(tmp_path / "search" / "search.json")
    with pytest.raises(ValueError, match="belongs to other data or another TOML: remove it"):
        search(*loaded, tmp_path, 9)
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is a training: --search needs another --folder"):
        search(*loaded, tmp_path, 9)
    (tmp_path / "search" / "search.json").write_text("{")
    with pytest.raises(ValueError, match=r"search\.json is damaged, remove"):
        search(*loaded, tmp_path, 9)


def test_tables_without_a_measure_are_refused(loaded: tuple[Data, Config], tmp_path: Path) -> None:
    data, config = loaded
    labels = tuple(dataclasses.replace(head, kind="label") for head in config.data.heads)
    only = dataclasses.replace(config, data=dataclasses.replace(config.data, heads=labels))
    with pytest.raises(ValueError, match="needs a head of kind next"):
        search(data, only, tmp_path, 9)
    users = dataclasses.replace(data.split, next_users=data.split.next_users[:0])
    with pytest.raises(ValueError, match="validation_users above 0"):
        search(dataclasses.replace(data, split=users), config, tmp_path, 9)
    short = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=2, cascade_epochs=2))
    with pytest.raises(ValueError, match=r"epochs = 2 has none: state more \[train\] epochs"):
        search(data, short, tmp_path, 9)
