"""Search better values for the keys that a TOML leaves out: slatewise train --search 30m my.toml

Candidate 0 has the values of `defaults.py`; each other one changes some of them at random. Successive halving (Jamieson
and Talwalkar, AISTATS 2016) trains all candidates for a few epochs, keeps the best third, trains these for longer, and
so on. Candidates compare by NDCG@10 of the exit `dot` on the validation users at equal epochs. The defaults stay to the
end, and another candidate must beat them by more than the noise of these users, the more so the more candidates there
were: the best of many looks better than it is.

A candidate trains as `train` does before its last epochs. The training of the best one therefore continues from its
checkpoint, and gives the same weights as from its start. `FOLDER/search/` has `search.json`, `search.png` and a
folder for each candidate in the race; a stopped search continues after the last whole epoch.

Called by: `train_command.py`, `loading.py`. Calls: `search_space.py`, `search_state.py`, `train.py`, `checkpoint.py`,
`evaluation/held_out.py`, `evaluation/report.py`.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import NormalDist
from time import perf_counter
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from slatewise_train import checkpoint
from slatewise_train.config import Config
from slatewise_train.data import Data
from slatewise_train.evaluation.held_out import held_out_gains
from slatewise_train.evaluation.report import save_figure
from slatewise_train.search_space import (
    COST,
    MOST_CANDIDATES,
    as_lines,
    cost,
    described,
    draw,
    plan,
    rungs_of,
    stays,
    with_values,
)
from slatewise_train.search_state import Candidate, State, read_state
from slatewise_train.train import CHECKPOINT, CPU, Trainer

CHANCE = 0.05  # that a search over candidates which equal the defaults replaces them


def apply_found(config: Config, folder: Path) -> Config:
    """Return the config with the values of the finished search in a training's folder, and print them.

    Values in the TOML stay. Without a finished search the config is returned as it is. Raises ValueError for values
    that do not fit those in the TOML.
    """
    state = read_state(folder)
    if state is None:
        return config
    if state.chosen is None:
        print(f"{folder / 'search'} is not finished and not used; only --search continues it", flush=True)
        return config
    values = {key: value for key, value in state.chosen.items() if key not in config.stated}
    try:
        changed = with_values(config, values)
    except ValueError as error:
        raise ValueError(
            f"{folder / 'search'} found {described(values)}, which does not fit the TOML: {error}; change the TOML, or "
            "remove that folder to train without these values"
        ) from None
    print(f"found by the search in {folder / 'search'}: {described(values)}", flush=True)
    return changed


def search(data: Data, config: Config, folder: Path, seconds: float, device: torch.device = CPU) -> Config:
    """Search for the given time, and return the config with the best values.

    The time is kept within one epoch and does not include the full training that follows. A finished search in the
    folder is not repeated. Raises ValueError if nothing is to be searched or no candidate can be measured, and for a
    folder with another search, with a training, or in which another process trains.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoint.alone(folder):
        state = read_state(folder)
        if state is not None and state.chosen is not None:
            print(f"the search in {folder / 'search'} is finished; remove that folder and {CHECKPOINT} to search again")
            found = apply_found(config, folder)
            Search(data, config, folder, state, device).hand_over()
            return found
        check(data, config, folder)
        stated = sorted(key for key in config.stated if key.startswith(("model.", "train.")))
        made = Trainer(data, config.model, config.train).identity()
        identity = checkpoint.identity((made, config.model, config.train, stated))
        state = state or State(identity, seconds, candidates=[Candidate(values) for values in draw(config, 1)])
        if state.identity != identity:
            raise ValueError(
                f"{folder / 'search'} belongs to other data or another TOML: remove it or use another --folder"
            )
        state.seconds = seconds
        return Search(data, config, folder, state, device).run()


