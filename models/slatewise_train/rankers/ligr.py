"""A LiGR ranker (arXiv 2502.03417): gated blocks, the history encoded once for all candidates, set-wise attention.

What is special about it:
- the gate of a block reads the stream before normalisation: x + F(LN(x)) * sigmoid(x W + b)
- history is causal with rotary positions behind a learned start token, so its keys and values can be kept and extended
- candidates run through the same blocks, read start token and history, and neither each other nor, by attention, themselves
- numeric features, meta-embedding and request context join after the history blocks (late fusion)
- a ladder of exits, each a ranker by itself:  dot: a (u . e) + c,  point: + f,  set: + g

Before: `data.py` (index arrays). After: `train.py` learns the weights, `graphs.py` writes the same equations as ONNX.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slatewise.inference.arrays import CONTEXT_SIZE, GAP_BUCKETS, START_ITEM, UNKNOWN_ITEM

EXITS = ("dot", "point", "set")


@dataclass(frozen=True)
class LigrConfig:
    items: int  # rows of the item table, with the unknown item and the start token
    actions: int  # with the unknown action
    fields: dict[str, int]  # categorical column -> rows, with "none"
    numeric: int
    heads: int
    width: int = 64
    blocks: int = 2
    attention_heads: int = 1
    set_blocks: int = 1
    feed_forward: int = 4  # times the width
    meta_size: int = 16
    dropout: float = 0.1
    key_heads: int = (
        0  # of keys and values, each read by as many queries' heads (GQA, arXiv 2305.13245); 0: as many as those
    )
    key_size: int = (
        0  # of a head of queries and keys (DARE, arXiv 2410.02604: less than of values will do); 0: as of values
    )

    def __post_init__(self) -> None:
        if self.width % self.attention_heads or (self.key_heads and self.attention_heads % self.key_heads):
            raise ValueError(
                f"attention_heads = {self.attention_heads} must divide width = {self.width}, and key_heads = {self.key_heads} them"
            )
        if (self.key_size or self.value_size) % 2:
            raise ValueError(f"key_size = {self.key_size or self.value_size} must be even: rotary positions turn pairs")

    @property
    def value_size(self) -> int:
        """Of a head."""
        return self.width // self.attention_heads

    @property
    def query_width(self) -> int:
        return self.attention_heads * (self.key_size or self.value_size)

    @property
    def key_width(self) -> int:
        return (self.key_heads or self.attention_heads) * (self.key_size or self.value_size)

    @property
    def value_width(self) -> int:
        return (self.key_heads or self.attention_heads) * self.value_size


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions (RoFormer, arXiv 2104.09864): pairs (i, i + D/2) turned by position * 10000^(-2i/D).

    x: (B, H, T, D), positions: (T,) or (B, T); (B, H, T, D).
    """
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[..., None].float() * frequency  # (T, D/2) or (B, T, D/2)
    if angle.ndim == 3:
        angle = angle[:, None]
    cos = angle.cos()
    sin = angle.sin()
    left = x[..., :half]
    right = x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class Block(nn.Module):
    """A gated block (LiGR eq. 1): x + F(LN(x)) * sigmoid(x W + b), with F = attention, then F = feed-forward."""

    def __init__(self, config: LigrConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.attention_heads
        self.key_heads = config.key_heads or config.attention_heads
        self.attention_norm = nn.LayerNorm(d)
        self.feed_forward_norm = nn.LayerNorm(d)
        self.query, self.key, self.value = (
            nn.Linear(d, size) for size in (config.query_width, config.key_width, config.value_width)
        )
        self.out = nn.Linear(d, d)
        self.attention_gate = nn.Linear(d, d)
        self.feed_forward_gate = nn.Linear(d, d)
        self.up = nn.Linear(d, config.feed_forward * d)
        self.down = nn.Linear(config.feed_forward * d, d)
        self.dropout = nn.Dropout(config.dropout)

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, T, H * D) -> (B, H, T, D)

    def keys_values(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of H key heads, (B, H, T, key size) and (B, H, T, value size); without positions (set-wise) nothing is rotated."""
        x = self.attention_norm(x)
        key = self.split(self.key(x), self.key_heads)
        value = self.split(self.value(x), self.key_heads)
        return (key if positions is None else rotate(key, positions)), value

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, positions: Tensor | None, mask: Tensor | None, causal: bool = False
    ) -> Tensor:
        """x: (B, N, d) reads key and value of `keys_values`; mask (B or 1, 1, N, K), True where it may read."""
        query = self.split(self.query(self.attention_norm(x)), self.heads)
        query = query if positions is None else rotate(query, positions)
        read = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=self.heads != self.key_heads
        )
        read = self.out(read.transpose(1, 2).flatten(2))
        x = x + self.dropout(read) * torch.sigmoid(self.attention_gate(x))
        fed = self.down(F.gelu(self.up(self.feed_forward_norm(x))))
        return x + self.dropout(fed) * torch.sigmoid(self.feed_forward_gate(x))


class Ligr(nn.Module):
    def __init__(
        self, config: LigrConfig, field_values: dict[str, Tensor], numeric_mean: Tensor, numeric_std: Tensor
    ) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.item = nn.Embedding(config.items, d)
        self.field = nn.ModuleDict({name: nn.Embedding(rows, d) for name, rows in config.fields.items()})
        self.action = nn.Embedding(config.actions, d)
        self.gap = nn.Embedding(GAP_BUCKETS, d)
        for name, rows in field_values.items():
            self.register_buffer(f"values_{name}", rows)  # (items, V) int64, 0 is none
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.user_norm = nn.LayerNorm(d)
        self.dot_scale = nn.Parameter(torch.ones(config.heads))
        self.dot_bias = nn.Parameter(torch.zeros(config.heads))
        # late fusion
        self.register_buffer("numeric_mean", numeric_mean)
        self.register_buffer("numeric_std", numeric_std)
        self.default_meta = nn.Parameter(torch.zeros(config.meta_size))
        self.fusion = nn.Linear(2 * config.numeric + config.meta_size + CONTEXT_SIZE, d)
        self.point_norm = nn.LayerNorm(d)
        self.point_up = nn.Linear(d, 2 * d)
        self.point_down = nn.Linear(2 * d, config.heads)
        self.set_blocks = nn.ModuleList(Block(config) for _ in range(config.set_blocks))
        self.set_norm = nn.LayerNorm(d)
        self.set_out = nn.Linear(d, config.heads)
        self.dropout = nn.Dropout(config.dropout)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=d**-0.5)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for last in (self.point_down, self.set_out):  # an exit starts as the one below it
            nn.init.zeros_(last.weight)

    def field_vectors(self, name: str, values: Tensor) -> Tensor:
        """(..., V) value rows, 0 is none or padding -> (..., d): the mean of the values, or the row of "none"."""
        table = self.field[name].weight
        known = (values > 0).unsqueeze(-1)
        mean = (F.embedding(values, table) * known).sum(-2) / known.sum(-2).clamp(min=1)
        return torch.where(known.any(-2), mean, table[0])

    def item_table(self) -> Tensor:
        """Id rows and metadata folded into one table: (items, d)."""
        folded = self.item.weight
        for name in self.config.fields:
            rows = self.field_vectors(name, getattr(self, f"values_{name}"))
            rows = rows.index_fill(0, torch.tensor([START_ITEM]), 0.0)
            folded = folded + rows
        return folded

    def unknown_twin(self, table: Tensor) -> Tensor:
        """(items, d): each item's vector as it would be if its id were not known, its fields alone."""
        return table - self.item.weight + self.item.weight[UNKNOWN_ITEM]

    def tokens(self, item_vectors: Tensor, actions: Tensor, gaps: Tensor) -> Tensor:
        """(B, T, d) item vectors, (B, T) action rows, (B, T) gap buckets -> (B, T, d)."""
        return self.dropout(item_vectors + self.action(actions) + self.gap(gaps))

    def encode(self, x: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """History tokens (B, T, d), start token first -> per block K and V of `keys_values`; user vectors (B, T, d), one a position."""
        positions = torch.arange(x.shape[1])
        state = []
        for block in self.blocks:
            key, value = block.keys_values(x, positions)
            state.append((key, value))
            x = block(x, key, value, positions, None, causal=True)
        return state, self.user_norm(x)

    def dot_logits(self, users: Tensor, vectors: Tensor) -> Tensor:
        """Exit `dot`: users (B, 1, d), candidates' vectors (B, N, d) -> (B, N, heads)."""
        return (users * vectors).sum(-1, keepdim=True) * self.dot_scale + self.dot_bias

    def fuse(self, numeric: Tensor, meta: Tensor, context: Tensor) -> Tensor:
        """Late fusion: raw numeric features (..., N, F) with NaN for missing, meta (..., 1, M), context (..., 1, 4) -> (..., N, d)."""
        missing = numeric.isnan()
        scaled = torch.where(missing, 0.0, (numeric - self.numeric_mean) / self.numeric_std).clamp(-10, 10)
        n = (*numeric.shape[:-1], -1)
        return self.fusion(torch.cat([scaled, missing.float(), meta.expand(n), context.expand(n)], dim=-1))

    def meta_shift(self, meta: Tensor) -> Tensor:
        """What a meta-embedding (..., M) adds to `fuse` of none at all: (..., d)."""
        first = 2 * self.config.numeric
        return F.linear(meta, self.fusion.weight[:, first : first + self.config.meta_size])

    def hidden(
        self, vectors: Tensor, state: list[tuple[Tensor, Tensor]], positions: Tensor, mask: Tensor | None, fused: Tensor
    ) -> Tensor:
        """Candidates' vectors (B, N, d) through the blocks, each reading the history alone; (B, N, d).

        positions: (1,) or (B, N), where they stand; mask: (B, 1, N, T), True for the history that a candidate may read, or None for all.
        """
        x = self.dropout(vectors)
        for block, (key, value) in zip(self.blocks, state, strict=True):
            x = block(x, key, value, positions, mask)
        return x + fused

    def point_logits(self, hidden: Tensor) -> Tensor:
        """f of the exit `point`: (B, N, heads)."""
        return self.point_down(F.gelu(self.point_up(self.point_norm(hidden))))

    def set_logits(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """g of the exit `set`, the candidates of a slate reading each other; mask (B, 1, 1, N), False for padding."""
        x = hidden
        for block in self.set_blocks:
            key, value = block.keys_values(x, None)
            x = block(x, key, value, None, mask)
        return self.set_out(self.set_norm(x))
