"""Exploration for the family `ligr`: the input of the last layer of `point`, and the graph that adds a draw to it.

    explore  hidden (B,N,d) logits (B,N,heads) drawn (B,heads,2d+1) -> moved logits, probabilities (B,N,heads)

`hidden` and `logits` are those of the graph `point`, so `point` and `set` stay as they are. The draw has a weight for
each of the 2d inputs of the layer `point_down`, and one for its bias. `inference/exploration.py` makes it.

Called by: `families.py`. Calls: `ligr.py`, `ligr_onnx.py`, `onnx_builder.py`.
"""

from __future__ import annotations

import onnx
from torch import Tensor
from torch.nn import functional as F

from slatewise_train.rankers.base import Calibrations
from slatewise_train.rankers.ligr import Ligr
from slatewise_train.rankers.ligr_onnx import LigrGraphs
from slatewise_train.rankers.onnx_builder import GraphBuilder


def features(model: Ligr, hidden: Tensor) -> Tensor:
    """Return the input of the last layer of the exit `point`: hidden states (..., d) -> (..., 2d)."""
    return F.gelu(model.point_up(model.point_norm(hidden)))


def graph(model: Ligr, calibrations: Calibrations) -> onnx.ModelProto:
    """Build the graph `explore`. calibrations: those of the variant's exit `point`."""
    graphs = LigrGraphs(model, calibrations, 0)
    g = GraphBuilder("explore")
    d = model.config.width
    heads = model.config.heads
    x = graphs.stream(g, g.input("hidden", ["B", "N", d]))
    up = g.op("Gelu", graphs.layer(g, graphs.norm(g, x.rows, "point_norm"), "point_up"))
    up = graphs.unstacked(g, up, x.shape, 2 * d)
    logits = g.input("logits", ["B", "N", heads])
    # (B, 2d+1, heads): the weights of each head as a column, the bias behind them
    drawn = g.op("Transpose", g.input("drawn", ["B", heads, 2 * d + 1]), perm=[0, 2, 1])
    weights = g.op("Slice", drawn, g.ints(0), g.ints(2 * d), g.ints(1))
    bias = g.op("Slice", drawn, g.ints(2 * d), g.ints(2 * d + 1), g.ints(1))
    moved = g.op("Add", logits, g.op("Add", g.op("MatMul", up, weights), bias))
    moved = g.output("moved", moved, ["B", "N", heads])
    graphs.probabilities(g, moved, "point")
    return g.model()
