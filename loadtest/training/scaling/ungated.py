"""LiGR blocks without gates: x + F(LN(x)) in place of x + F(LN(x)) * sigmoid(x W + b).

Only the study trains them. They have no serving graphs, so they are no option of `[model]`.

Called by: `study.py`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from slatewise_train.rankers.ligr import Block, Ligr, LigrConfig


class UngatedBlock(Block):
    """A pre-norm transformer block with the attention of `Block`."""

    def __init__(self, config: LigrConfig) -> None:
        super().__init__(config)
        del self.attention_gate, self.feed_forward_gate

    def update(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        read = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=self.heads != self.key_heads
        )
        x = x + self.dropout(self.out(read.transpose(1, 2).flatten(2)))
        fed = self.down(F.gelu(self.up(self.feed_forward_norm(x))))
        result: Tensor = x + self.dropout(fed)
        return result


def remove_gates(model: Ligr) -> None:
    """Replace the blocks in place. Their other weights stay."""
    for blocks in (model.blocks, model.set_blocks):
        for k, block in enumerate(blocks):
            ungated = UngatedBlock(model.config)
            ungated.load_state_dict(block.state_dict(), strict=False)  # without those of the gates
            blocks[k] = ungated.train(block.training)
