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
        return self.isotonic(g, logits, fused), Stream(hidden, shape)

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

    def isotonic(self, g: GraphBuilder, logits: str, fused: str) -> str:
        """Add the isotonic layer, if there is one: logits (B, N, heads), fused (B * N, d) -> (B, N, heads)."""
        if not self.config.calibration_buckets:
            return logits
        knots = self.state["isotonic.knots"]
        over = g.op("Unsqueeze", logits, g.ints(3))  # (B, N, heads, 1)
        if len(knots):
            over = g.op("Relu", g.op("Sub", over, g.weight("isotonic.knots", knots)))
        over = g.op("Reshape", over, g.ints(-1, self.config.heads * max(1, len(knots))))
        if self.config.calibration_features:
            return self.map_by_features(g, logits, over, fused)
        slopes = np.logaddexp(0, self.state["isotonic.raw"]).astype(np.float32)  # softplus
        slope, bias = g.weight("isotonic.slope", slopes[:, 0]), g.weight("isotonic.bias", self.state["isotonic.bias"])
        result = g.op("Add", g.op("Mul", logits, slope), bias)
        if not len(knots):
            return result
        bent = linear(g, over, "isotonic.bends", self.sums(np.diff(slopes)), None)
        return g.op("Add", result, g.op("Reshape", bent, g.op("Shape", logits)))

    def map_by_features(self, g: GraphBuilder, logits: str, over: str, fused: str) -> str:
        """Add the map of each candidate: over (B * N, heads * knots), how far a logit is above each knot."""
        heads, buckets = self.config.heads, self.config.calibration_buckets
        bias = np.concatenate([self.state["isotonic.raw"], self.state["isotonic.bias"][:, None]], axis=1)
        added = linear(g, fused, "isotonic.features", self.state["isotonic.features.weight"], bias.ravel())
        added = g.op("Reshape", added, g.ints(-1, heads, buckets + 1))

        def columns(values: str, first: int, last: int) -> str:
            return g.op("Slice", values, g.ints(first), g.ints(last), g.ints(2))

        slopes = g.op("Softplus", columns(added, 0, buckets))
        shape = g.op("Shape", logits)
        first = g.op("Reshape", columns(slopes, 0, 1), shape)
        result = g.op("Add", g.op("Mul", logits, first), g.op("Reshape", columns(added, buckets, buckets + 1), shape))
        if buckets == 1:
            return result
        bends = g.op("Sub", columns(slopes, 1, buckets), columns(slopes, 0, buckets - 1))
        bends = g.op("Mul", over, g.op("Reshape", bends, g.ints(-1, heads * (buckets - 1))))
        bent = linear(g, bends, "isotonic.sums", self.sums(np.ones((heads, buckets - 1))), None)
        return g.op("Add", result, g.op("Reshape", bent, shape))

    def sums(self, weights: np.ndarray) -> np.ndarray:
        """Return the weight of each head's weighted sum over its knots: (heads, K) -> (heads, heads * K)."""
        heads, count = weights.shape
        blocks = np.zeros((heads, heads, count), np.float32)
        blocks[np.arange(heads), np.arange(heads)] = weights
        return blocks.reshape(heads, -1)
