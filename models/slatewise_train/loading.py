"""Load what a command needs of a training: the tables with the chosen values, or the finished training of a TOML.

Called by: `train_command.py`, `export.py`, `compress.py`, `meta/`. Calls: `config.py`, `data.py`, `defaults.py`,
`search.py`, `train.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from slatewise_train.config import Config, read_config
from slatewise_train.data import Data, TrainingVocabulary, load_data
from slatewise_train.defaults import choose_training
from slatewise_train.search import apply_found
from slatewise_train.train import CHECKPOINT, Trainer


def training_folder(config: Config, given: Path | None) -> Path:
    """Return the folder of a training: the one that a command was given, or build/train/NAME."""
    return given or Path("build/train") / config.data.name


def load_for_training(
    config: Config, folder: Path | None = None, known: TrainingVocabulary | None = None
) -> tuple[Data, Config]:
    """Read the tables, and choose the values that the TOML leaves out from them. Raises OSError or ValueError.

    The config that is returned has the chosen values of all tables, `[split]` included.
    folder: of the training. Values that a finished search found there replace the chosen ones. known: the names of a
    bundle, which keep their rows.
    """
    data = load_data(config.data, config.tables, config.stated, known=known)
    config = choose_training(
        dataclasses.replace(config, data=data.config),
        data.split.train_lengths,
        len(data.catalogue.vocabulary.items),
        data.exposures is not None,
    )
    return data, config if folder is None else apply_found(config, folder)


def load_trainer(toml: Path, folder: Path | None) -> tuple[Trainer, Config, Path]:
    """Load a finished training. Returns it with its config and its folder (default: build/train/NAME).

    Raises ValueError if there is no checkpoint, or if the training is not finished or has another config.
    """
    config = read_config(toml)
    folder = training_folder(config, folder)
    data, config = load_for_training(config, folder)
    trainer = Trainer(data, config.model, config.train)
    if not (folder / CHECKPOINT).exists():
        raise ValueError(
            f"{folder} has no {CHECKPOINT}: `slatewise train {toml}` comes first; --folder names another one"
        )
    trainer.load(folder / CHECKPOINT)
    if not trainer.progress.finished:
        raise ValueError(
            f"trained for {trainer.epoch} of {trainer.config.epochs} epochs: `slatewise train {toml}` continues"
        )
    return trainer, config, folder
