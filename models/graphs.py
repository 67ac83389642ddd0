"""The serving graphs, written operator by operator: the equations of `ligr.py` as ONNX, with a batch axis B.

    encode   items (B,T,d) actions gaps (B,T) length (B,) past_key_<i> past_value_<i> (B,H,P,D)
             -> key_<i> value_<i> (B,H,T,D) of the new events, user (B,d)
    dot      candidates (B,N,d) user (B,d)                                          -> probabilities (B,N,heads)
    point    candidates numeric (B,N,F) meta (B,M) context (B,4) user
             key_<i> value_<i> (B,H,K,D) history_length (B,)                        -> probabilities, logits, hidden (B,N,d)
    set      hidden (B,N,d) logits (B,N,heads) set_length (B,)                      -> probabilities

Rows of a batch are padded on the right and `length`, `history_length`, `set_length` say how much of each is real: a
request alone is never padded. The rows of one `encode` call share the length of their past, so causality does the
rest. A fresh history is an extension of the start token's state, which the engine makes once (item row 1, action 0,
gap 0, no past). Attention is one operator throughout (`Attention`, opset 24) and never sees a mask.

Every dense layer goes through `linear`, so a compressed variant is another `linear`. Probabilities are float64: the
calibration is strictly increasing and, in double precision, stays so through the sigmoid.
Before: `ligr.py`. After: `export.py` checks them against torch and writes the bundle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from app.features import CONTEXT_SIZE
from models.ligr import Ligr

OPSET, IR_VERSION = 24, 11
FLOAT, DOUBLE, INT = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64


@dataclass(frozen=True)
class Calibration:
    """A strictly increasing, piecewise linear map of one head's logit: `bias + slope * x + bends . relu(x - knots)`."""

    slope: float
    bias: float
    knots: np.ndarray  # (K,) float64, ascending
    bends: np.ndarray  # (K,) float64, changes of slope

    @classmethod
    def identity(cls) -> "Calibration":
        return cls(1.0, 0.0, np.zeros(0), np.zeros(0))

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        logits = logits.astype(np.float64)
        return self.bias + self.slope * logits + np.maximum(logits[..., None] - self.knots, 0.0) @ self.bends


