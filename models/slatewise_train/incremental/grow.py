"""Rebuild the model of a bundle for training, with rows for new items, field values and actions.

A bundle has the fields folded into the item table, and beside it the vectors of the field values. So the id row of an
item is its vector less that of its fields. Old names keep their rows, and new ones follow:

    item           the id row of the unknown item: its vector follows from its fields alone
    field value    the row of a missing value
    action         the row of the unknown action

An item whose fields have changed keeps its vector. Columns and heads cannot be added: the layers that read them have
weights for those of the training only.

Called by: `update_command.py`. Calls: `rankers/weights.py`, `rankers/families.py`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from slatewise.bundle.manifest import Manifest
from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ACTION, UNKNOWN_ITEM
from slatewise_train.config import DataConfig
from slatewise_train.data import Catalogue, TrainingVocabulary
from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerModel
from slatewise_train.rankers.weights import ITEM_TABLE, load_model

ACTION_TABLE = "action.weight"


def vocabulary_of(folder: Path, manifest: Manifest) -> TrainingVocabulary:
    """Return the names of a bundle in the order of their rows."""
    ids = json.loads((folder / "ids.json").read_text())
    return TrainingVocabulary(ids, manifest.actions, {name: column.values for name, column in manifest.fields.items()})


def check_columns(manifest: Manifest, config: DataConfig) -> None:
    """Raise ValueError if the TOML has other heads or columns than the bundle."""
    pairs = {
        "heads": (list(manifest.heads), [head.name for head in config.heads]),
        "[items] numeric": (manifest.features, list(config.numeric)),
        "[items] categorical": (
            [n for n, field in manifest.fields.items() if not field.text],
            list(config.categorical),
        ),
        "[items] text": ([n for n, field in manifest.fields.items() if field.text], list(config.text)),
    }
    for name, (old, new) in pairs.items():
        if old != new:
            raise ValueError(
                f"version {manifest.version} has {name} {', '.join(old) or 'none'}, "
                f"the TOML {', '.join(new) or 'none'}: an update cannot change them; "
                "train the ranker anew with `slatewise train`"
            )


@torch.no_grad()
def grown_model(folder: Path, manifest: Manifest, catalogue: Catalogue) -> RankerModel:
    """Return the ranker of a bundle as a model to train, for a catalogue that begins with the bundle's vocabulary.

    Scores of old items are those of the bundle, up to rounding. Raises ManifestError as `weights.load_model` does.
    """
    served = load_model(folder, manifest)
    vocabulary = catalogue.vocabulary
    config = dataclasses.replace(
        served.config,
        items=len(vocabulary.items) + FIRST_ITEM,
        actions=len(vocabulary.actions) + 1,
        fields={name: len(values) + 1 for name, values in vocabulary.fields.items()},
    )
    columns = families.ItemColumns(
        {name: torch.from_numpy(values) for name, values in catalogue.field_values.items()},
        served.numeric_mean.clone(),
        served.numeric_std.clone(),
    )
    model = families.build(served.family, config, columns).eval()
    weights = served.state_dict()
    items = weights.pop(ITEM_TABLE)
    actions = weights.pop(ACTION_TABLE)
    model.load_state_dict(weights, strict=False)  # items, actions and fields follow
    fill(model.get_parameter(ACTION_TABLE), actions, UNKNOWN_ACTION)
    vectors = np.load(folder / "fields.npy", allow_pickle=False)
    for name, column in manifest.fields.items():
        rows = vectors[column.offset : column.offset + len(column.values) + 1]
        fill(model.field_table(name), torch.from_numpy(rows), 0)
    ids = model.get_parameter(ITEM_TABLE)
    ids.zero_()
    fill(ids, items - model.item_table()[: len(items)], UNKNOWN_ITEM)
    return model


def fill(table: torch.Tensor, rows: torch.Tensor, unknown: int) -> None:
    """Copy rows to the beginning of a table. The rows after them get the values of the row `unknown`."""
    table[: len(rows)] = rows
    table[len(rows) :] = rows[unknown]
