"""Build the models from which variants are made: the bundle's own model, its low-rank forms, a student, and the model
of an item table of codes.

Called by: `variants.py`, `compress.py`. Calls: `low_rank.py`, `nested.py`, `item_codes.py`, `distill.py`,
`rankers/families.py`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import nn

from slatewise_train.bundle_writer import write_json
from slatewise_train.compression.distill import DistillConfig, distill
from slatewise_train.compression.item_codes import LearnedCodes
from slatewise_train.compression.low_rank import (
    Layer,
    allocate,
    factor,
    layer_of,
    spectrum,
    timed_layer,
)
from slatewise_train.compression.nested import cut, nest
from slatewise_train.compression.quantize import SAFE_BITS
from slatewise_train.compression.source import Source
from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerModel

CODED_RATE = 1 / 3  # of the learning rate, for blocks that learn to read a table of codes


@dataclass(frozen=True)
class Options:
    """Options for making variants."""

    method: str = "afm"  # method of low rank, see `low_rank.METHODS`
    layers: tuple[str, ...] = ()  # that low rank factors, by the last part of their names; empty: all dense layers
    # of these layers' cost, descending: one low-rank form each, in one set of weights
    shares: tuple[float, ...] = (0.5,)
    budget: str = "size"  # the cost: "size" in numbers, or "time" as measured
    least_rank: int = 1  # of a factored layer
    shape: dict[str, int] = field(default_factory=dict)  # of the student; empty: `families.half`
    distill: DistillConfig | None = None  # training of low-rank models and students; `None`: no training
    bits: int = SAFE_BITS  # of int8 weights
    checkpoints: Path = Path("build/compress")


@dataclass(frozen=True)
class Base:
    """A model, with what it has beside the weights."""

    model: RankerModel
    ranks: dict[str, int | None] = field(default_factory=dict)  # of a low-rank form's layers; None: not factored
    codes: np.ndarray | None = None  # its item table, a record of `packed_record`; None: the table of the bundle


def checkpoints_of(source: Source, options: Options) -> Path:
    """Return the folder of a bundle's checkpoints and finished measurements."""
    return options.checkpoints / source.manifest.ranker / str(source.manifest.version)


def low_rank_kinds(shares: Sequence[float]) -> list[str]:
    """Return the names of the low-rank forms: `lowrank` of the largest share, and `lowrank-25` of a share of 0.25."""
    return ["lowrank", *(f"lowrank-{round(100 * share)}" for share in shares[1:])]


def make_bases(source: Source, kinds: Collection[str], options: Options) -> dict[str, Base]:
    """Build the models of some kinds: fp32, student, tables4, and those of `low_rank_kinds`.

    All but fp32 are trained from fp32 when the options ask for it and the source has data.
    """
    bases = {"fp32": Base(source.model)}
    if any(kind in kinds for kind in low_rank_kinds(options.shares)):
        bases |= low_rank_bases(source, options)
    if "student" in kinds:
        bases["student"] = student_base(source, options)
    if "tables4" in kinds:
        bases["tables4"] = coded_base(source, options)
    return {kind: bases[kind] for kind in kinds}


def student_base(source: Source, options: Options) -> Base:
    """Build the student of the options' shape. Raises ValueError for a shape that is not possible."""
    shape = options.shape or families.half(source.model)
    name = f"student,{','.join(f'{name}={value}' for name, value in sorted(shape.items()))}"
    student = families.shrink(source.model, shape)
    train(student, source, options, name)
    return Base(student)


def coded_base(source: Source, options: Options) -> Base:
    """Build a copy of fp32 that reads an item table of codes. Both are trained together, always by distillation.

    The blocks only have to adapt, so they have a smaller learning rate than the other forms.
    """
    model = copy.deepcopy(source.model)
    codes = LearnedCodes(source.items, source.user_vectors())
    if options.distill is not None:
        rate = CODED_RATE * options.distill.learning_rate
        options = replace(options, distill=replace(options.distill, loss="teacher", learning_rate=rate))
    train(model, source, options, "tables4", codes)
    return Base(model, codes=codes.record())


def low_rank_bases(source: Source, options: Options) -> dict[str, Base]:
    """Build the low-rank forms of all shares, which are trained together. Raises ValueError as `choose_ranks`."""
    least = [f"rank={options.least_rank}"] if options.least_rank > 1 else []
    shares = [f"{share:g}" for share in options.shares]
    name = ",".join(["lowrank", options.method, *shares, options.budget, *least, *options.layers])
    ranks = choose_ranks(source, options, checkpoints_of(source, options) / f"{name}.json")
    if len(ranks) == 1:
        ((kind, only),) = ranks.items()
        model = factor(source.model, source.statistics, options.method, only)
        train(model, source, options, name)
        return {kind: Base(model, only)}
    model = nest(source.model, source.statistics, options.method, list(ranks.values()))
    train(model, source, options, name)
    return {kind: Base(cut(model, share), ranks[kind]) for share, kind in enumerate(ranks)}


def train(model: RankerModel, source: Source, options: Options, name: str, codes: LearnedCodes | None = None) -> None:
    """Train a model in place, with a checkpoint of a name, if the options ask for it and the source has data."""
    if options.distill is not None and source.data is not None:
        vectors = np.concatenate([source.vectors, source.meta[None]])
        path = checkpoints_of(source, options) / f"{name}.pt"
        distill(model, source.trainer(), vectors, options.distill, path, codes)


def chosen_layers(model: RankerModel, parts: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Return the dense layers whose names end in one of the parts, or all of them without parts.

    Raises ValueError for a part that is no layer's.
    """
    layers = families.dense_layers(model)
    known = {name.rpartition(".")[2] for name in layers}
    if unknown := sorted({*parts} - known):
        raise ValueError(f"no dense layer is named {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return {name: layer for name, layer in layers.items() if not parts or name.rpartition(".")[2] in parts}


def choose_ranks(source: Source, options: Options, path: Path) -> dict[str, dict[str, int | None]]:
    """Choose the ranks of each low-rank form within its share. Raises ValueError when no layer would become cheaper.

    path: keeps the ranks, because measured times differ between runs and a stopped compression must resume with the
    same ranks.
    """
    kinds = low_rank_kinds(options.shares)
    ranks: dict[str, dict[str, int | None]] = json.loads(path.read_text()) if path.exists() else {}
    if list(ranks) != kinds:
        layers = dict[str, Layer]()
        for name, layer in chosen_layers(source.model, options.layers).items():
            weight = layer.weight.detach().double()
            curve = spectrum(options.method, weight, source.statistics[name])
            found = layer_of(curve, weight) if options.budget == "size" else timed_layer(curve, weight)
            layers[name] = replace(found, least=options.least_rank)
        whole = sum(layer.whole for layer in layers.values())
        ranks = {kind: allocate(layers, share * whole) for kind, share in zip(kinds, options.shares, strict=True)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, ranks)
    for kind, share in zip(kinds, options.shares, strict=True):
        if not any(ranks[kind].values()):
            raise ValueError(f"low rank would save nothing at a share of {share:g} ({options.budget})")
    return ranks
