"""Layers that make fewer passes over memory than their usual torch form: dropout and rotary positions.

On a CPU, the usual forms take a third of a training step. tests/train/test_layers.py has the slow, obvious forms.

Called by: `ligr.py`. Calls: torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIXTEEN_BITS = 1 << 16
ALL_INTEGERS = -(1 << 63)  # the least int64: `random_` then draws all 64 bits


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
        least = round(self.share * SIXTEEN_BITS)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(ALL_INTEGERS, None)
        kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= least - SIXTEEN_BITS // 2
        return x * (kept.to(x.dtype) * (SIXTEEN_BITS / (SIXTEEN_BITS - least)))


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
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    left, right = x[..., :half], x[..., half:]
    torch.mul(left, cos, out=out[..., :half]).addcmul_(right, sin, value=-sign)
    torch.mul(right, cos, out=out[..., half:]).addcmul_(left, sin, value=sign)
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
