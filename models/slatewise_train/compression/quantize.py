"""int8 linears: a graph becomes a graph whose large dense layers multiply 8-bit integers, `.onnx -> .onnx`.

Weights are int8 with a scale for each output. Inputs are uint8 with a constant scale and zero point for each layer, from what
`observe` saw on calibration requests: a row's result depends on that row alone, never on who else is in the tensor
(onnxruntime's dynamic scale is one for a whole tensor, so neighbours, padding and chunks would change a score). What lies beyond the
seen range saturates. Everything else (normalisation, softmax, exits, calibration) stays as it is.

Before: `graphs.py`. After: `compress.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from slatewise_train.compression.graph_check import INTEGER_SIDE

CONTRIB = "com.microsoft"
SAFE_BITS = 7
FULL_BITS = 8  # of a weight: without VNNI, pairs of products with 8 bits overflow their 16


def dense_nodes(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The `Gemm` nodes worth quantizing: constant weight (in, out), neither side small."""
    shapes = {weight.name: tuple(weight.dims) for weight in graph.graph.initializer}
    return [
        node
        for node in graph.graph.node
        if node.op_type == "Gemm" and min(shapes.get(node.input[1], (0,))) >= INTEGER_SIDE
    ]


Ranges = Mapping[str, tuple[float, float]]  # tensor -> least and largest value


def observe(graph: onnx.ModelProto, requests: Iterable[dict[str, np.ndarray]]) -> dict[str, tuple[float, float]]:
    """The range of every dense layer's input over these requests of the graph; 0 is always in it."""
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
    """weight (in, out) -> int8 of as many bits, symmetric, and the scale of each output (out,)."""
    most = 2 ** (bits - 1) - 1
    scale = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny) / np.float32(most)
    return np.rint(weight / scale).astype(np.int8), scale.astype(np.float32)


def input_scale(least: float, largest: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of a uint8 input whose values lie between these."""
    scale = np.float32(max(largest - least, 1e-6) / 255)
    return scale, np.uint8(np.clip(round(-least / float(scale)), 0, 255))


def quantize(graph: onnx.ModelProto, ranges: Ranges, bits: int = SAFE_BITS) -> onnx.ModelProto:
    """The graph with its dense layers in integers. Layers that read the same tensor share its codes."""
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    weights = {weight.name: weight for weight in result.graph.initializer}
    chosen = {node.name for node in dense_nodes(graph)}
    nodes: list[onnx.NodeProto] = []
    coded: dict[str, tuple[str, str, str]] = {}  # input -> its codes, scale and zero point
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