def check(data: Data, config: Config, folder: Path) -> None:
    """Raise ValueError if no search is possible."""
    if (folder / CHECKPOINT).exists():
        raise ValueError(f"{folder / CHECKPOINT} is a training: --search needs another --folder, or remove that file")
    if all(head.kind != "next" for head in config.data.heads) or not len(data.split.next_users):
        raise ValueError(
            "--search compares the next item of validation users: it needs a head of kind next, and [split] "
            "validation_users above 0; or leave out --search"
        )
    if config.train.epochs <= max(1, config.train.cascade_epochs):
        raise ValueError(
            f"--search compares the epochs before the last ones, and epochs = {config.train.epochs} has none: state "
            "more [train] epochs, or leave out --search"
        )


class Search:
    """A search that goes on from its state. Its folder is `search` in that of the training."""

    def __init__(self, data: Data, config: Config, folder: Path, state: State, device: torch.device) -> None:
        self.data, self.config, self.state, self.device = data, config, state, device
        self.training_folder, self.folder = folder, folder / "search"
        self.now = perf_counter()

    def time_left(self) -> float:
        """Count the time since the last call as spent, and return the seconds that are left."""
        before, self.now = self.now, perf_counter()
        self.state.spent += self.now - before
        return self.state.seconds - self.state.spent

    def run(self) -> Config:
        """Train the candidates rung by rung until one rung is the last or the time is up."""
        candidates = self.state.candidates
        for number in range(len(candidates)):  # of a stopped search: the last row may have no checkpoint
            if (self.folder / str(number)).exists():
                self.open(number)
        racing, epochs = self.race()
        racing = [number for number in racing if not candidates[number].diverged] or [0]
        first = max(racing, key=lambda number: (candidates[number].score(epochs), -number))
        best = first if first and (candidates[0].diverged or self.beats_defaults(first)) else 0
        self.state.chosen = candidates[best].values
        self.state.save(self.folder / "search.json")
        plot(candidates, best, self.folder / "search.png")
        score, other = (candidates[number].score(epochs) for number in (first, 0))
        defaults = "; the defaults diverged" if candidates[0].diverged else f" against {other:.4f} of the defaults"
        compared = f"NDCG@10 {score:.4f} in {min(epochs, len(candidates[first].rows))} epochs{defaults}"
        if best:
            print(f"candidate {best} of {len(candidates)} is the best, {compared}. As lines of a TOML:")
            print(as_lines(self.state.chosen), flush=True)
        elif first:
            print(f"the defaults stay: candidate {first} is best, but not clearly better, {compared}", flush=True)
        else:
            print(f"no candidate of {len(candidates)} is better than the defaults", flush=True)
        self.hand_over()
        return with_values(self.config, self.state.chosen)

    def beats_defaults(self, number: int) -> bool:
        """Return whether a candidate is clearly better than the defaults after the last rung that both have ended."""
        both = min(self.state.candidates[one].reached for one in (number, 0))
        epochs = max(rung for rung in self.state.rungs if rung <= both)
        return clearly_better(self.gains(number, epochs), self.gains(0, epochs), len(self.state.candidates) - 1)

    def gains(self, number: int, epochs: int) -> np.ndarray:
        """Return NDCG@10 of each validation user by a candidate's best weights of its first epochs: (n,).

        The first call must be at the end of the rung. It keeps them in a file, since the checkpoint goes on.
        """
        path = self.folder / str(number) / f"gains-{epochs}.npy"
        if not path.exists():
            trainer = self.open(number)
            trainer.progress.restore_best()
            unfinished = path.with_name("part.npy")
            np.save(unfinished, held_out_gains(trainer.model, self.data, trainer.next_heads[0]))
            os.replace(unfinished, path)
        return np.load(path)

    def race(self) -> tuple[list[int], float]:
        """Run the rungs. Returns the numbers of the candidates that are left, and the epochs to compare them by."""
        state = self.state
        if not state.rungs:
            last = self.config.train.epochs - max(1, self.config.train.cascade_epochs)
            rungs = rungs_of(last, self.config.train.validate_every)
            if not self.advance(0, rungs[0]):
                return [0], rungs[0]
            state.planned, state.rungs = plan(rungs, state.seconds / self.price([0]))
            print(f"search: about {1 + state.planned} candidates, compared after the epochs {state.rungs}")
        racing: list[int] = []
        for rung, epochs in enumerate(state.rungs):
            done: list[int] = []
            for number in racing if rung else self.entrants():
                if not self.advance(number, epochs):
                    return self.in_time(rung, racing, done)
                done.append(number)
                if rung == 0:  # most candidates of a large first rung need no checkpoint for long
                    self.drop(set(done) - set(self.best_of(done, rung)))
            racing = self.best_of(done, rung)
            self.drop(set(done) - set(racing))
            plot(state.candidates, None, self.folder / "search.png")
            if len(racing) == 1:
                return racing, epochs
            for number in racing:
                if not state.candidates[number].diverged:
                    self.gains(number, epochs)
        return racing, state.rungs[-1]

    def entrants(self) -> Iterator[int]:
        """Yield the candidates of the first rung: new ones as long as enough time is left for the later rungs."""
        candidates, rungs = self.state.candidates, self.state.rungs
        for number, values in enumerate(draw(self.config, MOST_CANDIDATES)):
            if number == len(candidates):
                default, other = self.price([0]), self.price(range(1, number)) or COST * self.price([0])
                # The time of the plan, less that of the candidates before this one.
                needed = default * cost(number, rungs, other / default) - (default + (number - 1) * other) * rungs[0]
                if self.state.closed or self.time_left() < needed:
                    break
                candidates.append(Candidate(values))
            yield number
        self.state.closed = True

    def price(self, numbers: Iterable[int]) -> float:
        """Return the mean seconds of an epoch of some candidates; 0 without epochs."""
        seconds = [row["seconds"] for number in numbers for row in self.state.candidates[number].rows]
        return sum(seconds) / len(seconds) if seconds else 0.0

    def in_time(self, rung: int, racing: list[int], done: list[int]) -> tuple[list[int], float]:
        """Return the candidates to compare, and by how many epochs, if the time is up in a rung.

        A candidate that began the first rung and did not end it is left out.
        """
        compared = (done or [0]) if rung == 0 else racing
        return compared, min(self.state.candidates[number].reached for number in compared)

    def best_of(self, numbers: Iterable[int], rung: int) -> list[int]:
        """Return the candidates that stay after a rung: the defaults, and the best of the others."""
        state = self.state
        others = [number for number in numbers if number and not state.candidates[number].failed(state.rungs[rung])]
        others.sort(key=lambda number: -state.candidates[number].score(state.rungs[rung]))
        count = len(state.candidates) - 1
        if not state.closed:  # the first rung may take more candidates than planned, and then more of them stay
            count = 2 * max(state.planned, count)
        return [0, *sorted(others[: stays(count, rung + 1)])]

    def drop(self, numbers: Iterable[int]) -> None:
        """Remove the checkpoints of candidates that cannot win."""
        for number in numbers:
            shutil.rmtree(self.folder / str(number), ignore_errors=True)

    def open(self, number: int) -> Trainer:
        """Return the trainer of a candidate, after its last whole epoch."""
        candidate = self.state.candidates[number]
        config = with_values(self.config, candidate.values)
        trainer = Trainer(self.data, config.model, config.train, self.device)
        if (self.folder / str(number) / CHECKPOINT).exists():
            trainer.load(self.folder / str(number) / CHECKPOINT)
        if len(candidate.rows) > trainer.epoch:  # an epoch that was not saved is repeated
            candidate.rows = candidate.rows[: trainer.epoch]
            candidate.diverged, candidate.stopped = False, trainer.progress.stopped
        return trainer

    def advance(self, number: int, epochs: int) -> bool:
        """Train a candidate up to an epoch, or until it ends by itself. Returns False if the time is up before."""
        candidate = self.state.candidates[number]
        if candidate.reached >= epochs:
            return True
        trainer = self.open(number)
        while candidate.reached < epochs:
            if self.time_left() <= 0:
                return False
            self.run_epoch(trainer, candidate, epochs)
            # The checkpoint last: if the process ends before it is written, the epoch is repeated, see `run`.
            (self.folder / str(number)).mkdir(parents=True, exist_ok=True)
            left = self.time_left()
            self.state.save(self.folder / "search.json")
            trainer.save(self.folder / str(number) / CHECKPOINT)
        score = "diverged" if candidate.diverged else f"NDCG@10 {candidate.score(epochs):.4f}"
        print(
            f"search: candidate {number} ({described(candidate.values)}): epoch {len(candidate.rows)}, {score}, "
            f"{max(0.0, left) / 60:.1f} minutes left",
            flush=True,
        )
        return True

    def run_epoch(self, trainer: Trainer, candidate: Candidate, epochs: int) -> None:
        """Train a candidate for one epoch as `train` does before the last epochs, and add a row to its log.

        The end of a rung is validated too. Only the validations of `train` count for its patience.
        """
        begin = perf_counter()
        loss = trainer.run_epoch(cascade=False)
        row: dict[str, Any] = {"epoch": trainer.epoch, "loss": round(loss, 4) if math.isfinite(loss) else None}
        # Weights that are not numbers would rank every item first.
        finite = math.isfinite(loss) and all(bool(value.isfinite().all()) for value in trainer.model.parameters())
        due = trainer.epoch % self.config.train.validate_every == 0
        if finite and (due or trainer.epoch == epochs):
            found = trainer.validate(("dot",))
            row |= {name: round(value, 6) for name, value in found.items()}
            if due:
                trainer.progress.compare(found["dot_ndcg10"])
        candidate.rows.append(row | {"seconds": round(perf_counter() - begin, 6)})
        candidate.diverged = not finite
        candidate.stopped = trainer.progress.stopped

    def hand_over(self) -> None:
        """Give the training the checkpoint of the chosen candidate with its log, and remove those of the search."""
        for number, candidate in enumerate(self.state.candidates):
            chosen = candidate.values == self.state.chosen and not candidate.diverged
            if chosen and (self.folder / str(number)).exists() and not (self.training_folder / CHECKPOINT).exists():
                trainer = self.open(number)
                rounded = [{name: round(value, 4) for name, value in row.items()} for row in candidate.rows]
                trainer.rows = [row | {"seconds": round(row["seconds"], 1)} for row in rounded]
                trainer.save(self.training_folder / CHECKPOINT)
        self.drop(range(len(self.state.candidates)))


