"""Write the serving graphs of `ligr.py`, operator by operator. All inputs have a batch axis B.

    encode   items (B,T,d) actions gaps (B,T) length (B,) past_key_<i> (B,P,key width) past_value_<i> (B,P,value width)
             -> key_<i> value_<i> (B,P+T,...), user (B,d)
    dot      candidates (B,N,d) user (B,d)                        -> probabilities (B,N,heads)
    point    candidates numeric (B,N,F) meta (B,M) context (B,4) user
             key_<i> value_<i> (B,K,...) of the last `decoder_blocks` blocks
             history_length (B,)                                  -> probabilities, logits, hidden (B,N,d)
    set      hidden (B,N,d) logits (B,N,heads) set_length (B,)    -> probabilities

Rows of a batch are padded on the right; `length`, `history_length` and `set_length` are the lengths without padding.
The server does not pad single requests. All rows of one `encode` call have the same past length P. Events attend only
to earlier positions, so they do not read the padding after them.

The first position of every history is the start token (item row 1, action 0, gap 0, no past). The engine encodes it
once, uses the result as the state of an empty history, and extends it by the events of other histories.

Attention is one operator without a mask (`Attention`, opset 24). Every dense layer is one `Gemm`, or two if
`compression/low_rank.py` factored it. `compression/quantize.py` replaces these nodes.

Called by: `families.py`. Calls: `onnx_builder.py`, `ligr.py`. `evaluation/parity.py` compares the graphs with the torch
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from slatewise.inference.arrays import CONTEXT_SIZE, GAP_MISSING, START_ITEM, UNKNOWN_ACTION
from slatewise_train.rankers.base import Calibrations, RankerGraphs
from slatewise_train.rankers.ligr import Ligr
from slatewise_train.rankers.onnx_builder import DOUBLE, FLOAT, INT, GraphBuilder, linear, probabilities


@dataclass(frozen=True)
class Stream:
    """Tokens between blocks, stacked into rows, so that a dense layer is one GEMM."""

    rows: str  # (B * N, d)
    shape: str  # int64 vector [B, N, d]


class LigrGraphs(RankerGraphs):
    """Writes the graphs of one ranker. longest_history: the number of events that the rotary tables cover."""

    def __init__(self, model: Ligr, calibrations: Calibrations, longest_history: int) -> None:
        self.config = model.config
        self.calibrations = calibrations
        self.state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
        self.blocks = len(model.blocks)
        self.first_decoder_block = model.config.first_decoder_block
        self.set_blocks = len(model.set_blocks)
        self.heads = model.config.attention_heads
        self.key_heads = model.config.key_heads or model.config.attention_heads
        self.query_size = model.config.query_width // self.heads  # of one query or key head
        half = self.query_size // 2
        frequencies = 10_000.0 ** (-np.arange(half) / half)
        self.rotary_factors = {
            "positions": np.arange(longest_history + 2)[:, None].astype(np.float32),
            "frequencies": frequencies.astype(np.float32),
        }

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

    def rotate(self, g: GraphBuilder, x: str, positions: str, heads: int) -> str:
        """Rotate x (B, T, heads * D) to positions (B, T)."""
        return g.op("RotaryEmbedding", x, *self.rotary(g), positions, num_heads=heads)

    def rotate_alike(self, g: GraphBuilder, x: str, shape: str, position: str) -> str:
        """Apply the rotary embedding of one position (B, 1) to all N rows of x (B, N, H * D).

        shape: the vector [B, N, d]. ONNX Runtime does not accept more rows than positions, so the rows are passed as
        heads.
        """
        heads = g.op("Reshape", x, g.ints(0, -1, 1, self.query_size))  # (B, N * H, 1, D)
        return self.unstacked(
            g, g.op("RotaryEmbedding", heads, *self.rotary(g), position), shape, self.config.query_width
        )

    def rotary(self, g: GraphBuilder) -> tuple[str, str]:
        """Return the cosine and sine tables (positions, D/2).

        ONNX Runtime computes them from their factors when it loads the graph. Stored as constants they would be a
        quarter of a small int8 variant's size.
        """
        if "rotary" not in g.shared:
            angle = g.op("Mul", *(g.weight(f"rotary.{name}", array) for name, array in self.rotary_factors.items()))
            g.shared["rotary"] = g.op("Cos", angle), g.op("Sin", angle)
        cosine, sine = g.shared["rotary"]
        return cosine, sine

    def keys_values(self, g: GraphBuilder, x: Stream, block: str, positions: str | None) -> tuple[str, str]:
        """Return keys (B, N, key width) and values (B, N, value width).

        Keys are rotated to positions (B, N), unless positions is None.
        """
        normed = self.norm(g, x.rows, f"{block}.attention_norm")
        widths = {"key": self.config.key_width, "value": self.config.value_width}
        key, value = (
            self.unstacked(g, self.layer(g, normed, f"{block}.{part}"), x.shape, width)
            for part, width in widths.items()
        )
        return (key if positions is None else self.rotate(g, key, positions, self.key_heads)), value

    def unstacked(self, g: GraphBuilder, rows: str, shape: str, width: int) -> str:
        """Reshape rows (B * N, width) to (B, N, width). shape: the vector [B, N, d]."""
        if width != self.config.width:
            shape = g.op("Concat", g.op("Slice", shape, g.ints(0), g.ints(2)), g.ints(width), axis=0)
        return g.op("Reshape", rows, shape)

    def attention(self, g: GraphBuilder, query: str, key: str, value: str, length: str, causal: bool = False) -> str:
        """Let query (B, N, ...) attend to the first length (B,) positions of key and value (B, K, ...) -> (B, N, d).

        causal: the last of the N queries attends to all of these positions, the one before it to all but one, and so
        on.
        """
        heads = {"q_num_heads": self.heads, "kv_num_heads": self.key_heads}
        return g.op("Attention", query, key, value, "", "", "", length, is_causal=int(causal), **heads)

    def queries(self, g: GraphBuilder, x: Stream, block: str) -> str:
        """Return queries (B, N, query width), not rotated."""
        normed = self.norm(g, x.rows, f"{block}.attention_norm")
        return self.unstacked(g, self.layer(g, normed, f"{block}.query"), x.shape, self.config.query_width)

    def block(self, g: GraphBuilder, x: Stream, block: str, read: str) -> Stream:
        """Add the rest of a gated block after its attention. read: (B, N, d), the result of the attention."""
        attended = self.layer(g, g.op("Reshape", read, g.ints(-1, self.config.width)), f"{block}.out")
        rows = self.gated(g, x.rows, attended, f"{block}.attention_gate")
        fed = g.op("Gelu", self.layer(g, self.norm(g, rows, f"{block}.feed_forward_norm"), f"{block}.up"))
        return Stream(self.gated(g, rows, self.layer(g, fed, f"{block}.down"), f"{block}.feed_forward_gate"), x.shape)

    def gated(self, g: GraphBuilder, x: str, change: str, gate: str) -> str:
        """Return x + change * sigmoid(gate(x)), all (rows, d)."""
        return g.op("Add", x, g.op("Mul", change, g.op("Sigmoid", self.layer(g, x, gate))))

    def dot_logits(self, g: GraphBuilder, candidates: str, user: str) -> str:
        """Return logits of the exit `dot`: candidates (B, N, d), user (B, d) -> (B, N, heads)."""
        column = g.op("MatMul", candidates, g.op("Unsqueeze", user, g.ints(2)))  # (B, N, 1)
        scale, bias = (g.weight(name, self.state[name]) for name in ("dot_scale", "dot_bias"))
        return g.op("Add", g.op("Mul", column, scale), bias)

    def write_history(
        self, g: GraphBuilder, x: str, actions: str, gaps: str, length: str, past: list[tuple[str, str]]
    ) -> tuple[list[tuple[str, str]], str]:
        """Encode events that follow a past.

        x: item vectors (B, T, d); actions, gaps: (B, T); past: keys and values (B, P, ...) of each block, or an empty
        list without a past. Returns keys and values (B, P + T, ...) of each block, and the user vector (B, d).
        """
        x = g.op("Add", x, g.op("Gather", g.weight("action", self.state["action.weight"]), actions))
        x = g.op("Add", x, g.op("Gather", g.weight("gap", self.state["gap.weight"]), gaps))
        first = g.op("Shape", past[0][0], start=1, end=2) if past else g.ints(0)  # (1,): P
        steps = g.op("Squeeze", g.op("Shape", actions, start=1, end=2))  # T
        steps = g.op("Range", g.weight("zero", np.array(0, np.int64)), steps, g.weight("one", np.array(1, np.int64)))
        positions = g.op("Expand", g.op("Add", first, steps), g.op("Shape", actions))  # (B, T)
        # (1,): P + T, which counts padding too; a causal query does not read the padding after it
        written = g.op("Add", first, g.op("Shape", actions, start=1, end=2))
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
                query = self.rotate(g, self.queries(g, tokens, name), positions, self.heads)
                tokens = self.block(g, tokens, name, self.attention(g, query, key, value, written, causal=True))
        # In the last block only the newest position needs more than its key and value.
        last = g.op("Unsqueeze", g.op("Sub", length, g.ints(1)), g.ints(1))  # (B, 1)
        newest = g.op(
            "GatherND", g.op("Reshape", tokens.rows, tokens.shape), g.op("Unsqueeze", last, g.ints(2)), batch_dims=1
        )  # (B, 1, d)
        readable = g.op("Add", first, length)  # (B,)
        position = g.op("Add", first, last)  # (B, 1)
        token = self.stream(g, newest)
        name = f"blocks.{self.blocks - 1}"
        query = self.rotate(g, self.queries(g, token, name), position, self.heads)
        token = self.block(g, token, name, self.attention(g, query, *state[-1], readable))
        return state, self.norm(g, token.rows, "user_norm")

    def read_history(
        self, g: GraphBuilder, candidates: str, fused: str, user: str, state: list[tuple[str, str]], length: str
    ) -> tuple[str, Stream]:
        """Let candidates' vectors (B, N, d) attend to the first length (B,) positions of the encoded history.

        state: keys and values of the candidates' blocks. Returns the logits (B, N, heads) of the exit `point`, and the
        hidden states.
        """
        x = self.stream(g, candidates)
        position = g.op("Unsqueeze", length, g.ints(1))  # (B, 1): all candidates are at the position after the history
        for i, (key, value) in enumerate(state, start=self.first_decoder_block):
            query = self.rotate_alike(g, self.queries(g, x, f"blocks.{i}"), x.shape, position)
            x = self.block(g, x, f"blocks.{i}", self.attention(g, query, key, value, length))
        hidden = Stream(g.op("Add", x.rows, fused), x.shape)
        up = g.op("Gelu", self.layer(g, self.norm(g, hidden.rows, "point_norm"), "point_up"))
        added = self.layer(g, up, "point_down")
        dot = self.dot_logits(g, candidates, user)
        return g.op("Add", dot, self.unstacked(g, added, x.shape, self.config.heads)), hidden

    def fused(self, g: GraphBuilder, candidates: str) -> str:
        """Add the late fusion: (B * N, d).

        The request's part is computed once, the candidates' part for each candidate.
        """
        f = self.config.numeric
        m = self.config.meta_size
        d = self.config.width
        weight = self.state["fusion.weight"]
        bias = self.state["fusion.bias"]  # columns of the weight: scaled, missing, meta, context
        request = g.op("Concat", g.input("meta", ["B", m]), g.input("context", ["B", CONTEXT_SIZE]), axis=1)
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

    def read_slate(self, g: GraphBuilder, x: Stream, logits: str, length: str) -> str:
        """Let the first length (B,) candidates of a slate attend to each other.

        logits: (B, N, heads) of the exit `point`. Returns logits (B, N, heads) of the exit `set`.
        """
        for i in range(self.set_blocks):
            name = f"set_blocks.{i}"
            key, value = self.keys_values(g, x, name, None)
            x = self.block(g, x, name, self.attention(g, self.queries(g, x, name), key, value, length))
        out = self.layer(g, self.norm(g, x.rows, "set_norm"), "set_out")
        return g.op("Add", logits, self.unstacked(g, out, x.shape, self.config.heads))

    def state_inputs(self, g: GraphBuilder, prefix: str, length: str, first: int = 0) -> list[tuple[str, str]]:
        """Add graph inputs (B, length, width) for the keys and values of the blocks from `first` on."""
        state = []
        for i in range(first, self.blocks):
            key = g.input(f"{prefix}key_{i}", ["B", length, self.config.key_width])
            state.append((key, g.input(f"{prefix}value_{i}", ["B", length, self.config.value_width])))
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
        for i, (key, value) in enumerate(state):
            g.output(f"key_{i}", key, ["B", "K", self.config.key_width])
            g.output(f"value_{i}", value, ["B", "K", self.config.value_width])
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
        state = self.state_inputs(g, "", "K", self.first_decoder_block)
        logits, hidden = self.read_history(g, candidates, fused, user, state, g.input("history_length", ["B"], INT))
        logits = g.output("logits", logits, ["B", "N", heads])
        g.output("hidden", g.op("Reshape", hidden.rows, hidden.shape), ["B", "N", d])
        self.probabilities(g, logits, "point")
        return g.model()

    def set(self) -> onnx.ModelProto:
        g = GraphBuilder("set")
        d = self.config.width
        heads = self.config.heads
        hidden = g.input("hidden", ["B", "N", d])
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
        exit = "set" if self.set_blocks else "point"
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
        state = state[self.first_decoder_block :]
        logits, hidden = self.read_history(g, candidates, fused, user, state, length)
        if self.set_blocks:
            slate = g.op("Expand", g.op("Shape", candidates, start=1, end=2), g.op("Shape", candidates, start=0, end=1))
            logits = self.read_slate(g, hidden, logits, slate)
        weighted = g.op(
            "MatMul", self.probabilities(g, logits, exit), g.weight("head_weights", np.array(head_weights, np.float64))
        )
        g.output("scores", weighted, ["B", "N"], DOUBLE)
        return g.model()

    def all(self) -> dict[str, onnx.ModelProto]:
        graphs = {"encode": self.encode(), "dot": self.dot(), "point": self.point()}
        return graphs | ({"set": self.set()} if self.set_blocks else {})
