"""Quantize a graph: its large dense layers then multiply 8-bit integers.

A weight is stored as int8, with one scale for each output. An input is converted to uint8 with a scale and a zero
point. Both are constants of the layer, computed from the ranges that `observe` measures on calibration requests.
Inputs outside the measured range saturate. Normalisation, softmax, exits and calibration stay in float.

The dynamic quantization of ONNX Runtime is not used. It computes one scale for a whole tensor, so the other candidates
of a request, padding and chunks would change a score.

Called by: `variants.py`, `bases.py`, `compress.py`, `loadtest/`. Calls: onnx; `inference/engine.py` to record the
inputs of the graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from slatewise.inference.engine import Engine
from slatewise.inference.item_table import ItemTable
from slatewise_train.graph_check import CONTRIB, INTEGER_SIDE

SAFE_BITS = 7  # bits of a weight; safe on every processor
FULL_BITS = 8  # needs VNNI: other processors add two products in 16 bits, which can overflow


def dense_nodes(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the `Gemm` nodes to quantize: their weight (in, out) is constant, and neither side is small."""
    shapes = {weight.name: tuple(weight.dims) for weight in graph.graph.initializer}
    return [
        node
        for node in graph.graph.node
        if node.op_type == "Gemm" and min(shapes.get(node.input[1], (0,))) >= INTEGER_SIDE
    ]


Ranges = Mapping[str, tuple[float, float]]  # tensor -> least and largest value


class RecordingEngine(Engine):
    """An engine that records the inputs of every call, by graph."""

    def __init__(self, folder: Path, items: ItemTable, exits: list[str]) -> None:
        self.feeds: dict[str, list[dict[str, np.ndarray]]] = {}
        super().__init__(folder, items, exits)

    def run(self, graph: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.feeds.setdefault(graph, []).append(feeds)
        return super().run(graph, feeds)


def observe(graph: onnx.ModelProto, requests: Iterable[dict[str, np.ndarray]]) -> dict[str, tuple[float, float]]:
    """Run the graph on requests and return the range of every dense layer's input, extended to contain 0."""
    names = sorted({node.input[0] for node in dense_nodes(graph)})
    if not names:
        return {}
    watched = onnx.ModelProto()
    watched.CopyFrom(graph)
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    least = dict.fromkeys(names, 0.0)
    largest = dict.fromkeys(names, 0.0)
    for feeds in requests:
        for name, value in zip(names, session.run(names, feeds), strict=True):
            least[name] = min(least[name], float(value.min()))
            largest[name] = max(largest[name], float(value.max()))
    return {name: (least[name], largest[name]) for name in names}


def quantize_weight(weight: np.ndarray, bits: int = SAFE_BITS) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a weight (in, out) symmetrically. Returns int8 codes (in, out) of that many bits, and scales (out,)."""
    most = 2 ** (bits - 1) - 1
    scale = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny) / np.float32(most)
    return np.rint(weight / scale).astype(np.int8), scale.astype(np.float32)


def input_scale(least: float, largest: float) -> tuple[np.float32, np.uint8]:
    """Return scale and zero point of a uint8 input with values from `least` to `largest`."""
    scale = np.float32(max(largest - least, 1e-6) / 255)
    return scale, np.uint8(np.clip(round(-least / float(scale)), 0, 255))


def quantize(graph: onnx.ModelProto, ranges: Ranges, bits: int = SAFE_BITS) -> onnx.ModelProto:
    """Return a copy of the graph with integer dense layers. Layers with the same input share its uint8 codes."""
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    weights = {weight.name: weight for weight in result.graph.initializer}
    chosen = {node.name for node in dense_nodes(graph)}
    nodes: list[onnx.NodeProto] = []
    coded: dict[str, tuple[str, str, str]] = {}  # input -> names of its codes, scale and zero point
    used: dict[str, np.ndarray] = {}

    def constant(name: str, value: np.ndarray) -> str:
        used[name] = value
        return name

    for node in result.graph.node:
        if node.name not in chosen:
            nodes.append(node)
            continue
        x, weight, *bias = node.input
        if x not in coded:
            scale, zero = input_scale(*ranges[x])
            coded[x] = (f"{x}.codes", constant(f"{x}.scale", np.array(scale)), constant(f"{x}.zero", np.array(zero)))
            nodes.append(helper.make_node("QuantizeLinear", [x, *coded[x][1:]], [coded[x][0]], name=f"quantize.{x}"))
        codes, scales = quantize_weight(numpy_helper.to_array(weights[weight]), bits)
        codes_name = constant(f"{weight}.codes", codes)
        scale_name = constant(f"{weight}.scale", scales)
        inputs = [coded[x][0], codes_name, coded[x][1], scale_name, coded[x][2], "", *bias]
        nodes.append(
            helper.make_node("MatMulIntegerToFloat", inputs, list(node.output), name=node.name, domain=CONTRIB)
        )
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    kept = [weight for weight in result.graph.initializer if weight.name in read]
    del result.graph.initializer[:]
    result.graph.initializer.extend([*kept, *(numpy_helper.from_array(value, name) for name, value in used.items())])
    if used:
        result.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    onnx.checker.check_model(result)
    return result
