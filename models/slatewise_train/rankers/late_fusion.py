"""The part of a ranker that families share: item vectors, tokens of the history, the dot product and the late fusion.

- An item's vector is the sum of its row and, for each field, the mean row of its values.
- A token of the history is the item's vector plus rows for the action and for the time since the event before.
- Numeric features, meta-embedding and request context pass one layer, whose result joins the candidates after they have
  read the history (late fusion).

Called by: `ligr.py`, `dcn.py`. Calls: `base.py`, which defines the letters in shapes, and `layers.py`.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slatewise.inference.arrays import CONTEXT_SIZE, GAP_BUCKETS, START_ITEM, UNKNOWN_ITEM
from slatewise_train.rankers.base import RankerConfig, RankerModel
from slatewise_train.rankers.layers import Dropout, init_low_rank


def key_of(name: str) -> str:
    """Return the key of a column in the state dict. It is the name, unless torch refuses that: `type`, `brand.name`.

    Different columns have different keys.
    """
    if "." not in name and not name.startswith("%") and not hasattr(nn.ModuleDict(), name):
        return name
    return "%" + name.replace("%", "%25").replace(".", "%2E")


class LateFusion(RankerModel):
    """A ranker without its blocks. A family adds them, and a layer `fusion` of `fusion_layer` at its place among them.

    field_values, numeric_mean and numeric_std, as in `families.ItemColumns`, become buffers. The config of a family has
    `meta_size`, `dropout` and `field_dropout`.
    """

    fusion: nn.Linear

    def __init__(
        self,
        config: RankerConfig,
        field_values: dict[str, Tensor],
        numeric_mean: Tensor,
        numeric_std: Tensor,
        meta_size: int,
        dropout: float,
        field_dropout: float,
    ) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.item = nn.Embedding(config.items, d)
        self.field = nn.ModuleDict({key_of(name): nn.Embedding(rows, d) for name, rows in config.fields.items()})
        self.action = nn.Embedding(config.actions, d)
        self.gap = nn.Embedding(GAP_BUCKETS, d)
        for name, rows in field_values.items():
            key = key_of(name)
            self.register_buffer(f"values_{key}", rows)  # (items, V)
            self.register_buffer(f"flat_{key}", rows[rows > 0], persistent=False)  # without the padding
            self.register_buffer(f"count_{key}", (rows > 0).sum(1), persistent=False)  # (items,)
        self.dot_scale = nn.Parameter(torch.ones(config.heads))
        self.dot_bias = nn.Parameter(torch.zeros(config.heads))
        self.register_buffer("numeric_mean", numeric_mean)
        self.register_buffer("numeric_std", numeric_std)
        self.default_meta = nn.Parameter(torch.zeros(meta_size))
        self.dropout = Dropout(dropout)
        self.field_dropout = field_dropout

    @property
    def hidden_size(self) -> int:
        return self.config.width

    def fusion_layer(self) -> nn.Linear:
        return nn.Linear(2 * self.config.numeric + self.meta_size + CONTEXT_SIZE, self.config.width)

    def draw_weights(self) -> None:
        """Give all embeddings and linear layers random weights."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.width**-0.5)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        init_low_rank(self)

    def field_table(self, name: str) -> Tensor:
        return self.field[key_of(name)].get_parameter("weight")

    def field_vectors(self, name: str, rows: Tensor) -> Tensor:
        """Return the mean vector of the items' values of a field, or row 0 of the field without values: (n, d).

        rows: (n,) of the items. The time follows the number of values of these items, not the most values of one item.
        """
        table = self.field_table(name)
        counts = self.get_buffer(f"count_{key_of(name)}")
        count = counts[rows]  # (n,)
        starts = count.cumsum(0) - count
        shift = (counts.cumsum(0) - counts)[rows] - starts  # from a place in this result to its place in the buffer
        places = torch.arange(int(count.sum()), device=rows.device) + shift.repeat_interleave(count)
        sums = F.embedding_bag(self.get_buffer(f"flat_{key_of(name)}")[places], table, starts, mode="sum")
        vectors = torch.where((count > 0)[:, None], sums / count.clamp(min=1)[:, None], table[0])
        vectors = vectors.masked_fill((rows == START_ITEM)[:, None], 0.0)  # the start token has no fields
        if not self.training or not self.field_dropout:
            return vectors
        kept = torch.rand(len(rows), 1, device=rows.device) >= self.field_dropout
        return vectors * (kept / (1 - self.field_dropout))  # the mean stays the same

    def item_table(self) -> Tensor:
        folded = self.item.weight  # (items, d)
        rows = torch.arange(len(folded), device=folded.device)
        for name in self.config.fields:
            folded = folded + self.field_vectors(name, rows)
        return folded

    def cold_item_vectors(self, table: Tensor) -> Tensor:
        return table - self.item.weight + self.item.weight[UNKNOWN_ITEM]  # (items, d)

    def item_vectors(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        known = F.embedding(rows, self.item.weight)  # (n, d)
        cold = known[:1].expand(len(rows), -1)
        for name in self.config.fields:
            vectors = self.field_vectors(name, rows)
            known = known + vectors
            cold = cold + vectors
        return known, cold

    def item_columns(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return the items' columns, as the class of a family takes them beside its config."""
        field_values = {name: self.get_buffer(f"values_{key_of(name)}") for name in self.config.fields}
        return field_values, self.numeric_mean.clone(), self.numeric_std.clone()

    @abstractmethod
    def resized(self, config: Any) -> "LateFusion":
        """Build a ranker of another config with the same item columns and with random weights."""

    @property
    def meta_columns(self) -> slice:
        """The columns of the fusion layer that read the meta-embedding: scaled, missing, meta, context."""
        first = 2 * self.config.numeric
        return slice(first, first + self.meta_size)

    def freeze_meta(self) -> None:
        self.default_meta.requires_grad_(False)
        self.fusion.weight.register_hook(lambda g: g.index_fill(1, torch.arange(g.shape[1])[self.meta_columns], 0.0))

    @torch.no_grad()
    def without_meta(self) -> "LateFusion":
        columns, weight = self.meta_columns, self.fusion.weight
        smaller: dict[str, Any] = {"meta_size": 0}
        copy = self.resized(replace(self.config, **smaller))
        changed = {
            "default_meta": torch.zeros(0),
            "fusion.weight": torch.cat([weight[:, : columns.start], weight[:, columns.stop :]], dim=1),
            "fusion.bias": self.fusion.bias + self.fused_meta(self.default_meta),
        }
        copy.load_state_dict(self.state_dict() | changed)
        return copy.eval()

    def with_personal_heads(self, heads: tuple[int, ...]) -> "LateFusion":
        copy = self.resized(replace(self.config, personal_heads=heads))
        copy.load_state_dict(self.state_dict())
        return copy.eval()

    def tokens(self, item_vectors: Tensor, actions: Tensor, gaps: Tensor) -> Tensor:
        if len(self.action.weight) * GAP_BUCKETS > actions.numel():
            return self.dropout(item_vectors + (self.action(actions) + self.gap(gaps)))  # (B, T, d)
        sums = self.action.weight[:, None] + self.gap.weight  # one look-up instead of two, and the same sums
        return self.dropout(item_vectors + F.embedding(actions * GAP_BUCKETS + gaps, sums.flatten(0, 1)))

    def dot_logits(self, users: Tensor, vectors: Tensor) -> Tensor:
        return (users * vectors).sum(-1, keepdim=True) * self.dot_scale + self.dot_bias  # (B, N, heads)

    def fuse(self, numeric: Tensor, meta: Tensor, context: Tensor) -> Tensor:
        missing = numeric.isnan()  # (..., N, F)
        scaled = torch.where(missing, 0.0, (numeric - self.numeric_mean) / self.numeric_std).clamp(-10, 10)
        n = (*numeric.shape[:-1], -1)
        meta = meta[..., : self.meta_size].expand(n)
        return self.fusion(torch.cat([scaled, missing.float(), meta, context.expand(n)], dim=-1))

    def fused_meta(self, meta: Tensor) -> Tensor:
        """Return the fusion layer's product with a meta-embedding (..., M) alone: (..., d)."""
        return F.linear(meta, self.fusion.weight[:, self.meta_columns])

    def meta_shift(self, meta: Tensor) -> Tensor:
        return self.fused_meta(meta)
