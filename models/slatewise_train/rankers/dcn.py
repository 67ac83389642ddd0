"""The ranker family `dcn`: residual DCN with dense gates and an isotonic layer (LiRank, arXiv 2402.06859) in torch.

- The history is one layer of keys and values. The user vector is the newest event, and what it reads of all events.
- A candidate reads the history with a query of its own (DIN, arXiv 1706.06978). Its features are four vectors: the
  item, what it read, the product of both, and the late fusion of numeric features, meta-embedding and context.
- Cross layers multiply all features: x0 * (U (V x) + b) + x, of low rank (DCNv2, arXiv 2008.13535). Residual DCN adds
  queries and keys of the size of V x. Their attention over the numbers of V x is added to V x.
- Beside the cross layers, a multilayer perceptron has a gate after each layer: h * sigmoid(W h) (GateNet, arXiv
  2007.03519).
- The isotonic layer maps the logits of the exit `point`. It is piecewise linear and increasing, and is trained with the
  rest, so that probabilities are calibrated without a map that is fitted later.

Without cross layers the family is a gated perceptron; without attention in them it is DCNv2. There is no exit `set`.

Called by: `families.py`, `dcn_onnx.py` (the same equations as ONNX). Calls: `late_fusion.py`, and `base.py`, which
defines the letters in shapes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slatewise_train.config_values import number
from slatewise_train.rankers.base import EXITS, EncodedHistory, RankerConfig
from slatewise_train.rankers.late_fusion import LateFusion
from slatewise_train.rankers.layers import LowRank

PARTS = 4  # vectors of a candidate: item, what it read, their product, late fusion
FARTHEST_KNOT = 4.0  # logits; the isotonic layer is linear beyond its outermost knots


@dataclass(frozen=True)
class DcnConfig(RankerConfig):
    """The TOML's table `[model]` and sizes that follow from the data."""

    width: int = number(64, least=1, most=8192)
    cross_layers: int = number(2, least=0, most=100)  # 0: the perceptron alone
    cross_rank: int = number(16, least=1, most=8192)
    cross_attention: bool = True  # residual DCN; false: DCNv2
    temperature: float = number(1.0, least=0.01, most=100)  # of that attention
    layers: int = number(2, least=1, most=100)  # of the perceptron
    units: int = number(128, least=1, most=65536)  # of each of these layers
    calibration_buckets: int = number(16, least=0, most=1000)  # pieces of the isotonic layer; 0: no such layer
    meta_size: int = number(16, least=1, most=8192)
    dropout: float = number(0.1, least=0, most=0.9)
    # Share of an item's fields whose whole vector is dropped in training. A field of few values would overfit.
    field_dropout: float = number(0.0, least=0, most=0.9)


class Cross(nn.Module):
    """A cross layer of low rank, with attention between its two thin layers if `temperature` is not None."""

    def __init__(self, size: int, rank: int, temperature: float | None) -> None:
        super().__init__()
        self.low = LowRank(size, rank, size)
        self.temperature = temperature
        if temperature is not None:
            self.query = nn.Linear(size, rank, bias=False)
            self.key = nn.Linear(size, rank, bias=False)

    def forward(self, first: Tensor, x: Tensor) -> Tensor:
        """first, x: (..., size), the input of the first cross layer and of this one -> (..., size)."""
        low = self.low.first(x)
        if self.temperature is not None:
            products = self.query(x)[..., :, None] * self.key(x)[..., None, :]  # (..., rank, rank)
            read = torch.softmax(products / self.temperature, dim=-1) @ low[..., None]
            low = low + read[..., 0]
        crossed: Tensor = first * self.low.second(low) + x
        return crossed


class GatedLayer(nn.Module):
    """A layer of the perceptron: h * sigmoid(W h) for h = GELU(V x)."""

    def __init__(self, size: int, units: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, units)
        self.gate = nn.Linear(units, units)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.layer(x))
        return h * torch.sigmoid(self.gate(h))


