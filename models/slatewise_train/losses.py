"""The losses of training, meta-learning and distillation.

A head of kind `next` is a softmax over the catalogue, estimated from sampled negatives. A head of kind `label` is a
binary cross-entropy. Distillation compares two rankers' logits.

Called by: `train.py`, `shown.py`, `meta/tasks.py`, `compression/distill.py`. Calls: torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_LOGITS = 1 << 17  # half a megabyte, a part of a core's second-level cache
LEAST_LOGIT = -1e30
TINY = 1e-38


class SharedSoftmax(torch.autograd.Function):
    """`shared_softmax` in chunks of positions that fit a core's cache, with the gradients in the same pass.

    Three passes of exp and memory for all P * K logits become one; no tensor of that size outlives a chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, users: Tensor, positive: Tensor, sampled: Tensor, target: Tensor, negatives: Tensor
    ) -> Tensor:
        total = positive.new_zeros((), dtype=torch.float32)
        slopes = [torch.empty_like(value, dtype=torch.float32) for value in (users, positive)]
        slopes.append(torch.zeros_like(sampled, dtype=torch.float32))
        chunk = max(1, CHUNK_LOGITS // len(negatives)) if users.device.type == "cpu" else max(1, len(users))
        rows, columns = equal_pairs(target, negatives)
        edges = torch.searchsorted(rows, torch.arange(0, len(users) + chunk, chunk, device=rows.device)).tolist()
        for k, first in enumerate(range(0, len(users), chunk)):
            part = slice(first, first + chunk)
            same = slice(edges[k], edges[k + 1])
            logits = (users[part] @ sampled.T).float()
            logits[rows[same] - first, columns[same]] = -torch.inf
            most = logits.amax(1, keepdim=True).clamp(min=LEAST_LOGIT)  # all of them may be the positive item
            shares = logits.sub_(most).exp_()
            sums = shares.sum(1)
            excess = most[:, 0] + sums.log() - positive[part]  # (rows,)
            total += F.softplus(excess).sum()
            slope = torch.sigmoid(excess) / len(users)
            shares.mul_((slope / sums.clamp(min=TINY))[:, None])
            slopes[0][part] = shares @ sampled
            slopes[1][part] = -slope
            slopes[2] += shares.T @ users[part]
        ctx.save_for_backward(*slopes)
        ctx.dtypes = users.dtype, positive.dtype, sampled.dtype
        return total / max(1, len(users))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slopes = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*((slope * gradients[0]).to(dtype) for slope, dtype in slopes), None, None)


def equal_pairs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places (n,) and (n,) of equal integers in left (P,) and right (K,), ascending by the place in left."""
    ordered, order = right.sort()
    begin = torch.searchsorted(ordered, left)
    count = torch.searchsorted(ordered, left, right=True) - begin
    rows = torch.repeat_interleave(torch.arange(len(left), device=left.device), count)
    start = count.cumsum(0) - count
    places = torch.arange(len(rows), device=left.device) + (begin - start).repeat_interleave(count)
    return rows, order[places]


def shared_softmax(users: Tensor, positive: Tensor, sampled: Tensor, target: Tensor, negatives: Tensor) -> Tensor:
    """Return the softmax cross-entropy of P positions with shared uniform negatives -> (), mean over positions.

    Uniform sampling needs no correction: its rate is a constant. A negative that is the position's own item is left
    out. A position without any other negative has the loss 0.

    users: (P, d), multiplied by the head's scale; positive: (P,) logits of the next items; sampled: (K, d) vectors of
    the negatives; target: (P,) and negatives: (K,), item rows.
    """
    loss: Tensor = SharedSoftmax.apply(users, positive, sampled, target, negatives)
    return loss


def sampling_offset(log_rate: Tensor, same: Tensor) -> Tensor:
    """Return the logQ correction for `log_likelihood` (Yi et al., RecSys 2019): (..., K) -> (..., 1 + K).

    log_rate: log of the expected number of draws of each negative; same: True if the negative equals the positive item.
    The correction excludes such negatives from the softmax.
    """
    return torch.cat([torch.zeros_like(log_rate[..., :1]), (-log_rate).masked_fill(same, -torch.inf)], dim=-1)


def log_likelihood(logits: Tensor, offset: Tensor) -> Tensor:
    """Return the log of the positive's softmax among sampled negatives: logits (..., 1 + K), positive first -> (...).

    offset: (..., 1 + K) of `sampling_offset`. With this offset, the sampled softmax estimates the softmax over the
    catalogue.
    """
    return F.log_softmax(logits + offset, dim=-1)[..., 0]


def label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy of each element, 0 for unknown labels (NaN). Both tensors have one shape."""
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return losses.where(~labels.isnan(), 0.0)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean binary cross-entropy over the known labels, or 0 if all are NaN. Both tensors have one shape."""
    known = ~labels.isnan()
    if not known.any():
        return logits.new_zeros(())
    return F.binary_cross_entropy_with_logits(logits[known], labels[known])


def listwise_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the KL divergence of the student's softmax over C from the teacher's, mean over rows and heads -> ().

    Logits: (rows, C, heads). The softmax is the top-one probability of ListNet (Cao et al., ICML 2007).
    """
    divergence = F.kl_div(
        F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1), reduction="sum", log_target=True
    )
    return divergence / (student.shape[0] * student.shape[2])


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the distance of a student's logits from its teacher's (rows, C, heads) -> (), 0 for equal logits.

    The cross-entropy with the teacher's probabilities as labels (Hinton et al., arXiv 1503.02531), less its minimum,
    plus `listwise_kl`.
    """
    target = torch.sigmoid(teacher)
    scores = F.binary_cross_entropy_with_logits(student, target) - F.binary_cross_entropy_with_logits(teacher, target)
    return scores + listwise_kl(student, teacher)
