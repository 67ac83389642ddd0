"""A bundle's weights back in torch: the `Ligr` that its fp32 graphs were written from, so that a bundle is all that compressing it needs.

Items and their fields are folded into one table at export and stay so. Before: a bundle's folder. After: `compress.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from slatewise.bundle.manifest import Manifest, read_manifest
from slatewise_train.rankers.base import Calibration
from slatewise_train.rankers.ligr import Ligr, LigrConfig


def read_weights(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """Every constant of the fp32 graphs, by name."""
    graphs = (onnx.load(folder / "variants/fp32" / f"{name}.onnx") for name in manifest.graphs)
    return {weight.name: numpy_helper.to_array(weight) for graph in graphs for weight in graph.graph.initializer}


def restore(folder: Path) -> tuple[Ligr, dict[str, list[Calibration]]]:
    """The ranker and its calibrations by exit and head. Raises ManifestError, OSError or KeyError where it is no such bundle."""
    manifest = read_manifest(folder)
    weights = read_weights(folder, manifest)
    items = np.load(folder / "items.npy")
    encode = onnx.load(folder / "variants/fp32/encode.onnx")
    attention = next(node for node in encode.graph.node if node.op_type == "Attention")
    heads = {a.name: a.i for a in attention.attribute}
    numeric = len(manifest.features)
    config = LigrConfig(
        items=len(items),
        actions=len(weights["action"]),
        fields={},
        numeric=numeric,
        heads=len(manifest.heads),
        width=manifest.width,
        blocks=count(weights, "blocks."),
        attention_heads=heads["q_num_heads"],
        key_heads=heads["kv_num_heads"],
        key_size=weights["blocks.0.key.weight"].shape[1] // heads["kv_num_heads"],
        set_blocks=count(weights, "set_blocks."),
        feed_forward=weights["blocks.0.up.weight"].shape[1] // manifest.width,
        meta_size=manifest.meta_size,
    )
    moments = [torch.tensor(weights[name]) if numeric else torch.zeros(0) for name in ("numeric_mean", "numeric_std")]
    model = Ligr(config, {}, *moments)
    state = model.state_dict()
    absent = (
        *(() if config.set_blocks else ("set_norm", "set_out")),
        *(() if numeric else ("numeric_",)),
    )  # in the model, and in no graph
    given = {"item.weight": items, "default_meta": np.load(folder / "default_meta.npy")}
    given |= {"action.weight": weights["action"], "gap.weight": weights["gap"]}
    parts = ([weights["fusion.numeric.weight"]] if numeric else []) + [weights["fusion.request.weight"]]
    given |= {"fusion.weight": np.concatenate(parts), "fusion.bias": weights["fusion.request.bias"]}
    for name, tensor in state.items():
        value = given.get(name, weights.get(name))
        if value is None and name.startswith(absent):
            continue
        if value is None:
            raise KeyError(f"the graphs of {folder} have no {name}")
        turned = tensor.ndim == 2 and name not in (
            "item.weight",
            "action.weight",
            "gap.weight",
        )  # torch keeps a dense layer (out, in)
        tensor.copy_(torch.from_numpy(np.array(value.T if turned else value)))
    heads = range(len(manifest.heads))
    return model.eval(), {
        exit: [read_calibration(weights, f"calibration.{exit}.{k}") for k in heads] for exit in manifest.exits
    }


def count(weights: dict[str, np.ndarray], prefix: str) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith(prefix)})


def read_calibration(weights: dict[str, np.ndarray], name: str) -> Calibration:
    none = np.zeros(0)
    slope, bias = (weights[f"{name}.{part}"].item() for part in ("slope", "bias"))
    return Calibration(slope, bias, weights.get(f"{name}.knots", none), weights.get(f"{name}.bends", none).reshape(-1))
