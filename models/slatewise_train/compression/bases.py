"""Build the models from which variants are made: the bundle's own model, its low-rank form, and a student.

Called by: `variants.py`, `compress.py`. Calls: `low_rank.py`, `distill.py`, `rankers/families.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import nn

from slatewise_train.bundle_writer import write_json
from slatewise_train.compression.distill import DistillConfig, distill
from slatewise_train.compression.low_rank import (
    Layer,
    allocate,
    factor,
    layer_of,
    spectrum,
    timed_layer,
)
from slatewise_train.compression.quantize import SAFE_BITS
from slatewise_train.compression.source import Source
from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerModel


@dataclass(frozen=True)
class Options:
    """Options for making variants."""

    method: str = "afm"  # method of low rank, see `low_rank.METHODS`
    layers: tuple[str, ...] = ()  # that low rank factors, by the last part of their names; empty: all dense layers
    share: float = 0.5  # share of these layers' cost that the low-rank form may have
    budget: str = "size"  # the cost: "size" in numbers, or "time" as measured
    shape: dict[str, int] = field(default_factory=dict)  # of the student; empty: `families.half`
    distill: DistillConfig | None = None  # training of low-rank models and students; `None`: no training
    bits: int = SAFE_BITS  # of int8 weights
    checkpoints: Path = Path("build/compress")


@dataclass(frozen=True)
class Base:
    """A model, and for the low-rank form the rank of each layer, `None` for an unfactored layer."""

    model: RankerModel
    ranks: dict[str, int | None] = field(default_factory=dict)


def checkpoints_of(source: Source, options: Options) -> Path:
    """Return the folder of a bundle's checkpoints and finished measurements."""
    return options.checkpoints / source.manifest.ranker / str(source.manifest.version)


def make_base(source: Source, kind: str, options: Options) -> Base:
    """Build the model of a kind: fp32, lowrank or student.

    lowrank and student are trained from fp32 when the options ask for it and the source has data.
    """
    if kind == "fp32":
        return Base(source.model)
    folder = checkpoints_of(source, options)
    if kind == "student":
        shape = options.shape or families.half(source.model)
        checkpoint = folder / f"student,{','.join(f'{name}={value}' for name, value in sorted(shape.items()))}.pt"
        base = Base(families.shrink(source.model, shape))
    else:
        parts = ["lowrank", options.method, f"{options.share:g}", options.budget, *options.layers]
        checkpoint = folder / f"{','.join(parts)}.pt"
        base = low_rank_base(source, options, checkpoint.with_suffix(".json"))
    if options.distill is not None and source.data is not None:
        vectors = np.concatenate([source.vectors, source.meta[None]])
        distill(base.model, source.trainer(), vectors, options.distill, checkpoint)
    return base


def chosen_layers(model: RankerModel, parts: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Return the dense layers whose names end in one of the parts, or all of them without parts.

    Raises ValueError for a part that is no layer's.
    """
    layers = families.dense_layers(model)
    known = {name.rpartition(".")[2] for name in layers}
    if unknown := sorted({*parts} - known):
        raise ValueError(f"no dense layer is named {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return {name: layer for name, layer in layers.items() if not parts or name.rpartition(".")[2] in parts}


def low_rank_base(source: Source, options: Options, ranks_file: Path) -> Base:
    """Build the low-rank form within the options' budget. Raises ValueError when no layer would become cheaper.

    ranks_file keeps the ranks, because measured times differ between runs and a stopped compression must resume with
    the same ranks.
    """
    if ranks_file.exists():
        ranks: dict[str, int | None] = json.loads(ranks_file.read_text())
    else:
        layers = dict[str, Layer]()
        for name, layer in chosen_layers(source.model, options.layers).items():
            weight = layer.weight.detach().double()
            curve = spectrum(options.method, weight, source.statistics[name])
            layers[name] = layer_of(curve, weight) if options.budget == "size" else timed_layer(curve, weight)
        ranks = allocate(layers, options.share * sum(layer.whole for layer in layers.values()))
        ranks_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(ranks_file, ranks)
    if not any(ranks.values()):
        raise ValueError(f"low rank would save nothing at a share of {options.share:g} ({options.budget})")
    return Base(factor(source.model, source.statistics, options.method, ranks), ranks)
