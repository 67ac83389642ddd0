"""Write the serving graphs of `dcn.py`, operator by operator. `late_fusion_onnx.py` lists their inputs and outputs.

The attention of a cross layer is the operator `Attention` with one batch row for each candidate: the numbers of its
three vectors are queries, keys and values of size 1. A product of two computed tensors is not allowed in a graph, see
`graph_check.py`.

Called by: `families.py`. Calls: `late_fusion_onnx.py`, `onnx_builder.py`, `dcn.py`. `evaluation/parity.py` compares the
graphs with the torch model.
"""

from __future__ import annotations

import numpy as np

from slatewise_train.rankers.base import Calibrations
from slatewise_train.rankers.dcn import Dcn, DcnConfig
from slatewise_train.rankers.late_fusion_onnx import LateFusionGraphs, Stream
from slatewise_train.rankers.onnx_builder import GraphBuilder, linear


class DcnGraphs(LateFusionGraphs):
    """Writes the graphs of one ranker. longest_history: not used, because the family has no positions."""

    config: DcnConfig

    def __init__(self, model: Dcn, calibrations: Calibrations, longest_history: int) -> None:
        d = model.config.width
        super().__init__(model, calibrations, [(d, d)])
        self.pieces: tuple[np.ndarray, ...] = ()  # slope, bends, knots and bias of the isotonic layer
        if model.isotonic is not None:
            slope, bends = (part.detach().numpy() for part in model.isotonic.pieces())
            self.pieces = slope, bends, self.state["isotonic.knots"], self.state["isotonic.bias"]

    def attention(self, g: GraphBuilder, query: str, key: str, value: str, length: str) -> str:
        """Let query (B, N, d) attend to the first length (B,) positions of key and value (B, K, d) -> (B * N, d)."""
        read = g.op("Attention", query, key, value, "", "", "", length, q_num_heads=1, kv_num_heads=1)
        return g.op("Reshape", read, g.ints(-1, self.config.width))

    def write_history(
        self, g: GraphBuilder, x: str, actions: str, gaps: str, length: str, past: list[tuple[str, str]]
    ) -> tuple[list[tuple[str, str]], str]:
        tokens = self.stream(g, self.tokens(g, x, actions, gaps))
        normed = self.norm(g, tokens.rows, "token_norm")
        key, value = (g.op("Reshape", self.layer(g, normed, name), tokens.shape) for name in ("key", "value"))
        first = g.ints(0)  # (1,): P
        if past:
            first = g.op("Shape", past[0][0], start=1, end=2)
            key, value = (g.op("Concat", old, new, axis=1) for old, new in zip(past[0], (key, value), strict=True))
        last = g.op("Unsqueeze", g.op("Sub", length, g.ints(1)), g.ints(1, 2))  # (B, 1, 1)
        newest = g.op("GatherND", g.op("Reshape", tokens.rows, tokens.shape), last, batch_dims=1)  # (B, 1, d)
        token = self.stream(g, newest)
        query = g.op("Reshape", self.layer(g, self.norm(g, token.rows, "token_norm"), "query"), token.shape)
        read = self.layer(g, self.attention(g, query, key, value, g.op("Add", first, length)), "out")
        return [(key, value)], self.norm(g, g.op("Add", token.rows, read), "user_norm")

    def read_history(
        self, g: GraphBuilder, candidates: str, fused: str, user: str, state: list[tuple[str, str]], length: str
    ) -> tuple[str, Stream]:
        x = self.stream(g, candidates)
        item = self.norm(g, x.rows, "item_norm")
        query = g.op("Reshape", self.layer(g, item, "item_query"), x.shape)
        read = self.norm(g, self.attention(g, query, *state[0], length), "read_norm")
        hidden = g.op("Concat", item, read, g.op("Mul", item, read), fused, axis=1)  # (B * N, 4 d)
        added = self.unstacked(g, self.point_logits(g, hidden), x.shape, self.config.heads)
        logits = g.op("Add", self.dot_logits(g, candidates, user), added)
        shape = g.op("Concat", g.op("Slice", x.shape, g.ints(0), g.ints(2)), g.ints(self.hidden_width), axis=0)
        return self.isotonic(g, logits) if self.pieces else logits, Stream(hidden, shape)

    def point_logits(self, g: GraphBuilder, hidden: str) -> str:
        """Return the term that the exit `point` adds: hidden states (rows, 4 d) -> (rows, heads)."""
        crossed = h = hidden
        for k in range(self.config.cross_layers):
            crossed = self.cross(g, f"crosses.{k}", hidden, crossed)
        for k in range(self.config.layers):
            h = g.op("Gelu", self.layer(g, h, f"layers.{k}.layer"))
            h = g.op("Mul", h, g.op("Sigmoid", self.layer(g, h, f"layers.{k}.gate")))
        if self.config.cross_layers:
            h = g.op("Concat", crossed, h, axis=1)
        return self.layer(g, h, "point_out")

    def cross(self, g: GraphBuilder, name: str, first: str, x: str) -> str:
        """Add a cross layer: first and x (rows, 4 d) -> (rows, 4 d)."""
        low = self.thin(g, x, f"{name}.low.first")
        if self.config.cross_attention:
            parts = (self.thin(g, x, f"{name}.query"), self.thin(g, x, f"{name}.key"), low)
            columns = (g.op("Reshape", part, g.ints(-1, self.config.cross_rank, 1)) for part in parts)
            scale = 1 / self.config.temperature
            read = g.op("Attention", *columns, q_num_heads=1, kv_num_heads=1, scale=scale)
            low = g.op("Add", low, g.op("Reshape", read, g.ints(-1, self.config.cross_rank)))
        return g.op("Add", g.op("Mul", first, self.layer(g, low, f"{name}.low.second")), x)

    def thin(self, g: GraphBuilder, x: str, name: str) -> str:
        """Add a layer without a bias: (rows, 4 d) -> (rows, rank)."""
        return linear(g, x, name, self.state[f"{name}.weight"], None)

    def isotonic(self, g: GraphBuilder, logits: str) -> str:
        """Add the isotonic layer: (B, N, heads) -> (B, N, heads).

        The bends of all heads are one product with a block-diagonal weight.
        """
        slope, bends, knots, bias = self.pieces
        heads = len(slope)
        result = g.op("Add", g.op("Mul", logits, g.weight("isotonic.slope", slope)), g.weight("isotonic.bias", bias))
        if not len(knots):
            return result
        over = g.op("Sub", g.op("Unsqueeze", logits, g.ints(3)), g.weight("isotonic.knots", knots))
        over = g.op("Reshape", g.op("Relu", over), g.ints(-1, heads * len(knots)))
        blocks = np.zeros((heads, heads, len(knots)), np.float32)
        blocks[np.arange(heads), np.arange(heads)] = bends
        bent = linear(g, over, "isotonic.bends", blocks.reshape(heads, -1), None)
        return g.op("Add", result, g.op("Reshape", bent, g.op("Shape", logits)))
