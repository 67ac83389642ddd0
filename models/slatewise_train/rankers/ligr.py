"""The ranker family `ligr`: LiGR (arXiv 2502.03417) in torch.

- A block adds a gated update to its input x: x + F(LN(x)) * sigmoid(x W + b) (equation 1). The gate reads x before
  normalisation.
- The history is encoded causally, with rotary positions after a learned start token. Its keys and values can therefore
  be cached and extended by new events.
- Candidates pass through the last `decoder_blocks` of the same blocks, all of them by default. A candidate attends to
  the start token and the history. It does not attend to other candidates or to itself. Depth of the history is paid
  once, depth of the candidates in every request (deep encoder, shallow decoder: arXiv 2006.10369, 2508.20900).
- Numeric features, meta-embedding and request context are added after the blocks (late fusion).
- Set-wise blocks let the candidates of a slate attend to each other.

Called by: `families.py`, `ligr_onnx.py` (the same equations as ONNX), `ligr_student.py`. Calls: `late_fusion.py`, and
`base.py`, which defines the letters in shapes.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slatewise_train.config_values import number
from slatewise_train.rankers.base import EXITS, EncodedHistory, RankerConfig
from slatewise_train.rankers.late_fusion import LateFusion
from slatewise_train.rankers.layers import Dropout, apply_together, dense_layer, gated_update, rotate


@dataclass(frozen=True)
class LigrConfig(RankerConfig):
    """The TOML's table `[model]` and sizes that follow from the data. Raises ValueError for sizes that do not match."""

    width: int = number(64, least=1, most=8192)
    blocks: int = number(2, least=1, most=100)  # of the history
    # Blocks of the candidates, which share the last blocks of the history. 0: blocks.
    decoder_blocks: int = number(0, least=0, most=100)
    attention_heads: int = number(1, least=1, most=1024)
    set_blocks: int = number(1, least=0, most=100)
    # hidden units of a feed-forward layer, as a multiple of the width
    feed_forward: int = number(4, least=1, most=64)
    # Rank of the two layers of a feed-forward layer, each of which is then two thin ones (arXiv 2406.16450). 0: dense.
    feed_forward_rank: int = number(0, least=0, most=8192)
    meta_size: int = number(16, least=1, most=8192)
    dropout: float = number(0.1, least=0, most=0.9)
    # Share of an item's fields whose whole vector is dropped in training. A field of few values would overfit.
    field_dropout: float = number(0.0, least=0, most=0.9)
    # Heads of keys and values; several query heads share one of them (GQA, arXiv 2305.13245). 0: attention_heads.
    key_heads: int = number(0, least=0, most=1024)
    # Size of a query or key head, which may be less than that of a value head (DARE, arXiv 2410.02604). 0: value_size.
    key_size: int = number(0, least=0, most=8192)

    def __post_init__(self) -> None:
        if self.width % self.attention_heads or (self.key_heads and self.attention_heads % self.key_heads):
            raise ValueError(
                f"attention_heads = {self.attention_heads} must divide width = {self.width}, "
                f"and key_heads = {self.key_heads} must divide attention_heads"
            )
        if (self.key_size or self.value_size) % 2:
            raise ValueError(
                f"key_size = {self.key_size or self.value_size} must be even: rotary positions rotate pairs of numbers"
            )
        if self.decoder_blocks > self.blocks:
            raise ValueError(
                f"decoder_blocks = {self.decoder_blocks} must not be more than blocks = {self.blocks}: candidates pass "
                "the last blocks of the history"
            )
        if self.feed_forward_rank > self.width:
            raise ValueError(f"feed_forward_rank = {self.feed_forward_rank} must not be more than width = {self.width}")

    def __repr__(self) -> str:
        """Describe the config without the newer keys that change nothing.

        The identity of a checkpoint contains this text, so older trainings can continue.
        """
        unused = {"decoder_blocks"} if self.first_decoder_block == 0 else set()
        if self.feed_forward_rank == 0:
            unused.add("feed_forward_rank")
        names = [field.name for field in fields(self) if field.repr and field.name not in unused]
        return f"LigrConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @property
    def first_decoder_block(self) -> int:
        """The block of the history, from 0, at which candidates begin."""
        return self.blocks - (self.decoder_blocks or self.blocks)

    @property
    def value_size(self) -> int:
        """Size of a value head."""
        return self.width // self.attention_heads

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.attention_heads * (self.key_size or self.value_size)

    @property
    def key_width(self) -> int:
        return (self.key_heads or self.attention_heads) * (self.key_size or self.value_size)

    @property
    def value_width(self) -> int:
        return (self.key_heads or self.attention_heads) * self.value_size