class Isotonic(nn.Module):
    """An increasing, piecewise linear map of each head's logits, at first the identity.

    The slope of a piece is a softplus, where LiRank has a ReLU: a slope of 0 would give equal scores to different
    logits, and would have no gradient.
    """

    def __init__(self, heads: int, buckets: int) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(-FARTHEST_KNOT, FARTHEST_KNOT, buckets + 1)[1:-1])
        one = torch.tensor(1.0).expm1().log()  # whose softplus is 1
        self.raw = nn.Parameter(one.expand(heads, buckets).clone())
        self.bias = nn.Parameter(torch.zeros(heads))

    def pieces(self) -> tuple[Tensor, Tensor]:
        """Return the slope of the lowest piece (heads,), and the change of slope at each knot (heads, buckets - 1)."""
        slopes = F.softplus(self.raw)
        return slopes[:, 0], slopes.diff()

    def forward(self, logits: Tensor) -> Tensor:
        """logits: (..., heads) -> (..., heads)."""
        slope, bends = self.pieces()
        knots = self.get_buffer("knots")
        return self.bias + slope * logits + ((logits[..., None] - knots).clamp(min=0) * bends).sum(-1)


class Dcn(LateFusion):
    """A ranker of the family `dcn`. Its hidden states are the candidates' features: h = 4 d."""

    family = "dcn"
    config: DcnConfig

    def __init__(
        self, config: DcnConfig, field_values: dict[str, Tensor], numeric_mean: Tensor, numeric_std: Tensor
    ) -> None:
        sizes = config.meta_size, config.dropout, config.field_dropout
        super().__init__(config, field_values, numeric_mean, numeric_std, *sizes)
        d = config.width
        self.token_norm = nn.LayerNorm(d)
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))
        self.user_norm = nn.LayerNorm(d)
        self.fusion = self.fusion_layer()
        self.item_norm = nn.LayerNorm(d)
        self.item_query = nn.Linear(d, d)
        self.read_norm = nn.LayerNorm(d)
        temperature = config.temperature if config.cross_attention else None
        h = PARTS * d
        self.crosses = nn.ModuleList(Cross(h, config.cross_rank, temperature) for _ in range(config.cross_layers))
        sizes_in = [h, *[config.units] * (config.layers - 1)]
        self.layers = nn.ModuleList(GatedLayer(size, config.units) for size in sizes_in)
        self.point_out = nn.Linear((h if config.cross_layers else 0) + config.units, config.heads)
        self.isotonic = Isotonic(config.heads, config.calibration_buckets) if config.calibration_buckets else None
        self.draw_weights()
        nn.init.zeros_(self.point_out.weight)  # before training, every exit gives the logits of `dot`

    @property
    def exits(self) -> tuple[str, ...]:
        return EXITS[:-1]

    @property
    def hidden_size(self) -> int:
        return PARTS * self.config.width

    def resized(self, config: DcnConfig) -> "Dcn":
        return Dcn(config, *self.item_columns())

    def encode(self, x: Tensor) -> tuple[EncodedHistory, Tensor]:
        normed = self.token_norm(x)
        query, key, value = (layer(normed)[:, None] for layer in (self.query, self.key, self.value))  # (B, 1, T, d)
        read = F.scaled_dot_product_attention(query, key, value, is_causal=True)[:, 0]
        return [(key, value)], self.user_norm(x + self.dropout(self.out(read)))

    def fuse(self, numeric: Tensor, meta: Tensor, context: Tensor) -> Tensor:
        return self.last_part(super().fuse(numeric, meta, context))

    def meta_shift(self, meta: Tensor) -> Tensor:
        return self.last_part(self.fused_meta(meta))

    def last_part(self, fused: Tensor) -> Tensor:
        """Return hidden states whose other parts are zero: (..., d) -> (..., 4 d)."""
        return F.pad(fused, ((PARTS - 1) * self.config.width, 0))

    def hidden(
        self, vectors: Tensor, history: EncodedHistory, positions: Tensor, mask: Tensor | None, fused: Tensor
    ) -> Tensor:
        ((key, value),) = history
        item = self.item_norm(self.dropout(vectors))
        read = F.scaled_dot_product_attention(self.item_query(item)[:, None], key, value, attn_mask=mask)[:, 0]
        read = self.read_norm(read)
        return F.pad(torch.cat([item, read, item * read], dim=-1), (0, self.config.width)) + fused

    def point_logits(self, hidden: Tensor) -> Tensor:
        found = []
        crossed = h = hidden
        for cross in self.crosses:
            crossed = cross(hidden, crossed)
        if self.crosses:
            found.append(crossed)
        for layer in self.layers:
            h = self.dropout(layer(h))
        logits: Tensor = self.point_out(torch.cat([*found, h], dim=-1))
        return logits

    def point(self, dot: Tensor, hidden: Tensor) -> Tensor:
        logits = super().point(dot, hidden)
        return logits if self.isotonic is None else self.isotonic(logits)

    def set_logits(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        raise NotImplementedError("the family has no exit set")
