"""Write the serving graphs of `ligr.py`, operator by operator. `late_fusion_onnx.py` lists their inputs and outputs.

Attention is one operator without a mask (`Attention`, opset 24). Every dense layer is one `Gemm`, or two if
`compression/low_rank.py` factored it. `compression/quantize.py` replaces these nodes.

Called by: `families.py`. Calls: `late_fusion_onnx.py`, `onnx_builder.py`, `ligr.py`. `evaluation/parity.py` compares
the graphs with the torch model.
"""

from __future__ import annotations

import numpy as np

from slatewise_train.rankers.base import Calibrations
from slatewise_train.rankers.late_fusion_onnx import LateFusionGraphs, Stream
from slatewise_train.rankers.ligr import Ligr, LigrConfig
from slatewise_train.rankers.onnx_builder import GraphBuilder


class LigrGraphs(LateFusionGraphs):
    """Writes the graphs of one ranker. longest_history: the number of events that the rotary tables cover."""

    config: LigrConfig

    def __init__(self, model: Ligr, calibrations: Calibrations, longest_history: int) -> None:
        state_widths = [(model.config.key_width, model.config.value_width)] * model.config.blocks
        super().__init__(model, calibrations, state_widths, model.config.first_decoder_block)
        self.blocks = len(model.blocks)
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

    def write_history(
        self, g: GraphBuilder, x: str, actions: str, gaps: str, length: str, past: list[tuple[str, str]]
    ) -> tuple[list[tuple[str, str]], str]:
        x = self.tokens(g, x, actions, gaps)
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
        x = self.stream(g, candidates)
        position = g.op("Unsqueeze", length, g.ints(1))  # (B, 1): all candidates are at the position after the history
        for i, (key, value) in enumerate(state, start=self.first_read):
            query = self.rotate_alike(g, self.queries(g, x, f"blocks.{i}"), x.shape, position)
            x = self.block(g, x, f"blocks.{i}", self.attention(g, query, key, value, length))
        hidden = Stream(g.op("Add", x.rows, fused), x.shape)
        up = g.op("Gelu", self.layer(g, self.norm(g, hidden.rows, "point_norm"), "point_up"))
        added = self.layer(g, up, "point_down")
        dot = self.dot_logits(g, candidates, user)
        return g.op("Add", dot, self.unstacked(g, added, x.shape, self.config.heads)), hidden

    def read_slate(self, g: GraphBuilder, x: Stream, logits: str, length: str) -> str:
        for i in range(self.set_blocks):
            name = f"set_blocks.{i}"
            key, value = self.keys_values(g, x, name, None)
            x = self.block(g, x, name, self.attention(g, self.queries(g, x, name), key, value, length))
        out = self.layer(g, self.norm(g, x.rows, "set_norm"), "set_out")
        return g.op("Add", logits, self.unstacked(g, out, x.shape, self.config.heads))
