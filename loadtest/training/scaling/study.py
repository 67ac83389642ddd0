"""Train and measure the runs of the scaling study, one after the other, with the trainer of `slatewise train`.

Called by: `__main__.py`. Calls: `runs.py`, `flops.py`, `ungated.py`, `report.py`, `slatewise_train`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loadtest.training.scaling.flops import epoch_flops, request_flops
from loadtest.training.scaling.report import EXITS, write_report
from loadtest.training.scaling.runs import Row, Run, add_row, read_rows
from loadtest.training.scaling.ungated import remove_gates
from slatewise.process import cpu_name
from slatewise_train import checkpoint
from slatewise_train.config import Config, ModelConfig, TrainConfig
from slatewise_train.data import Data, load_data
from slatewise_train.devices import describe
from slatewise_train.evaluation.held_out import held_out_ranks
from slatewise_train.evaluation.metrics import gains
from slatewise_train.evaluation.sampling import held_out_users
from slatewise_train.new_model import build_model, scale_embeddings
from slatewise_train.rankers.ligr import Ligr
from slatewise_train.time_left import words
from slatewise_train.train import CHECKPOINT, Trainer, train, train_epoch

RESULTS = "results.jsonl"
SETTINGS = "settings.txt"  # digest of the settings that all runs of a folder share


@dataclass(frozen=True)
class Study:
    """The data and the settings that all runs share. data: by whether it has the columns of [items]."""

    data: dict[bool, Data]
    config: Config
    device: torch.device

    def data_of(self, run: Run) -> Data:
        data = self.data[run.features]
        return dataclasses.replace(data, config=dataclasses.replace(data.config, history_length=run.history))

    def settings_of(self, run: Run) -> TrainConfig:
        return dataclasses.replace(self.config.train, seed=run.seed)

    def build(self, run: Run) -> Ligr:
        """Build the new ranker of a run. It has no set-wise blocks, as no measured exit reads them.

        Raises ValueError for another family than LiGR, and for a size that does not fit the rest of `[model]`.
        """
        torch.manual_seed(run.seed)
        data = self.data_of(run)
        shape = self.config.model.shape | {"width": run.width, "blocks": run.blocks, "set_blocks": 0}
        model = build_model(data.catalogue, data.config, ModelConfig(self.config.model.family, shape))
        if not isinstance(model, Ligr):
            raise ValueError(f"the study trains rankers of the family ligr, not {self.config.model.family}")
        if self.config.train.embedding_std is not None:
            scale_embeddings(model, self.config.train.embedding_std)
        if not run.gates:
            remove_gates(model)
        return model

    def identity(self) -> str:
        """Return a digest of everything that the runs of one folder must share."""
        data = self.data[True]
        shape = {key: value for key, value in self.config.model.shape.items() if key not in ("width", "blocks")}
        return checkpoint.identity(
            (
                data.catalogue.vocabulary,
                data.sequences.users,
                data.split.train_lengths.tolist(),
                dataclasses.replace(data.config, history_length=1),
                shape,
                dataclasses.replace(self.config.train, seed=0),
            )
        )

    def epoch_cost(self, run: Run) -> float:
        """Return the FLOPs of an epoch of the exit `dot`."""
        config, lengths = self.build(run).config, self.data[run.features].split.train_lengths
        return epoch_flops(config, run.gates, lengths, run.history, self.config.train.negatives)


def load_study(config: Config, data: Data, epochs: int | None, device: torch.device) -> Study:
    """Read the tables once more without the columns of [items].

    config, data: of `load_for_training`. epochs: of every run, in place of the config's; the last epochs, which train
    the exit `point`, keep their share. Raises ValueError for tables without validation users or a head of kind `next`.
    """
    if not any(head.kind == "next" for head in data.config.heads) or not len(held_out_users(data)):
        raise ValueError("the study needs a head of kind next, and validation_users in [split]")
    if epochs is not None:
        settings = config.train
        last = min(epochs, -(-settings.cascade_epochs * epochs // settings.epochs))
        config = dataclasses.replace(config, train=dataclasses.replace(settings, epochs=epochs, cascade_epochs=last))
    bare = load_data(dataclasses.replace(data.config, categorical=(), numeric=()), config.tables)
    return Study({True: data, False: bare}, config, device)


def measure(study: Study, run: Run, trainer: Trainer) -> Row:
    """Return the row of a finished run: its FLOPs, and NDCG@10 and the rank of each validation user's next item."""
    data = trainer.data
    users = held_out_users(data)
    lengths = data.split.train_lengths[users]
    ranks = held_out_ranks(trainer.model, data, users, lengths, trainer.next_heads[0], EXITS)
    model = trainer.model
    assert isinstance(model, Ligr)
    return dataclasses.asdict(run) | {
        "run": run.name,
        "epochs": trainer.epoch,
        "parameters": sum(part.numel() for part in model.parameters() if part.requires_grad),
        "flops": request_flops(model.config, run.gates, run.history),
        "ndcg10": {exit: float(gains(found).mean()) for exit, found in ranks.items()},
        "ranks": {exit: found.tolist() for exit, found in ranks.items()},
        "seconds": round(sum(float(row["seconds"]) for row in trainer.rows)),
        "device": f"{cpu_name()}, {describe(study.device)}",
    }


