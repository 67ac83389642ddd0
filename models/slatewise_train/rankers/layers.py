"""Layers that make fewer passes over memory than their usual torch form: dropout, gates and rotary positions.

On a CPU, the usual forms take a third of a training step. tests/train/test_layers.py has the slow, obvious forms.
`LowRank` is a dense layer of two thin ones.

Called by: `ligr.py`, `ligr_student.py`, `compression/low_rank.py`. Calls: torch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIXTEEN_BITS = 1 << 16
ALL_INTEGERS = -(1 << 63)  # the least int64: `random_` then draws all 64 bits


class LowRank(nn.Module):
    """Two linear layers in place of one: second (first x), with a bias on the second."""

    def __init__(self, size: int, rank: int, out: int) -> None:
        super().__init__()
        self.first = nn.Linear(size, rank, bias=False)
        self.second = nn.Linear(rank, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    @torch.no_grad()
    def product(self) -> Tensor:
        """Return the weight of the dense layer that it equals: (out, size)."""
        return self.second.weight @ self.first.weight


def dense_layer(size: int, out: int, rank: int) -> nn.Module:
    """Build a dense layer, or one of low rank if the rank is not 0."""
    return LowRank(size, rank, out) if rank else nn.Linear(size, out)


@torch.no_grad()
def init_low_rank(model: nn.Module) -> None:
    """Give each `LowRank` of a model the closest form of its rank to a dense layer's random weights.

    Both factors have equal norms (spectral initialisation: Khodak et al., arXiv 2105.01029).
    """
    for module in model.modules():
        if isinstance(module, LowRank):
            u, s, v = torch.linalg.svd(nn.init.xavier_uniform_(module.product()), full_matrices=False)
            rank = module.first.out_features
            root = s[:rank].sqrt()
            module.first.weight.copy_(root[:, None] * v[:rank])
            module.second.weight.copy_(u[:, :rank] * root)


class Dropout(nn.Module):
    """Set a random share of the values to 0 and scale the others, as `nn.Dropout`, at a quarter of its time on a CPU.

    Sixteen random bits decide about a value, so the share is rounded to a multiple of 1 / 65,536.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.share:
            return x
        if x.device.type != "cpu" or self.share >= 1:
            return F.dropout(x, self.share)
        return x * self.draw(x.shape).to(x.dtype)

    def draw(self, shape: torch.Size) -> Tensor:
        """Return random factors (shape) float32 on the CPU: 0, or for values that stay the scale."""
        least = round(self.share * SIXTEEN_BITS)
        count = math.prod(shape)
        words = torch.empty(-(-count // 4), dtype=torch.int64).random_(ALL_INTEGERS, None)
        above = words.view(torch.int16)[:count].float().sub_(least - SIXTEEN_BITS // 2 - 1)  # from 1 on, a value stays
        # a comparison, and a product with its bools, would take five times as long
        return above.clamp_(0, 1).mul_(SIXTEEN_BITS / (SIXTEEN_BITS - least)).view(shape)


class GatedUpdate(torch.autograd.Function):
    """Compute x + update * drawn * sigmoid(gate), all of the same shape. drawn: of `Dropout.draw`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, gate: Tensor, drawn: Tensor) -> Tensor:
        opened = torch.sigmoid(gate)
        factor = drawn.to(x.dtype).mul_(opened)
        ctx.save_for_backward(update, opened, factor)
        return torch.addcmul(x, update, factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        update, opened, factor = ctx.saved_tensors
        of_update = gradients[0] * factor
        slope = of_update * update
        return gradients[0], of_update, torch.addcmul(slope, slope, opened, value=-1), None


def gated_update(x: Tensor, update: Tensor, gate: Tensor, dropout: Dropout) -> Tensor:
    """Return x + dropout(update) * sigmoid(gate), all of the same shape. In training on a CPU, with fewer passes."""
    fused = dropout.training and 0 < dropout.share < 1 and x.device.type == "cpu" and x.dtype == update.dtype
    if not fused:
        return x + dropout(update) * torch.sigmoid(gate)
    result: Tensor = GatedUpdate.apply(x, update, gate, dropout.draw(update.shape))
    return result


def apply_together(x: Tensor, layers: list[nn.Module]) -> tuple[Tensor, ...]:
    """Apply layers to the same input (..., n) as one product, if they are plain linear layers without hooks."""
    if not all(type(layer) is nn.Linear and not layer._forward_hooks for layer in layers):
        return tuple(layer(x) for layer in layers)
    weights = torch.cat([layer.get_parameter("weight") for layer in layers])
    product = F.linear(x, weights, torch.cat([layer.get_parameter("bias") for layer in layers]))
    return product.split([layer.get_parameter("bias").shape[0] for layer in layers], dim=-1)


class Rotate(torch.autograd.Function):
    """Rotate pairs (x_i, x_(i + D/2)) by angles; the gradient is the rotation by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotated(gradients[0], cos, sin, -1.0), None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x (B, H, T, D), cos and sin (T, D/2) or (B, 1, T, D/2) -> (B, H, T, D), at least float32."""
    x = x if x.dtype == torch.float64 else x.float()  # bfloat16 has too few digits for angles
    half = x.shape[-1] // 2
    out = x * torch.cat([cos, cos], dim=-1)
    out[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return out


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Apply rotary positions (RoFormer, arXiv 2104.09864): x (B, H, T, D) -> (B, H, T, D), at least float32.

    Rotates the pair (i, i + D/2) by the angle position * 10000^(-2i/D). positions: (T,) or (B, T).
    """
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[..., None].float() * frequency  # (T, D/2) or (B, T, D/2)
    if angle.ndim == 3:
        angle = angle[:, None]
    result: Tensor = Rotate.apply(x, angle.cos(), angle.sin())
    return result
