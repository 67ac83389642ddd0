"""The serving graphs of a ranker with late fusion, into which a family writes its blocks. Inputs have a batch axis B.

    encode   items (B,T,d) actions gaps (B,T) length (B,) past_key_<i> (B,P,key width) past_value_<i> (B,P,value width)
             -> key_<i> value_<i> (B,P+T,...), user (B,d)
    dot      candidates (B,N,d) user (B,d)                        -> probabilities (B,N,heads)
    point    candidates numeric (B,N,F) meta (B,M) context (B,4) user
             key_<i> value_<i> (B,K,...) of the blocks that candidates read
             history_length (B,)                                  -> probabilities, logits, hidden (B,N,h)
    set      hidden (B,N,h) logits (B,N,heads) set_length (B,)    -> probabilities

Rows of a batch are padded on the right; `length`, `history_length` and `set_length` are the lengths without padding.
The server does not pad single requests. All rows of one `encode` call have the same past length P. Events attend only
to earlier positions, so they do not read the padding after them.

The first position of every history is the start token (item row 1, action 0, gap 0, no past). The engine encodes it
once, uses the result as the state of an empty history, and extends it by the events of other histories.

Called by: `ligr_onnx.py`, `dcn_onnx.py`. Calls: `onnx_builder.py`, `late_fusion.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from slatewise.inference.arrays import CONTEXT_SIZE, GAP_MISSING, START_ITEM, UNKNOWN_ACTION
from slatewise_train.rankers.base import Calibrations, RankerConfig, RankerGraphs
from slatewise_train.rankers.late_fusion import LateFusion
from slatewise_train.rankers.onnx_builder import DOUBLE, FLOAT, INT, GraphBuilder, linear, probabilities


@dataclass(frozen=True)
class Stream:
    """Tokens between blocks, stacked into rows, so that a dense layer is one GEMM."""

    rows: str  # (B * N, d)
    shape: str  # int64 vector [B, N, d]


class LateFusionGraphs(RankerGraphs):
    """Writes the graphs of one ranker.

    state_widths: key and value width of each block of the history; first_read: the first block that candidates read.
    """

    config: RankerConfig

    def __init__(
        self, model: LateFusion, calibrations: Calibrations, state_widths: list[tuple[int, int]], first_read: int = 0
    ) -> None:
        self.config = model.config
        self.exits = model.exits
        self.meta_size = model.meta_size
        self.vector_size = model.vector_size
        self.calibrations = calibrations
        self.state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
        self.state_widths = state_widths
        self.first_read = first_read
        self.hidden_width = model.hidden_size

    @abstractmethod
    def write_history(
        self, g: GraphBuilder, x: str, actions: str, gaps: str, length: str, past: list[tuple[str, str]]
    ) -> tuple[list[tuple[str, str]], str]:
        """Encode events that follow a past.

        x: item vectors (B, T, d); actions, gaps: (B, T); past: keys and values (B, P, ...) of each block, or an empty
        list without a past. Returns keys and values (B, P + T, ...) of each block, and the user vector (B, d).
        """

    @abstractmethod
    def read_history(
        self, g: GraphBuilder, candidates: str, fused: str, user: str, state: list[tuple[str, str]], length: str
    ) -> tuple[str, Stream]:
        """Let candidates' vectors (B, N, d) attend to the first length (B,) positions of the encoded history.

        fused: (B * N, d); state: keys and values of the blocks that candidates read. Returns the logits (B, N, heads)
        of the exit `point`, and the hidden states.
        """

    def read_slate(self, g: GraphBuilder, x: Stream, logits: str, length: str) -> str:
        """Let the first length (B,) candidates of a slate attend to each other, in a family with the exit `set`.

        logits: (B, N, heads) of the exit `point`. Returns logits (B, N, heads) of the exit `set`.
        """
        raise NotImplementedError

    def stream(self, g: GraphBuilder, x: str) -> Stream:
        """Stack x (B, N, d) into rows."""
        return Stream(g.op("Reshape", x, g.ints(-1, self.config.width)), g.op("Shape", x))

    def layer(self, g: GraphBuilder, x: str, name: str) -> str:
        """Add the model's dense layer called `name`: (rows, in) -> (rows, out)."""
        if f"{name}.first.weight" in self.state:
            x = linear(g, x, f"{name}.first", self.state[f"{name}.first.weight"], None)
            name = f"{name}.second"
        return linear(g, x, name, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, g: GraphBuilder, x: str, name: str) -> str:
        scale, bias = (g.weight(f"{name}.{part}", self.state[f"{name}.{part}"]) for part in ("weight", "bias"))
        return g.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-5)

    def unstacked(self, g: GraphBuilder, rows: str, shape: str, width: int) -> str:
        """Reshape rows (B * N, width) to (B, N, width). shape: the vector [B, N, d]."""
        if width != self.config.width:
            shape = g.op("Concat", g.op("Slice", shape, g.ints(0), g.ints(2)), g.ints(width), axis=0)
        return g.op("Reshape", rows, shape)

    def tokens(self, g: GraphBuilder, x: str, actions: str, gaps: str) -> str:
        """Return the tokens (B, T, d) of events: item vectors x (B, T, d), actions and gaps (B, T)."""
        x = g.op("Add", x, g.op("Gather", g.weight("action", self.state["action.weight"]), actions))
        return g.op("Add", x, g.op("Gather", g.weight("gap", self.state["gap.weight"]), gaps))

    def dot_logits(self, g: GraphBuilder, candidates: str, user: str) -> str:
        """Return logits of the exit `dot`: candidates (B, N, d), user (B, d) -> (B, N, heads)."""
        column = g.op("MatMul", candidates, g.op("Unsqueeze", user, g.ints(2)))  # (B, N, 1)
        scale, bias = (g.weight(name, self.state[name]) for name in ("dot_scale", "dot_bias"))
        return g.op("Add", g.op("Mul", column, scale), bias)

    def fused(self, g: GraphBuilder, candidates: str) -> str:
        """Add the late fusion: (B * N, d).

        The request's part is computed once, the candidates' part for each candidate.
        """
        f = self.config.numeric
        m = self.meta_size
        d = self.config.width
        weight = self.state["fusion.weight"]
        bias = self.state["fusion.bias"]  # columns of the weight: scaled, missing, meta, context
        meta = g.input("meta", ["B", self.vector_size])
        if self.config.personal_heads:
            meta = g.op("Slice", meta, g.ints(0), g.ints(m), g.ints(1))
        request = g.op("Concat", meta, g.input("context", ["B", CONTEXT_SIZE]), axis=1)
        request = linear(g, request, "fusion.request", weight[:, 2 * f :], bias)
        request = g.op("Unsqueeze", request, g.ints(1))  # (B, 1, d)
        if f:
            numeric = g.input("numeric", ["B", "N", f])
            missing = g.op("IsNaN", numeric)
            scaled = g.op("Sub", numeric, g.weight("numeric_mean", self.state["numeric_mean"]))
            scaled = g.op("Div", scaled, g.weight("numeric_std", self.state["numeric_std"]))
            scaled = g.op("Where", missing, g.weight("nought", np.array(0, np.float32)), scaled)
            lowest = g.weight("lowest", np.array(-10, np.float32))
            scaled = g.op("Clip", scaled, lowest, g.weight("highest", np.array(10, np.float32)))
            each = g.op("Reshape", g.op("Concat", scaled, g.op("Cast", missing, to=FLOAT), axis=-1), g.ints(-1, 2 * f))
            each = linear(g, each, "fusion.numeric", weight[:, : 2 * f], np.zeros_like(bias))
            request = g.op("Add", g.op("Reshape", each, g.op("Shape", candidates)), request)
        else:
            request = g.op("Expand", request, g.op("Shape", candidates))
        return g.op("Reshape", request, g.ints(-1, d))

    def personal(self, g: GraphBuilder, hidden: Stream, logits: str) -> str:
        """Add the term of the user's own weights to logits (B, N, heads). The input `meta` exists.

        A product with a constant sums each row of x * w, as `graph_check.py` allows no product of two inputs.
        """
        if not self.config.personal_heads:
            return logits
        h = self.hidden_width
        scale = g.weight("personal.scale", np.full(h, h**-0.5, np.float32))
        zero = g.weight("personal.zero", np.zeros(h, np.float32))
        x = g.op("LayerNormalization", hidden.rows, scale, zero, axis=-1, epsilon=1e-5)
        x = g.op("Reshape", x, hidden.shape)  # (B, N, h)
        first = self.meta_size
        for head in self.config.personal_heads:
            weights = g.op("Slice", "meta", g.ints(first), g.ints(first + h), g.ints(1))
            bias = g.op("Slice", "meta", g.ints(first + h), g.ints(first + h + 1), g.ints(1))
            weighted = g.op("Mul", x, g.op("Unsqueeze", weights, g.ints(1)))
            column = np.zeros(self.config.heads, np.float32)
            column[head] = 1.0
            summed = g.op("MatMul", weighted, g.weight(f"personal.{head}.sum", np.tile(column, (h, 1))))
            shift = g.op("Mul", g.op("Unsqueeze", bias, g.ints(1)), g.weight(f"personal.{head}.bias", column))
            logits = g.op("Add", logits, g.op("Add", summed, shift))
            first += h + 1
        return logits

    def state_inputs(self, g: GraphBuilder, prefix: str, length: str, first: int = 0) -> list[tuple[str, str]]:
        """Add graph inputs (B, length, width) for the keys and values of the blocks from `first` on."""
        state = []
        for i, (key_width, value_width) in list(enumerate(self.state_widths))[first:]:
            key = g.input(f"{prefix}key_{i}", ["B", length, key_width])
            state.append((key, g.input(f"{prefix}value_{i}", ["B", length, value_width])))
        return state

    def probabilities(self, g: GraphBuilder, logits: str, exit: str) -> str:
        """Add the output `probabilities` (B, N, heads), float64: the calibrated logits of `exit` through a sigmoid."""
        found = probabilities(g, logits, exit, self.calibrations[exit])
        return g.output("probabilities", found, ["B", "N", self.config.heads], DOUBLE)

    def encode(self) -> onnx.ModelProto:
        g = GraphBuilder("encode")
        d = self.config.width
        x = g.input("items", ["B", "T", d])
        actions = g.input("actions", ["B", "T"], INT)
        gaps = g.input("gaps", ["B", "T"], INT)
        length = g.input("length", ["B"], INT)
        past = self.state_inputs(g, "past_", "P")
        state, user = self.write_history(g, x, actions, gaps, length, past)
        for i, ((key, value), widths) in enumerate(zip(state, self.state_widths, strict=True)):
            g.output(f"key_{i}", key, ["B", "K", widths[0]])
            g.output(f"value_{i}", value, ["B", "K", widths[1]])
        g.output("user", user, ["B", d])
        return g.model()

    def dot(self) -> onnx.ModelProto:
        g = GraphBuilder("dot")
        d = self.config.width
        logits = self.dot_logits(g, g.input("candidates", ["B", "N", d]), g.input("user", ["B", d]))
        self.probabilities(g, logits, "dot")
        return g.model()

    def point(self) -> onnx.ModelProto:
        g = GraphBuilder("point")
        d = self.config.width
        heads = self.config.heads
        candidates = g.input("candidates", ["B", "N", d])
        fused = self.fused(g, candidates)
        user = g.input("user", ["B", d])
        state = self.state_inputs(g, "", "K", self.first_read)
        logits, hidden = self.read_history(g, candidates, fused, user, state, g.input("history_length", ["B"], INT))
        logits = self.personal(g, hidden, logits)
        logits = g.output("logits", logits, ["B", "N", heads])
        g.output("hidden", g.op("Reshape", hidden.rows, hidden.shape), ["B", "N", self.hidden_width])
        self.probabilities(g, logits, "point")
        return g.model()

    def set(self) -> onnx.ModelProto:
        g = GraphBuilder("set")
        heads = self.config.heads
        hidden = g.input("hidden", ["B", "N", self.hidden_width])
        logits = g.input("logits", ["B", "N", heads])
        logits = self.read_slate(g, self.stream(g, hidden), logits, g.input("set_length", ["B"], INT))
        self.probabilities(g, logits, "set")
        return g.model()

    def rank(self, items: np.ndarray, head_weights: Sequence[float]) -> onnx.ModelProto:
        """Build one graph of the whole ranker, for use in another server.

        Inputs: history, actions and gaps (B, L) and candidates (B, N) as row numbers; numeric (B, N, F), NaN for
        missing; meta (B, M); context (B, 4). Outputs: probabilities (B, N, heads) of the highest exit, and scores (B,
        N), the sum of the probabilities weighted by head_weights.
        """
        g = GraphBuilder("rank")
        exit = self.exits[-1]
        events = [g.input(name, ["B", "L"], INT) for name in ("history", "actions", "gaps")]
        candidates = g.op("Gather", g.weight("items", items), g.input("candidates", ["B", "N"], INT))
        batch = g.op("Concat", g.op("Shape", events[0], start=0, end=1), g.ints(1), axis=0)
        history, actions, gaps = (  # with the start token in front
            g.op("Concat", g.op("Expand", g.weight(f"start_{k}", np.array([[row]])), batch), column, axis=1)
            for k, (row, column) in enumerate(zip((START_ITEM, UNKNOWN_ACTION, GAP_MISSING), events, strict=True))
        )
        length = g.op("Expand", g.op("Shape", history, start=1, end=2), g.op("Shape", history, start=0, end=1))  # (B,)
        fused = self.fused(g, candidates)
        state, user = self.write_history(g, g.op("Gather", "items", history), actions, gaps, length, [])
        state = state[self.first_read :]
        logits, hidden = self.read_history(g, candidates, fused, user, state, length)
        logits = self.personal(g, hidden, logits)
        if exit == "set":
            slate = g.op("Expand", g.op("Shape", candidates, start=1, end=2), g.op("Shape", candidates, start=0, end=1))
            logits = self.read_slate(g, hidden, logits, slate)
        weighted = g.op(
            "MatMul", self.probabilities(g, logits, exit), g.weight("head_weights", np.array(head_weights, np.float64))
        )
        g.output("scores", weighted, ["B", "N"], DOUBLE)
        return g.model()

    def all(self) -> dict[str, onnx.ModelProto]:
        graphs = {"encode": self.encode(), "dot": self.dot(), "point": self.point()}
        return graphs | ({"set": self.set()} if "set" in self.exits else {})
