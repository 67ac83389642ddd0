"""The losses of training, meta-learning and distillation.

A head of kind `next` is a softmax over the catalogue, estimated from sampled negatives. A head of kind `label` is a
binary cross-entropy. Distillation compares two rankers' logits.

Called by: `train.py`, `meta/tasks.py`, `compression/distill.py`. Calls: torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def uniform_softmax(positive: Tensor, negatives: Tensor) -> Tensor:
    """Return the softmax cross-entropy with uniform negatives: positive (P,), negatives (P, K) -> (), mean over rows.

    Set a negative that equals the positive item to -inf. Uniform sampling needs no correction: its rate is a constant.
    """
    return F.softplus(torch.logsumexp(negatives, dim=1) - positive).mean()


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
        return torch.zeros(())
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
