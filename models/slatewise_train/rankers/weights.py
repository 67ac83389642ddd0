"""Save and load the weights of a bundle's model. Export saves them; compression and the refresh job load them.

A bundle stores a model in its serving form: the fields are folded into the item table, which is items.npy and shared
with the server. Every other parameter and buffer is an array of weights.npz. The manifest names family and config.

Called by: `bundle_writer.py`, `compression/source.py`, `meta/refresh.py`, `loadtest/`. Calls: `families.py`.
"""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
import torch

from slatewise.bundle.files import check_file
from slatewise.bundle.manifest import Manifest, ManifestError, ModelDescription
from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerModel

WEIGHTS = "weights.npz"
ITEMS = "items.npy"
ITEM_TABLE = "item.weight"  # the parameter that items.npy holds


@torch.no_grad()
def serving_form(model: RankerModel) -> RankerModel:
    """Return a copy of the model with the fields folded into the item table. Logits of the same items are equal."""
    folded = families.build(model.family, dataclasses.replace(model.config, fields={}))
    weights = model.state_dict() | {ITEM_TABLE: model.item_table()}
    folded.load_state_dict({name: weights[name] for name in folded.state_dict()})
    return folded.eval()


def save_weights(folder: Path, model: RankerModel) -> ModelDescription:
    """Write items.npy and weights.npz of a model in serving form. Returns the manifest's description of the model."""
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    np.save(folder / ITEMS, arrays.pop(ITEM_TABLE))
    with (folder / WEIGHTS).open("wb") as file:
        np.savez(file, **arrays)
    return ModelDescription(family=model.family, config=dataclasses.asdict(model.config), weights=WEIGHTS)


def load_model(folder: Path, manifest: Manifest) -> RankerModel:
    """Load the model of a bundle, in serving form.

    Raises ManifestError when the bundle has format 1, a file has another digest, or the weights are those of another
    model, and ValueError for an unknown family or config.
    """
    described = manifest.model
    if described is None:
        raise ManifestError(f"{folder}: format {manifest.format} has no weights to load; export the ranker again")
    for name in (ITEMS, described.weights):
        check_file(folder, name, manifest.files.get(name, ""))
    model = families.build(described.family, described.config)
    try:
        with np.load(folder / described.weights, allow_pickle=False) as arrays:
            weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
        weights[ITEM_TABLE] = torch.from_numpy(np.load(folder / ITEMS, allow_pickle=False))
        model.load_state_dict(weights)
    except (ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ManifestError(f"{folder}: {described.weights} cannot be read: {error}") from error
    except RuntimeError as error:
        raise ManifestError(f"{folder}: {described.weights} has the weights of another model: {error}") from error
    return model.eval()
