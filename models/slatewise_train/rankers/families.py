"""The table of ranker families. A new family is one entry of FAMILIES, a `RankerModel` and a `RankerGraphs`.

Called by: `config.py`, `defaults.py`, `search_space.py` (configs); `new_model.py`, `weights.py`, `demo/reference.py` (a
config becomes a model); `bundle_writer.py`, `export.py` and `compression/variants.py` (a model becomes graphs);
`compression/` (low-rank forms and students); `evaluation/exploration.py`. Calls: `ligr.py`, `ligr_onnx.py`,
`ligr_student.py`, `ligr_explore.py`, `dcn.py`, `dcn_onnx.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from slatewise_train.rankers import ligr_explore, ligr_student
from slatewise_train.rankers.base import Calibrations, RankerConfig, RankerGraphs, RankerModel
from slatewise_train.rankers.dcn import Dcn, DcnConfig
from slatewise_train.rankers.dcn_onnx import DcnGraphs
from slatewise_train.rankers.ligr import Ligr, LigrConfig
from slatewise_train.rankers.ligr_onnx import LigrGraphs


@dataclass(frozen=True)
class Family:
    """The classes of a family, and functions for compression and exploration.

    A function is None if the family does not support it.
    """

    config: type[RankerConfig]
    model: Callable[..., RankerModel]  # (config, field_values, numeric_mean, numeric_std), as in `ItemColumns`
    graphs: Callable[..., RankerGraphs]  # (model, calibrations, longest_history)
    dense_layers: Callable[[Any], dict[str, nn.Linear]] | None = (
        None  # (model) -> layers that low rank factors, by name
    )
    half: Callable[[Any], dict[str, int]] | None = None  # (config) -> the default shape of a student
    shrink: Callable[[Any, Mapping[str, int]], RankerModel] | None = None  # (teacher, shape) -> a student
    features: Callable[[Any, Tensor], Tensor] | None = None  # (model, hidden) -> input of the last layer of `point`
    explore: Callable[[Any, Calibrations], onnx.ModelProto] | None = None  # the graph that adds a draw to that layer


FAMILIES = {
    Ligr.family: Family(
        LigrConfig,
        Ligr,
        LigrGraphs,
        dense_layers=Ligr.dense_layers,
        half=ligr_student.half,
        shrink=ligr_student.shrink,
        features=ligr_explore.features,
        explore=ligr_explore.graph,
    ),
    Dcn.family: Family(DcnConfig, Dcn, DcnGraphs),
}
DEFAULT_FAMILY = Ligr.family  # of a TOML that does not name a family, and of the reference bundle


@dataclass(frozen=True)
class ItemColumns:
    """The items' metadata. A model stores it in buffers of its state dict."""

    field_values: dict[str, Tensor]  # categorical column -> (items, V) int64, 0 is padding or a missing value
    numeric_mean: Tensor  # (F,) float32
    numeric_std: Tensor  # (F,) float32, above 0


def find(family: str) -> Family:
    """Return a family by name. Raises ValueError for an unknown name."""
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r} of rankers; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[family]


def build(family: str, config: RankerConfig | Mapping[str, Any], columns: ItemColumns | None = None) -> RankerModel:
    """Build a model with random weights.

    config: the family's dataclass, or that dataclass as a dict (`dataclasses.asdict`, JSON). columns may be left out
    when the model has no fields, as in a bundle, which has them folded into the item table.
    Raises ValueError for an unknown family or unknown names in the config.
    """
    found = find(family)
    if isinstance(config, Mapping):
        known = {field.name for field in fields(found.config)}
        if unknown := config.keys() - known:
            raise ValueError(f"a config of the family {family!r} has no {', '.join(sorted(unknown))}")
        config = found.config(**{**config, "personal_heads": tuple(config.get("personal_heads", ()))})
    if columns is None:
        columns = ItemColumns({}, torch.zeros(config.numeric), torch.ones(config.numeric))
    if config.fields.keys() != columns.field_values.keys():
        raise ValueError(f"fields {sorted(config.fields)} need their item columns, not {sorted(columns.field_values)}")
    return found.model(config, columns.field_values, columns.numeric_mean, columns.numeric_std)


def graphs(model: RankerModel, calibrations: Calibrations, longest_history: int) -> RankerGraphs:
    """Return the exporter of a model.

    longest_history: the most positions that one call encodes, without the start token.
    """
    return find(model.family).graphs(model, calibrations, longest_history)


def dense_layers(model: RankerModel) -> dict[str, nn.Linear]:
    """Return the layers that low rank factors, by name. Raises ValueError if the family does not support low rank."""
    if (function := find(model.family).dense_layers) is None:
        raise ValueError(f"rankers of the family {model.family!r} have no low-rank form")
    return function(model)


def half(model: RankerModel) -> dict[str, int]:
    """Return the default shape of a student. Raises ValueError if the family does not support students."""
    if (function := find(model.family).half) is None:
        raise ValueError(f"rankers of the family {model.family!r} have no students")
    return function(model.config)


def shrink(teacher: RankerModel, shape: Mapping[str, int]) -> RankerModel:
    """Build a smaller ranker, the student, initialised from the teacher.

    shape: sizes of the family's config. Raises ValueError for a shape that is not possible, or if the family does not
    support students.
    """
    if (function := find(teacher.family).shrink) is None:
        raise ValueError(f"rankers of the family {teacher.family!r} have no students")
    return function(teacher, shape)


def features(model: RankerModel, hidden: Tensor) -> Tensor:
    """Return the input of the last layer of `point`: hidden states (..., d) -> (..., features).

    Raises ValueError if the family does not support exploration.
    """
    if (function := find(model.family).features) is None:
        raise ValueError(f"rankers of the family {model.family!r} do not explore")
    return function(model, hidden)


def explore(model: RankerModel, calibrations: Calibrations) -> onnx.ModelProto:
    """Build the graph that adds a draw to that layer. Raises ValueError as `features`."""
    if (function := find(model.family).explore) is None:
        raise ValueError(f"rankers of the family {model.family!r} do not explore")
    return function(model, calibrations)