class Block(nn.Module):
    """A gated block (LiGR, equation 1): x + F(LN(x)) * sigmoid(x W + b) for F = attention, then F = feed-forward."""

    def __init__(self, config: LigrConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.attention_heads
        self.key_heads = config.key_heads or config.attention_heads
        self.attention_norm = nn.LayerNorm(d)
        self.feed_forward_norm = nn.LayerNorm(d)
        self.query = nn.Linear(d, config.query_width)
        self.key = nn.Linear(d, config.key_width)
        self.value = nn.Linear(d, config.value_width)
        self.out = nn.Linear(d, d)
        self.attention_gate = nn.Linear(d, d)
        self.feed_forward_gate = nn.Linear(d, d)
        self.up = dense_layer(d, config.feed_forward * d, config.feed_forward_rank)
        self.down = dense_layer(config.feed_forward * d, d, config.feed_forward_rank)
        self.dropout = Dropout(config.dropout)

    def split(self, x: Tensor, heads: int) -> Tensor:
        """Split into heads: (B, T, H * D) -> (B, H, T, D)."""
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def attend_to_itself(
        self, x: Tensor, positions: Tensor | None, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Apply the block to a sequence x (B, T, d) that attends to itself.

        Returns (B, T, d), keys (B, H, T, key size) and values (B, H, T, value size) of H key heads. Keys are rotated to
        their positions, (T,) or (B, T). positions is None in set-wise blocks, which have no positions. mask: (B or 1,
        1, T, T), True for the positions that may be read.
        """
        layers = apply_together(self.attention_norm(x), [self.query, self.key, self.value])
        heads = (self.heads, self.key_heads, self.key_heads)
        query, key, value = (self.split(part, count) for part, count in zip(layers, heads, strict=True))
        if positions is not None:
            query, key = rotate(query, positions), rotate(key, positions)
        return self.update(x, query, key, value, mask, causal), (key, value)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        """Apply the block: x (B, N, d) attends to key and value of K positions of a sequence. Returns (B, N, d).

        mask: (B or 1, 1, N, K), True for the positions that may be read.
        """
        query = self.split(self.query(self.attention_norm(x)), self.heads)
        query = query if positions is None else rotate(query, positions)
        return self.update(x, query, key, value, mask, causal=False)

    def update(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Return x (B, N, d) after attention and feed-forward layer."""
        read = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=self.heads != self.key_heads
        )
        read = self.out(read.transpose(1, 2).flatten(2))
        x = gated_update(x, read, self.attention_gate(x), self.dropout)
        fed = self.down(F.gelu(self.up(self.feed_forward_norm(x))))
        return gated_update(x, fed, self.feed_forward_gate(x), self.dropout)


class Ligr(LateFusion):
    """A ranker of the family `ligr`."""

    family = "ligr"
    config: LigrConfig

    def __init__(
        self, config: LigrConfig, field_values: dict[str, Tensor], numeric_mean: Tensor, numeric_std: Tensor
    ) -> None:
        sizes = config.meta_size, config.dropout, config.field_dropout
        super().__init__(config, field_values, numeric_mean, numeric_std, *sizes)
        d = config.width
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.user_norm = nn.LayerNorm(d)
        self.fusion = self.fusion_layer()
        self.point_norm = nn.LayerNorm(d)
        self.point_up = nn.Linear(d, 2 * d)
        self.point_down = nn.Linear(2 * d, config.heads)
        self.set_blocks = nn.ModuleList(Block(config) for _ in range(config.set_blocks))
        self.set_norm = nn.LayerNorm(d)
        self.set_out = nn.Linear(d, config.heads)
        self.draw_weights()
        if not config.set_blocks:  # bundles and checkpoints have these weights, but no exit reads them
            self.set_norm.requires_grad_(False)
            self.set_out.requires_grad_(False)
        for last in (self.point_down, self.set_out):  # before training, every exit gives the logits of `dot`
            nn.init.zeros_(last.weight)

    @property
    def exits(self) -> tuple[str, ...]:
        return EXITS if self.config.set_blocks else EXITS[:-1]

    def dense_layers(self) -> dict[str, nn.Linear]:
        """Return the linear layers of all blocks, by name, but not thin ones. They take nearly all of the time."""
        stacks = {"blocks": self.blocks, "set_blocks": self.set_blocks}
        return {
            f"{stack}.{name}": module
            for stack, blocks in stacks.items()
            for name, module in blocks.named_modules()
            if isinstance(module, nn.Linear) and not name.endswith((".first", ".second"))
        }

    def resized(self, config: LigrConfig) -> "Ligr":
        return Ligr(config, *self.item_columns())

    def encode(self, x: Tensor) -> tuple[EncodedHistory, Tensor]:
        positions = torch.arange(x.shape[1], device=x.device)
        state = []
        for block in self.blocks:
            assert isinstance(block, Block)
            x, keys_values = block.attend_to_itself(x, positions, None, causal=True)
            state.append(keys_values)
        return state, self.user_norm(x)  # (B, T, d)

    def hidden(
        self, vectors: Tensor, history: EncodedHistory, positions: Tensor, mask: Tensor | None, fused: Tensor
    ) -> Tensor:
        x = self.dropout(vectors)  # (B, N, d)
        first = self.config.first_decoder_block
        for block, (key, value) in zip(list(self.blocks)[first:], history[first:], strict=True):
            x = block(x, key, value, positions, mask)
        return x + fused

    def point_logits(self, hidden: Tensor) -> Tensor:
        return self.point_down(F.gelu(self.point_up(self.point_norm(hidden))))  # (..., N, heads)

    def set_logits(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        x = hidden
        for block in self.set_blocks:
            assert isinstance(block, Block)
            x, _ = block.attend_to_itself(x, None, mask, causal=False)
        return self.set_out(self.set_norm(x))  # (B, N, heads)