def clearly_better(gains: np.ndarray, defaults: np.ndarray, others: int) -> bool:
    """Return whether the best of several candidates beats the defaults by more than the noise of the users.

    gains, defaults: (n,) NDCG@10 of the same users; others: number of candidates without the defaults. The level of the
    one-sided paired test is divided by it (Bonferroni). Fewer than two users show no noise, and the defaults stay.
    """
    if len(gains) < 2:
        return False
    difference = gains - defaults
    errors = NormalDist().inv_cdf(1 - CHANCE / max(1, others))
    return bool(difference.mean() > errors * difference.std(ddof=1) / len(difference) ** 0.5)


def plot(candidates: list[Candidate], best: int | None, path: Path) -> None:
    """Plot NDCG@10 over the epochs, a line for each candidate; the defaults and the best one are thick."""
    figure = Figure(figsize=(8, 5))
    axis = figure.subplots()
    for number, candidate in enumerate(candidates):
        rows = [row for row in candidate.rows if "dot_ndcg10" in row]
        points = [row["epoch"] for row in rows], [row["dot_ndcg10"] for row in rows]
        style: dict[str, Any] = {"color": "0.75", "linewidth": 1}
        if number in (0, best):
            name = f"candidate {number}: {described(candidate.values)}" if number else "the defaults"
            name += " (best)" if number == best else ""
            style = {"color": "C1" if number == best else "C0", "linewidth": 2.5, "zorder": 3, "label": name}
        axis.plot(*points, marker=".", **style)
    axis.set(xlabel="epoch", ylabel="NDCG@10, validation users, full catalogue", ylim=(0, None))
    axis.set_title(f"{len(candidates)} candidates")
    axis.legend(fontsize="x-small")
    save_figure(figure, path, dpi=110)
