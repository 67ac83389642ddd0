"""Build ONNX graphs: nodes, constants, dense layers and calibrated probabilities, for any ranker family.

Called by: `ligr_onnx.py`, and `compression/low_rank.py` to time dense layers. Calls: onnx, `base.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from slatewise_train.rankers.base import Calibration

OPSET = 24  # the first one with `Attention` as one operator
IR_VERSION = 11
FLOAT = TensorProto.FLOAT
DOUBLE = TensorProto.DOUBLE
INT = TensorProto.INT64


class GraphBuilder:
    """Collects nodes and weights of a graph. A value is a name: `g.op("MatMul", a, b)` returns the product's name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.shared: dict[str, tuple[str, ...]] = {}  # values that several parts of the graph use, by any key

    def input(self, name: str, shape: Sequence[int | str], dtype: int = FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, value: str, shape: Sequence[int | str], dtype: int = FLOAT) -> str:
        """Rename a value to the name of an output. An Identity node would copy the tensor instead."""
        for node in self.nodes:
            node.input[:] = [name if v == value else v for v in node.input]
            node.output[:] = [name if v == value else v for v in node.output]
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def weight(self, name: str, array: np.ndarray) -> str:
        """Add a constant. If the name exists already, its first array stays."""
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def ints(self, *values: int) -> str:
        """Add a constant int64 vector, for shapes and axes."""
        return self.weight("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node and return the name of its output. Pass "" for an optional input that is left out."""
        self.count += 1
        name = f"{kind}_{self.count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def model(self) -> onnx.ModelProto:
        """Build and check the model. Raises onnx.checker.ValidationError."""
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, list(self.weights.values()))
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="slatewise"
        )
        onnx.checker.check_model(model, full_check=True)
        return model


def linear(g: GraphBuilder, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
    """Add a dense layer as one `Gemm`: x (rows, in) -> (rows, out); weight (out, in) as in torch, bias (out,)."""
    inputs = [x, g.weight(f"{name}.weight", weight.T)]
    if bias is not None:
        inputs.append(g.weight(f"{name}.bias", bias))
    return g.op("Gemm", *inputs)


def probabilities(g: GraphBuilder, logits: str, exit: str, calibrations: Sequence[Calibration]) -> str:
    """Add calibration and sigmoid: logits (B, N, heads) float32 -> probabilities (B, N, heads) float64.

    calibrations: one for each head. In double precision a strictly increasing calibration is still strictly increasing
    after the sigmoid.
    """
    x = g.op("Cast", logits, to=DOUBLE)
    columns = []
    for k, calibration in enumerate(calibrations):
        name = f"calibration.{exit}.{k}"
        column = g.op("Slice", x, g.ints(k), g.ints(k + 1), g.ints(2))
        straight = g.op("Mul", column, g.weight(f"{name}.slope", np.array(calibration.slope)))
        straight = g.op("Add", straight, g.weight(f"{name}.bias", np.array(calibration.bias)))
        if len(calibration.knots):
            over = g.op("Relu", g.op("Sub", column, g.weight(f"{name}.knots", calibration.knots)))
            bend = g.op("MatMul", over, g.weight(f"{name}.bends", calibration.bends[:, None]))
            straight = g.op("Add", straight, bend)
        columns.append(straight)
    return g.op("Sigmoid", g.op("Concat", *columns, axis=-1))
