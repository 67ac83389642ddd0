"""The serving graphs, written operator by operator: the equations of `ligr.py` as ONNX, with a batch axis B.

    encode   items (B,T,d) actions gaps (B,T) length (B,) past_key_<i> (B,P,key width) past_value_<i> (B,P,value width)
             -> key_<i> value_<i> (B,P+T,...), user (B,d)
    dot      candidates (B,N,d) user (B,d)                                          -> probabilities (B,N,heads)
    point    candidates numeric (B,N,F) meta (B,M) context (B,4) user
             key_<i> value_<i> (B,K,...) history_length (B,)                      -> probabilities, logits, hidden (B,N,d)
    set      hidden (B,N,d) logits (B,N,heads) set_length (B,)                      -> probabilities

Rows of a batch are padded on the right and `length`, `history_length`, `set_length` say how much of each is real: a
request alone is never padded. The rows of one `encode` call share the length of their past, so causality does the
rest. A fresh history is an extension of the start token's state, which the engine makes once (item row 1, action 0,
gap 0, no past). Attention is one operator throughout (`Attention`, opset 24) and never sees a mask.

Every dense layer is one `Gemm` of `linear`, two where the model holds a `low_rank.LowRank`; `quantize.py` finds them by
that and makes them integers. Probabilities are float64: the calibration is strictly increasing and, in double
precision, stays so through the sigmoid.
Before: `ligr.py`. After: `export.py` checks them against torch and writes the bundle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from slatewise.inference.arrays import CONTEXT_SIZE, GAP_MISSING, START_ITEM, UNKNOWN_ACTION
from slatewise_train.rankers.ligr import Ligr

OPSET = 24
IR_VERSION = 11
FLOAT = TensorProto.FLOAT
DOUBLE = TensorProto.DOUBLE
INT = TensorProto.INT64


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


def uncalibrated(exits: Sequence[str], heads: int) -> dict[str, list[Calibration]]:
    """The logits as they are, by exit and head."""
    return {exit: [Calibration.identity() for _ in range(heads)] for exit in exits}


class Graph:
    """Collects nodes and weights; `graph.op("MatMul", a, b)` returns the name of the result."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.rotary: tuple[str, str] | None = None  # of `LigrGraphs.rotary`, worked out once

    def input(self, name: str, shape: Sequence[int | str], dtype: int = FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, value: str, shape: Sequence[int | str], dtype: int = FLOAT) -> str:
        """Gives a value its name as an output, in place: an Identity would copy it."""
        for node in self.nodes:
            node.input[:] = [name if v == value else v for v in node.input]
            node.output[:] = [name if v == value else v for v in node.output]
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def weight(self, name: str, array: np.ndarray) -> str:
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def ints(self, *values: int) -> str:
        return self.weight("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        self.count += 1
        name = f"{kind}_{self.count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, list(self.weights.values()))
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="slatewise"
        )
        onnx.checker.check_model(model, full_check=True)
        return model