class Graph:
    """Collects nodes and weights; `graph.op("MatMul", a, b)` returns the name of the result."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Sequence[int | str], dtype: int = FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, value: str, shape: Sequence[int | str], dtype: int = FLOAT) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def weight(self, name: str, array: np.ndarray) -> str:
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def ints(self, *values: int) -> str:
        return self.weight("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def op(self, kind: str, *inputs: str, unused: int = 0, **attributes: object) -> str:
        """`unused`: how many more outputs the operator must have, though nobody reads them."""
        self.count += 1
        name = f"{kind}_{self.count}"
        outputs = [name, *(f"{name}_unused_{k}" for k in range(unused))]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name=name, **attributes))
        return name

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, list(self.weights.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="slatewise")
        onnx.checker.check_model(model, full_check=True)
        return model


Linear = Callable[[Graph, str, str, np.ndarray, np.ndarray], str]


def linear(g: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray) -> str:
    """x (..., in) -> (..., out); weight (out, in) as torch keeps it."""
    return g.op("Add", g.op("MatMul", x, g.weight(f"{name}.weight", weight.T)), g.weight(f"{name}.bias", bias))


class LigrGraphs:
    """Writes the graphs of one ranker. `calibrations[exit][head]`."""

    def __init__(self, model: Ligr, calibrations: dict[str, list[Calibration]], longest_history: int, dense: Linear = linear) -> None:
        self.config, self.calibrations, self.dense = model.config, calibrations, dense
        self.state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
        self.blocks, self.set_blocks = len(model.blocks), len(model.set_blocks)
        d, self.heads = model.config.width, model.config.attention_heads
        self.head_size = d // self.heads
        half = self.head_size // 2
        angle = np.arange(longest_history + 2)[:, None] * 10_000.0 ** (-np.arange(half, dtype=np.float32) / half)
        self.cos, self.sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

    def layer(self, g: Graph, x: str, name: str) -> str:
        return self.dense(g, x, name, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, g: Graph, x: str, name: str) -> str:
        scale, bias = (g.weight(f"{name}.{part}", self.state[f"{name}.{part}"]) for part in ("weight", "bias"))
        return g.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-5)

    def split(self, g: Graph, x: str) -> str:
        """(B, T, d) -> (B, H, T, D)"""
        return g.op("Transpose", g.op("Reshape", x, g.ints(0, 0, self.heads, self.head_size)), perm=[0, 2, 1, 3])

    def rotate(self, g: Graph, x: str, positions: str) -> str:
        """x (B, H, T, D), positions (B, T)"""
        return g.op("RotaryEmbedding", x, g.weight("rotary.cos", self.cos), g.weight("rotary.sin", self.sin), positions)

    def keys_values(self, g: Graph, x: str, block: str, positions: str | None) -> tuple[str, str]:
        normed = self.norm(g, x, f"{block}.attention_norm")
        key, value = self.split(g, self.layer(g, normed, f"{block}.key")), self.split(g, self.layer(g, normed, f"{block}.value"))
        return (key if positions is None else self.rotate(g, key, positions)), value

    def split_rotated(self, g: Graph, x: str, position: str) -> str:
        """(B, N, d) -> (B, H, N, D), all N at one position (B, 1): onnxruntime wants no more steps than positions, so N counts as heads."""
        x = self.rotate(g, g.op("Reshape", x, g.ints(0, -1, 1, self.head_size)), position)
        return g.op("Transpose", g.op("Reshape", x, g.ints(0, -1, self.heads, self.head_size)), perm=[0, 2, 1, 3])

    def block(self, g: Graph, x: str, block: str, position: str | None, positions: str | None, attend: Callable[[str], str]) -> str:
        """A gated block; `attend` reads keys and values for a query (B, H, N, D).

        `position` (B, 1) stands all of x at one place, `positions` (B, N) each at its own, neither of them nowhere.
        """
        query = self.layer(g, self.norm(g, x, f"{block}.attention_norm"), f"{block}.query")
        query = self.split(g, query) if position is None else self.split_rotated(g, query, position)
        read = attend(query if positions is None else self.rotate(g, query, positions))
        read = g.op("Reshape", g.op("Transpose", read, perm=[0, 2, 1, 3]), g.ints(0, 0, self.config.width))
        x = self.gated(g, x, self.layer(g, read, f"{block}.out"), f"{block}.attention_gate")
        fed = g.op("Gelu", self.layer(g, self.norm(g, x, f"{block}.feed_forward_norm"), f"{block}.up"))
        return self.gated(g, x, self.layer(g, fed, f"{block}.down"), f"{block}.feed_forward_gate")

    def gated(self, g: Graph, x: str, change: str, gate: str) -> str:
        return g.op("Add", x, g.op("Mul", change, g.op("Sigmoid", self.layer(g, x, gate))))

    def probabilities(self, g: Graph, logits: str, exit: str) -> str:
        """(B, N, heads) float32 logits -> calibrated float64 probabilities."""
        x, columns = g.op("Cast", logits, to=DOUBLE), []
        for k, calibration in enumerate(self.calibrations[exit]):
            column = g.op("Slice", x, g.ints(k), g.ints(k + 1), g.ints(2))
            straight = g.op("Mul", column, g.weight(f"calibration.{exit}.{k}.slope", np.array(calibration.slope)))
            straight = g.op("Add", straight, g.weight(f"calibration.{exit}.{k}.bias", np.array(calibration.bias)))
            if len(calibration.knots):
                over = g.op("Relu", g.op("Sub", column, g.weight(f"calibration.{exit}.{k}.knots", calibration.knots)))
                bend = g.op("MatMul", over, g.weight(f"calibration.{exit}.{k}.bends", calibration.bends[:, None]))
                straight = g.op("Add", straight, bend)
            columns.append(straight)
        return g.op("Sigmoid", g.op("Concat", *columns, axis=-1))

    def finish(self, g: Graph, logits: str, exit: str) -> onnx.ModelProto:
        g.output("probabilities", self.probabilities(g, logits, exit), ["B", "N", self.config.heads], DOUBLE)
        return g.model()

    def dot_logits(self, g: Graph, candidates: str, user: str) -> str:
        column = g.op("MatMul", candidates, g.op("Unsqueeze", user, g.ints(2)))  # (B, N, 1)
        scale, bias = (g.weight(name, self.state[name]) for name in ("dot_scale", "dot_bias"))
        return g.op("Add", g.op("Mul", column, scale), bias)

    def encode(self) -> onnx.ModelProto:
        g, d, cache = Graph("encode"), self.config.width, ["B", self.heads, "P", self.head_size]
        x = g.input("items", ["B", "T", d])
        actions, gaps = g.input("actions", ["B", "T"], INT), g.input("gaps", ["B", "T"], INT)
        length = g.input("length", ["B"], INT)
        past = [(g.input(f"past_key_{i}", cache), g.input(f"past_value_{i}", cache)) for i in range(self.blocks)]
        x = g.op("Add", x, g.op("Gather", g.weight("action", self.state["action.weight"]), actions))
        x = g.op("Add", x, g.op("Gather", g.weight("gap", self.state["gap.weight"]), gaps))
        first = g.op("Shape", past[0][0], start=2, end=3)  # (1,): P
        one = g.weight("one", np.array(1, np.int64))
        steps = g.op("Range", g.weight("zero", np.array(0, np.int64)), g.op("Squeeze", g.op("Shape", actions, start=1, end=2)), one)
        positions = g.op("Expand", g.op("Add", first, steps), g.op("Shape", actions))  # (B, T)
        last = g.op("Sub", length, g.ints(1))  # (B,)
        for i, (past_key, past_value) in enumerate(past):
            name = f"blocks.{i}"
            key, value = self.keys_values(g, x, name, positions)
            g.output(f"key_{i}", key, ["B", self.heads, "T", self.head_size])
            g.output(f"value_{i}", value, ["B", self.heads, "T", self.head_size])
            if i + 1 < self.blocks:
                x = self.block(g, x, name, None, positions, lambda q: g.op("Attention", q, key, value, "", past_key, past_value, unused=2, is_causal=1))  # noqa: B023
                continue
            # only the newest position of the last block is used for more than its key and value
            at = g.op("Unsqueeze", last, g.ints(1))  # (B, 1)
            x = g.op("GatherND", x, g.op("Unsqueeze", at, g.ints(2)), batch_dims=1)  # (B, 1, d)
            key, value = g.op("Concat", past_key, key, axis=2), g.op("Concat", past_value, value, axis=2)
            readable = g.op("Add", first, length)
            x = self.block(g, x, name, g.op("Add", first, at), None, lambda q: g.op("Attention", q, key, value, "", "", "", readable))  # noqa: B023
        user = g.op("Squeeze", self.norm(g, x, "user_norm"), g.ints(1))
        g.output("user", user, ["B", d])
        return g.model()

    def dot(self) -> onnx.ModelProto:
        g = Graph("dot")
        candidates, user = g.input("candidates", ["B", "N", self.config.width]), g.input("user", ["B", self.config.width])
        return self.finish(g, self.dot_logits(g, candidates, user), "dot")

    def point(self) -> onnx.ModelProto:
        g, d, cache = Graph("point"), self.config.width, ["B", self.heads, "K", self.head_size]
        x = candidates = g.input("candidates", ["B", "N", d])
        fused = self.fused(g)
        user = g.input("user", ["B", d])
        state = [(g.input(f"key_{i}", cache), g.input(f"value_{i}", cache)) for i in range(self.blocks)]
        length = g.input("history_length", ["B"], INT)
        position = g.op("Unsqueeze", length, g.ints(1))  # (B, 1): all stand right after the history
        for i, (key, value) in enumerate(state):
            x = self.block(g, x, f"blocks.{i}", position, None, lambda q: g.op("Attention", q, key, value, "", "", "", length))  # noqa: B023
        hidden = g.op("Add", x, fused)
        f = g.op("Gelu", self.layer(g, self.norm(g, hidden, "point_norm"), "point_up"))
        logits = g.op("Add", self.dot_logits(g, candidates, user), self.layer(g, f, "point_down"))
        g.output("logits", logits, ["B", "N", self.config.heads])
        g.output("hidden", hidden, ["B", "N", d])
        return self.finish(g, logits, "point")

    def fused(self, g: Graph) -> str:
        """Late fusion: the request's part once a request, the candidates' part once a candidate."""
        f, m = self.config.numeric, self.config.meta_size
        weight, bias = self.state["fusion.weight"], self.state["fusion.bias"]  # columns: scaled, missing, meta, context
        request = g.op("Concat", g.input("meta", ["B", m]), g.input("context", ["B", CONTEXT_SIZE]), axis=1)
        request = g.op("Unsqueeze", self.dense(g, request, "fusion.request", weight[:, 2 * f :], bias), g.ints(1))  # (B, 1, d)
        if not f:
            return request
        numeric = g.input("numeric", ["B", "N", f])
        missing = g.op("IsNaN", numeric)
        scaled = g.op("Div", g.op("Sub", numeric, g.weight("numeric_mean", self.state["numeric_mean"])), g.weight("numeric_std", self.state["numeric_std"]))
        scaled = g.op("Where", missing, g.weight("nought", np.array(0, np.float32)), scaled)
        scaled = g.op("Clip", scaled, g.weight("lowest", np.array(-10, np.float32)), g.weight("highest", np.array(10, np.float32)))
        each = g.op("Concat", scaled, g.op("Cast", missing, to=FLOAT), axis=-1)
        return g.op("Add", self.dense(g, each, "fusion.numeric", weight[:, : 2 * f], np.zeros_like(bias)), request)

    def set(self) -> onnx.ModelProto:
        g, d = Graph("set"), self.config.width
        x, logits = g.input("hidden", ["B", "N", d]), g.input("logits", ["B", "N", self.config.heads])
        length = g.input("set_length", ["B"], INT)
        for i in range(self.set_blocks):
            key, value = self.keys_values(g, x, f"set_blocks.{i}", None)
            x = self.block(g, x, f"set_blocks.{i}", None, None, lambda q: g.op("Attention", q, key, value, "", "", "", length))  # noqa: B023
        logits = g.op("Add", logits, self.layer(g, self.norm(g, x, "set_norm"), "set_out"))
        return self.finish(g, logits, "set")

    def all(self) -> dict[str, onnx.ModelProto]:
        graphs = {"encode": self.encode(), "dot": self.dot(), "point": self.point()}
        return graphs | ({"set": self.set()} if self.set_blocks else {})
