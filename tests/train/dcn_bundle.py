"""A bundle of the family `dcn`, trained on the tiny tables.

Called by: `test_dcn_served.py`, `test_dcn_update.py`. Calls: the pipeline of training.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from slatewise_train.config import ModelConfig
from slatewise_train.export import ExportOptions, export
from slatewise_train.meta.limaml import MetaTrainer
from slatewise_train.rankers.base import RankerModel
from slatewise_train.train import train
from tests.conftest import Tiny

SHAPE = {"width": 16, "cross_rank": 4, "units": 24, "calibration_buckets": 8, "meta_size": 8}


def export_dcn(tiny: Tiny, folder: Path, shape: dict[str, Any], epochs: int) -> tuple[RankerModel, Path]:
    """Train with another `[model]` alone, and export below `folder/bundles`. Returns the model and the bundle.

    The last two thirds of the epochs train the exit `point` too.
    """
    config = replace(
        tiny.config,
        model=ModelConfig("dcn", shape),
        train=replace(tiny.config.train, epochs=epochs, cascade_epochs=2 * epochs // 3),
        export=replace(tiny.config.export, default_exit=None),
    )
    trainer = train(tiny.trainer.data, config.model, config.train, folder / "train")
    learner = MetaTrainer(trainer.model, trainer.data, replace(config.meta, epochs=1)).train(folder / "meta")
    options = ExportOptions(most_users=20, force=True)
    return trainer.model, export(trainer, learner, config, folder / "bundles", 1, options)