def time_epoch(study: Study, run: Run, folder: Path) -> tuple[float, float]:
    """Train the first epoch of a run, which then continues from its checkpoint.

    Returns the seconds of an epoch of the exit `dot`, and how many times as long one of the last epochs takes.
    """
    trainer = Trainer(study.data_of(run), study.build(run), study.settings_of(run), study.device)
    if (folder / CHECKPOINT).exists():
        trainer.load(folder / CHECKPOINT)
    ratio = trainer.cascade_cost() if study.config.train.cascade_epochs else 1.0
    if not trainer.rows:
        trainer.progress.join()
        train_epoch(trainer, folder)
    joined = study.config.train.cascade_epochs >= study.config.train.epochs  # from the first epoch on
    return float(trainer.rows[0]["seconds"]) / (ratio if joined else 1.0), ratio


def print_estimate(study: Study, runs: Sequence[Run], folder: Path) -> None:
    """Time an epoch of the run with the median cost, and print how long all of these runs take at most."""
    costs = {run: study.epoch_cost(run) for run in runs}
    timed = sorted(runs, key=costs.__getitem__)[len(runs) // 2]
    seconds, ratio = time_epoch(study, timed, folder / timed.name)
    settings = study.config.train
    last = min(settings.cascade_epochs, settings.epochs)
    each = seconds * (settings.epochs - last + ratio * last) / costs[timed]
    print(
        f"an epoch of {timed.name} took {seconds:.1f} s, and one of the last {last} epochs takes {ratio:.1f} times as "
        f"long. If time follows the FLOPs, {len(runs)} runs of {settings.epochs} epochs take about "
        f"{words(each * sum(costs.values()))}",
        flush=True,
    )


def run_study(study: Study, runs: Sequence[Run], folder: Path) -> list[Row]:
    """Train the runs that the folder has no row of, and write the report after each. Returns all rows of the folder.

    Raises ValueError if the folder has a study of other tables or other settings, or if another process works in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoint.alone(folder):
        settings = folder / SETTINGS
        if settings.exists() and settings.read_text() != study.identity():
            raise ValueError(f"{folder} has a study of other tables, epochs or settings: use another --out")
        settings.write_text(study.identity())
        rows = read_rows(folder / RESULTS)
        found = {row["run"] for row in rows}
        waiting = [run for run in runs if run.name not in found]
        print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished", flush=True)
        if waiting:
            print_estimate(study, waiting, folder)
        for run in waiting:
            print(f"\n{run.name}:", flush=True)
            trainer = train(
                study.data_of(run), study.build(run), study.settings_of(run), folder / run.name, study.device
            )
            rows.append(measure(study, run, trainer))
            add_row(folder / RESULTS, rows[-1])
            write_report(rows, folder)
        write_report(rows, folder)
    return rows