def linear(g: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
    """x (rows, in) -> (rows, out); weight (out, in) as torch keeps it. One GEMM, the bias in it."""
    return g.op(
        "Gemm", x, g.weight(f"{name}.weight", weight.T), *([] if bias is None else [g.weight(f"{name}.bias", bias)])
    )


@dataclass(frozen=True)
class Stream:
    """Tokens on their way through the blocks: rows (B * N, d), so that a dense layer is one GEMM, and their shape (B, N, d)."""

    rows: str
    shape: str


class LigrGraphs:
    """Writes the graphs of one ranker. `calibrations[exit][head]`."""

    def __init__(self, model: Ligr, calibrations: dict[str, list[Calibration]], longest_history: int) -> None:
        self.config = model.config
        self.calibrations = calibrations
        self.state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
        self.blocks = len(model.blocks)
        self.set_blocks = len(model.set_blocks)
        self.heads = model.config.attention_heads
        self.key_heads = model.config.key_heads or model.config.attention_heads
        self.query_size = model.config.query_width // self.heads  # of a head of queries and keys
        half = self.query_size // 2
        frequencies = 10_000.0 ** (-np.arange(half) / half)
        self.rotary_factors = {
            "positions": np.arange(longest_history + 2)[:, None].astype(np.float32),
            "frequencies": frequencies.astype(np.float32),
        }

    def stream(self, g: Graph, x: str) -> Stream:
        """x (B, N, d)"""
        return Stream(g.op("Reshape", x, g.ints(-1, self.config.width)), g.op("Shape", x))

    def layer(self, g: Graph, x: str, name: str) -> str:
        if f"{name}.first.weight" in self.state:
            x = linear(g, x, f"{name}.first", self.state[f"{name}.first.weight"], None)
            name = f"{name}.second"
        return linear(g, x, name, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, g: Graph, x: str, name: str) -> str:
        scale, bias = (g.weight(f"{name}.{part}", self.state[f"{name}.{part}"]) for part in ("weight", "bias"))
        return g.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-5)

    def rotate(self, g: Graph, x: str, positions: str, heads: int) -> str:
        """x (B, T, heads * D), positions (B, T)"""
        return g.op("RotaryEmbedding", x, *self.rotary(g), positions, num_heads=heads)

    def rotate_alike(self, g: Graph, x: str, shape: str, position: str) -> str:
        """x (B, N, H * D), all N at one position (B, 1): onnxruntime wants no more steps than positions, so N counts as heads."""
        heads = g.op("Reshape", x, g.ints(0, -1, 1, self.query_size))  # (B, N * H, 1, D)
        return self.unstacked(
            g, g.op("RotaryEmbedding", heads, *self.rotary(g), position), shape, self.config.query_width
        )

    def rotary(self, g: Graph) -> tuple[str, str]:
        """Tables (positions, D/2) of constants, which onnxruntime works out when it loads: on disk they would be a quarter of a small int8 variant."""
        if g.rotary is None:
            angle = g.op("Mul", *(g.weight(f"rotary.{name}", array) for name, array in self.rotary_factors.items()))
            g.rotary = g.op("Cos", angle), g.op("Sin", angle)
        return g.rotary

    def keys_values(self, g: Graph, x: Stream, block: str, positions: str | None) -> tuple[str, str]:
        """(B, N, key width) and (B, N, value width)"""
        normed = self.norm(g, x.rows, f"{block}.attention_norm")
        widths = {"key": self.config.key_width, "value": self.config.value_width}
        key, value = (
            self.unstacked(g, self.layer(g, normed, f"{block}.{part}"), x.shape, width)
            for part, width in widths.items()
        )
        return (key if positions is None else self.rotate(g, key, positions, self.key_heads)), value

    def unstacked(self, g: Graph, rows: str, shape: str, width: int) -> str:
        """rows of (B, N, width), whatever their shape was -> (B, N, width); `shape` is that of (B, N, d)"""
        if width != self.config.width:
            shape = g.op("Concat", g.op("Slice", shape, g.ints(0), g.ints(2)), g.ints(width), axis=0)
        return g.op("Reshape", rows, shape)

    def attention(self, g: Graph, query: str, key: str, value: str, length: str, causal: bool = False) -> str:
        """query (B, N, ...) reads the first `length` (B,) of key and value (B, K, ...) -> (B, N, d)

        causal: the last of N reads all of them, the one before all but one, ...
        """
        heads = {"q_num_heads": self.heads, "kv_num_heads": self.key_heads}
        return g.op("Attention", query, key, value, "", "", "", length, is_causal=int(causal), **heads)

    def block(self, g: Graph, x: Stream, block: str, turn: Callable[[str], str], read: Callable[[str], str]) -> Stream:
        """A gated block; `turn` gives queries (B, N, query width) their positions, `read` has them read keys and values."""
        query = turn(
            self.unstacked(
                g,
                self.layer(g, self.norm(g, x.rows, f"{block}.attention_norm"), f"{block}.query"),
                x.shape,
                self.config.query_width,
            )
        )
        attended = self.layer(g, g.op("Reshape", read(query), g.ints(-1, self.config.width)), f"{block}.out")
        rows = self.gated(g, x.rows, attended, f"{block}.attention_gate")
        fed = g.op("Gelu", self.layer(g, self.norm(g, rows, f"{block}.feed_forward_norm"), f"{block}.up"))
        return Stream(self.gated(g, rows, self.layer(g, fed, f"{block}.down"), f"{block}.feed_forward_gate"), x.shape)

    def gated(self, g: Graph, x: str, change: str, gate: str) -> str:
        return g.op("Add", x, g.op("Mul", change, g.op("Sigmoid", self.layer(g, x, gate))))

    def probabilities(self, g: Graph, logits: str, exit: str) -> str:
        """(B, N, heads) float32 logits -> calibrated float64 probabilities."""
        x = g.op("Cast", logits, to=DOUBLE)
        columns = []
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

    def dot_logits(self, g: Graph, candidates: str, user: str) -> str:
        """candidates (B, N, d), user (B, d) -> (B, N, heads)"""
        column = g.op("MatMul", candidates, g.op("Unsqueeze", user, g.ints(2)))  # (B, N, 1)
        scale, bias = (g.weight(name, self.state[name]) for name in ("dot_scale", "dot_bias"))
        return g.op("Add", g.op("Mul", column, scale), bias)

    def write_history(
        self, g: Graph, x: str, actions: str, gaps: str, length: str, past: list[tuple[str, str]]
    ) -> tuple[list[tuple[str, str]], str]:
        """Events' vectors x (B, T, d) behind `past` (B, P, ...) a block, or behind nothing -> keys and values (B, P + T, ...), user (B, d)."""
        x = g.op("Add", x, g.op("Gather", g.weight("action", self.state["action.weight"]), actions))
        x = g.op("Add", x, g.op("Gather", g.weight("gap", self.state["gap.weight"]), gaps))
        first = g.op("Shape", past[0][0], start=1, end=2) if past else g.ints(0)  # (1,): P
        steps = g.op("Squeeze", g.op("Shape", actions, start=1, end=2))  # T
        steps = g.op("Range", g.weight("zero", np.array(0, np.int64)), steps, g.weight("one", np.array(1, np.int64)))
        positions = g.op("Expand", g.op("Add", first, steps), g.op("Shape", actions))  # (B, T)
        written = g.op(
            "Add", first, g.op("Shape", actions, start=1, end=2)
        )  # (1,): P + T, padding too: causality leaves it unread
        written = g.op("Expand", written, g.op("Shape", length))  # (B,)
        tokens = self.stream(g, x)
        state = []
        for i in range(self.blocks):
            name = f"blocks.{i}"
            key, value = self.keys_values(g, tokens, name, positions)
            if past:
                key, value = (g.op("Concat", old, new, axis=1) for old, new in zip(past[i], (key, value), strict=True))
            state.append((key, value))
            if i + 1 < self.blocks:
                turn = lambda q: self.rotate(g, q, positions, self.heads)  # noqa: E731
                tokens = self.block(
                    g,
                    tokens,
                    name,
                    turn,
                    lambda q: self.attention(g, q, key, value, written, causal=True),  # noqa: B023
                )
        # only the newest position of the last block is used for more than its key and value
        last = g.op("Unsqueeze", g.op("Sub", length, g.ints(1)), g.ints(1))  # (B, 1)
        newest = g.op(
            "GatherND", g.op("Reshape", tokens.rows, tokens.shape), g.op("Unsqueeze", last, g.ints(2)), batch_dims=1
        )  # (B, 1, d)
        readable = g.op("Add", first, length)
        position = g.op("Add", first, last)  # (B, 1)
        turn = lambda q: self.rotate(g, q, position, self.heads)  # noqa: E731
        x = self.block(g, self.stream(g, newest), name, turn, lambda q: self.attention(g, q, key, value, readable))
        return state, self.norm(g, x.rows, "user_norm")

    def read_history(
        self, g: Graph, candidates: str, fused: str, user: str, state: list[tuple[str, str]], length: str
    ) -> tuple[str, Stream]:
        """Candidates' vectors (B, N, d) read keys and values (B, K, ...), the first `length` (B,) -> logits (B, N, heads) of the exit `point`, hidden."""
        x = self.stream(g, candidates)
        position = g.op("Unsqueeze", length, g.ints(1))  # (B, 1): all stand right after the history
        for i, (key, value) in enumerate(state):
            turn = lambda q: self.rotate_alike(g, q, x.shape, position)  # noqa: B023, E731
            x = self.block(g, x, f"blocks.{i}", turn, lambda q: self.attention(g, q, key, value, length))  # noqa: B023
        hidden = Stream(g.op("Add", x.rows, fused), x.shape)
        f = self.layer(
            g, g.op("Gelu", self.layer(g, self.norm(g, hidden.rows, "point_norm"), "point_up")), "point_down"
        )
        return g.op(
            "Add", self.dot_logits(g, candidates, user), self.unstacked(g, f, x.shape, self.config.heads)
        ), hidden

    def fused(self, g: Graph, candidates: str) -> str:
        """Late fusion, (B * N, d): the request's part once a request, the candidates' part once a candidate."""
        f = self.config.numeric
        m = self.config.meta_size
        d = self.config.width
        weight = self.state["fusion.weight"]
        bias = self.state["fusion.bias"]  # columns: scaled, missing, meta, context
        request = g.op("Concat", g.input("meta", ["B", m]), g.input("context", ["B", CONTEXT_SIZE]), axis=1)
        request = g.op(
            "Unsqueeze", linear(g, request, "fusion.request", weight[:, 2 * f :], bias), g.ints(1)
        )  # (B, 1, d)
        if f:
            numeric = g.input("numeric", ["B", "N", f])
            missing = g.op("IsNaN", numeric)
            scaled = g.op(
                "Div",
                g.op("Sub", numeric, g.weight("numeric_mean", self.state["numeric_mean"])),
                g.weight("numeric_std", self.state["numeric_std"]),
            )
            scaled = g.op("Where", missing, g.weight("nought", np.array(0, np.float32)), scaled)
            scaled = g.op(
                "Clip",
                scaled,
                g.weight("lowest", np.array(-10, np.float32)),
                g.weight("highest", np.array(10, np.float32)),
            )
            each = g.op("Reshape", g.op("Concat", scaled, g.op("Cast", missing, to=FLOAT), axis=-1), g.ints(-1, 2 * f))
            each = linear(g, each, "fusion.numeric", weight[:, : 2 * f], np.zeros_like(bias))
            request = g.op("Add", g.op("Reshape", each, g.op("Shape", candidates)), request)
        else:
            request = g.op("Expand", request, g.op("Shape", candidates))
        return g.op("Reshape", request, g.ints(-1, d))

    def read_slate(self, g: Graph, x: Stream, logits: str, length: str) -> str:
        """The candidates of a slate read each other, the first `length` (B,) of them -> logits (B, N, heads) of the exit `set`."""
        for i in range(self.set_blocks):
            key, value = self.keys_values(g, x, f"set_blocks.{i}", None)
            x = self.block(g, x, f"set_blocks.{i}", lambda q: q, lambda q: self.attention(g, q, key, value, length))  # noqa: B023
        out = self.layer(g, self.norm(g, x.rows, "set_norm"), "set_out")
        return g.op("Add", logits, self.unstacked(g, out, x.shape, self.config.heads))

    def state_inputs(self, g: Graph, prefix: str, length: str) -> list[tuple[str, str]]:
        """Keys and values, a pair a block."""
        widths = {"key": self.config.key_width, "value": self.config.value_width}
        return [
            tuple(g.input(f"{prefix}{part}_{i}", ["B", length, width]) for part, width in widths.items())
            for i in range(self.blocks)
        ]

    def encode(self) -> onnx.ModelProto:
        g = Graph("encode")
        d = self.config.width
        x = g.input("items", ["B", "T", d])
        actions = g.input("actions", ["B", "T"], INT)
        gaps = g.input("gaps", ["B", "T"], INT)
        length = g.input("length", ["B"], INT)
        past = self.state_inputs(g, "past_", "P")
        state, user = self.write_history(g, x, actions, gaps, length, past)
        for i, (key, value) in enumerate(state):
            g.output(f"key_{i}", key, ["B", "K", self.config.key_width])
            g.output(f"value_{i}", value, ["B", "K", self.config.value_width])
        g.output("user", user, ["B", d])
        return g.model()

    def dot(self) -> onnx.ModelProto:
        g = Graph("dot")
        d = self.config.width
        logits = self.dot_logits(g, g.input("candidates", ["B", "N", d]), g.input("user", ["B", d]))
        g.output("probabilities", self.probabilities(g, logits, "dot"), ["B", "N", self.config.heads], DOUBLE)
        return g.model()

    def point(self) -> onnx.ModelProto:
        g = Graph("point")
        d = self.config.width
        heads = self.config.heads
        candidates = g.input("candidates", ["B", "N", d])
        fused = self.fused(g, candidates)
        user = g.input("user", ["B", d])
        state = self.state_inputs(g, "", "K")
        logits, hidden = self.read_history(g, candidates, fused, user, state, g.input("history_length", ["B"], INT))
        logits = g.output("logits", logits, ["B", "N", heads])
        g.output("hidden", g.op("Reshape", hidden.rows, hidden.shape), ["B", "N", d])
        g.output("probabilities", self.probabilities(g, logits, "point"), ["B", "N", heads], DOUBLE)
        return g.model()

    def set(self) -> onnx.ModelProto:
        g = Graph("set")
        d = self.config.width
        heads = self.config.heads
        hidden = g.input("hidden", ["B", "N", d])
        logits = g.input("logits", ["B", "N", heads])
        logits = self.read_slate(g, self.stream(g, hidden), logits, g.input("set_length", ["B"], INT))
        g.output("probabilities", self.probabilities(g, logits, "set"), ["B", "N", heads], DOUBLE)
        return g.model()

    def rank(self, items: np.ndarray, head_weights: Sequence[float]) -> onnx.ModelProto:
        """All of it in one graph, for those who serve it elsewhere: rows of events and candidates in, scores out.

        history actions gaps (B,L) candidates (B,N) rows, numeric (B,N,F) with NaN for missing, meta (B,M), context (B,4)
        -> probabilities (B,N,heads) of the highest exit, scores (B,N)
        """
        g = Graph("rank")
        exit = "set" if self.set_blocks else "point"
        events = [g.input(name, ["B", "L"], INT) for name in ("history", "actions", "gaps")]
        candidates = g.op("Gather", g.weight("items", items), g.input("candidates", ["B", "N"], INT))
        batch = g.op("Concat", g.op("Shape", events[0], start=0, end=1), g.ints(1), axis=0)
        history, actions, gaps = (  # the start token first
            g.op("Concat", g.op("Expand", g.weight(f"start_{k}", np.array([[row]])), batch), column, axis=1)
            for k, (row, column) in enumerate(zip((START_ITEM, UNKNOWN_ACTION, GAP_MISSING), events, strict=True))
        )
        length = g.op("Expand", g.op("Shape", history, start=1, end=2), g.op("Shape", history, start=0, end=1))  # (B,)
        fused = self.fused(g, candidates)
        state, user = self.write_history(g, g.op("Gather", "items", history), actions, gaps, length, [])
        logits, hidden = self.read_history(g, candidates, fused, user, state, length)
        if self.set_blocks:
            slate = g.op("Expand", g.op("Shape", candidates, start=1, end=2), g.op("Shape", candidates, start=0, end=1))
            logits = self.read_slate(g, hidden, logits, slate)
        probabilities = g.output(
            "probabilities", self.probabilities(g, logits, exit), ["B", "N", self.config.heads], DOUBLE
        )
        weighted = g.op("MatMul", probabilities, g.weight("head_weights", np.array(head_weights, np.float64)))
        g.output("scores", weighted, ["B", "N"], DOUBLE)
        return g.model()

    def all(self) -> dict[str, onnx.ModelProto]:
        graphs = {"encode": self.encode(), "dot": self.dot(), "point": self.point()}
        return graphs | ({"set": self.set()} if self.set_blocks else {})
