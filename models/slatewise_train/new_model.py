"""Build a new ranker for a catalogue, with random weights.

Called by: `train.py`, and the tests. Calls: `rankers/families.py`.
"""

from __future__ import annotations

import numpy as np
import torch

from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.config import DataConfig, ModelConfig
from slatewise_train.data import Catalogue
from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerModel


def build_model(catalogue: Catalogue, config: DataConfig, model: ModelConfig) -> RankerModel:
    """Build a new ranker for a catalogue. Raises ValueError if `[model]` is not a valid config of its family."""
    known = np.ma.masked_invalid(catalogue.numeric[FIRST_ITEM:])
    # A column without any number has no moments: mean 0, and the least standard deviation.
    mean, std = (np.ma.filled(moment, 0.0) for moment in (known.mean(axis=0), known.std(axis=0)))
    sized = model.sized(
        items=len(catalogue.vocabulary.items) + FIRST_ITEM,
        actions=len(catalogue.vocabulary.actions) + 1,
        fields={name: len(values) + 1 for name, values in catalogue.vocabulary.fields.items()},
        numeric=len(config.numeric),
        heads=len(config.heads),
    )
    columns = families.ItemColumns(
        {name: torch.from_numpy(values) for name, values in catalogue.field_values.items()},
        torch.tensor(mean, dtype=torch.float32),
        torch.tensor(np.maximum(std, 1e-3), dtype=torch.float32),
    )
    return families.build(model.family, sized, columns)


@torch.no_grad()
def scale_embeddings(model: RankerModel, std: float) -> None:
    """Give new embeddings, which have a standard deviation of 1 / sqrt(width), another one."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight.mul_(std * module.embedding_dim**0.5)
