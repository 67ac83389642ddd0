"""List-wise losses: each one compares the scores of a slate with the relevance of its items, one loss for each slate.

    f(scores (R, C), relevance (R, C), mask (R, C)) -> (R,) of R slates with up to C items

- mask is False for padding, which has no effect and no gradient.
- relevance is not negative. It is the gain of an item, in its own unit: pass 2^grade - 1 for grades, and label * weight
  for labels that are weighted by their inverse propensity.
- A slate whose items all have the same relevance has no order to learn: its loss is 0.
- A loss does not change if all relevance of a slate is multiplied by a number. A caller that weights labels therefore
  multiplies the slate's loss by the mean weight of its positive labels. Otherwise the weight of a slate with a single
  positive label would cancel.

Called by: `shown.py`. Calls: torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SINKHORN_STEPS = 50
SINKHORN_TOLERANCE = 1e-5  # of the sum of a row, which is 1 after the last step
LAMBDA_MU = 10.0  # weight of NDCG-Loss2 beside LambdaRank's, as in Wang et al., section 5


def discounts(count: int, like: Tensor) -> Tensor:
    """Return the discounts 1 / log2(1 + rank) of DCG for the ranks 1 to count: (count,), in the type of a tensor."""
    return 1 / torch.log2(torch.arange(2, count + 2, device=like.device, dtype=like.dtype))


def has_order(relevance: Tensor, mask: Tensor) -> Tensor:
    """Return True for the slates (R,) with two items of different relevance: relevance, mask (R, C)."""
    most = relevance.masked_fill(~mask, -torch.inf).amax(dim=1)
    least = relevance.masked_fill(~mask, torch.inf).amin(dim=1)
    return most > least


def slate_softmax(scores: Tensor, relevance: Tensor, mask: Tensor) -> Tensor:
    """Return the cross-entropy of the slate's softmax with its share of relevance: (R,).

    This is the top-one loss of ListNet (Cao et al., ICML 2007) with the relevance as the target distribution.
    """
    gain = relevance.masked_fill(~mask, 0.0)
    share = gain / gain.sum(dim=1, keepdim=True).clamp(min=torch.finfo(gain.dtype).tiny)
    # a finite number: an infinite one would give NaN in the gradient of a slate without items
    logs = F.log_softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 2), dim=1)
    losses = -(share * logs.where(mask, 0.0)).sum(dim=1)
    return losses.where(has_order(relevance, mask), 0.0)


def neural_sort(scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Return a relaxed permutation (R, C, C): row i is the distribution of the item at rank i + 1.

    NeuralSort (Grover et al., ICLR 2019, equation 5): row i = softmax(((n + 1 - 2 i) s - A 1) / temperature), with
    A_jk = |s_j - s_k| and i from 1. Ranks and items beyond the n items of a slate have zeros.
    """
    n = mask.sum(dim=1)  # (R,)
    ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    s = scores.masked_fill(~mask, 0.0)
    apart = ((s[:, :, None] - s[:, None, :]).abs() * mask[:, None, :]).sum(dim=2)  # (R, C), A 1
    factor = (n[:, None] + 1 - 2 * ranks).to(s.dtype)  # (R, C)
    logits = (factor[:, :, None] * s[:, None, :] - apart[:, None, :]) / temperature
    logits = logits.masked_fill(~mask[:, None, :], torch.finfo(s.dtype).min / 2)
    return torch.softmax(logits, dim=2) * mask[:, None, :] * (ranks <= n[:, None])[:, :, None]


def sinkhorn(matrices: Tensor) -> Tensor:
    """Scale rows and columns until all sums are 1: (R, C, C) -> (R, C, C). Rows and columns of zeros stay.

    The steps keep two vectors and not a matrix each, so the memory does not grow with the number of steps.
    """
    empty_rows = (matrices == 0).all(dim=2)
    empty_columns = (matrices == 0).all(dim=1)
    by_column = torch.ones_like(matrices[:, 0])
    by_row = by_column
    for _ in range(SINKHORN_STEPS):
        sums = (matrices @ by_column[:, :, None])[..., 0].masked_fill(empty_rows, 1.0)
        done = bool(((by_row * sums).detach() - 1).masked_fill(empty_rows, 0.0).abs().max() < SINKHORN_TOLERANCE)
        by_row = 1 / sums
        by_column = 1 / (by_row[:, None, :] @ matrices)[:, 0].masked_fill(empty_columns, 1.0)
        if done:
            break
    return by_row[:, :, None] * matrices * by_column[:, None, :]


def neural_ndcg(scores: Tensor, relevance: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Return 1 - NDCG of the relaxed order of a slate: (R,). NeuralNDCG (arXiv 2102.07831, equations 6 and 7).

    It tends to 1 - NDCG of the exact order as the temperature goes to 0; items of equal scores share their ranks.
    """
    with torch.autocast(scores.device.type, enabled=False):  # matrix products in bfloat16 would not add up to 1
        s = scores if scores.dtype == torch.float64 else scores.float()
        gain = relevance.masked_fill(~mask, 0.0).to(s.dtype)
        discount = discounts(s.shape[1], s)
        ideal = (gain.sort(dim=1, descending=True).values * discount).sum(dim=1)
        order = sinkhorn(neural_sort(s, mask, temperature))
        found = (torch.einsum("rij,rj->ri", order, gain) * discount).sum(dim=1)
        losses = 1 - found / ideal.where(ideal > 0, 1.0)
        return losses.where(has_order(relevance, mask), 0.0)


def lambda_loss(scores: Tensor, relevance: Tensor, mask: Tensor) -> Tensor:
    """Return NDCG-Loss2++ of LambdaLoss (Wang et al., CIKM 2018, section 4.3): (R,).

    It is the sum over the pairs with relevance_i > relevance_j of (rho_ij + mu delta_ij) |G_i - G_j| log2(1 +
    exp(s_j - s_i)). G is the gain over the ideal DCG. rho and delta are differences of discounts: of the pair's ranks
    (LambdaRank), and of the distance of the ranks. Ranks come from the scores, and equal scores keep their input order.
    """
    count = scores.shape[1]
    gain = relevance.masked_fill(~mask, 0.0).to(scores.dtype)
    discount = discounts(count + 1, scores)
    ideal = (gain.sort(dim=1, descending=True).values * discount[:-1]).sum(dim=1)
    gain = gain / ideal.where(ideal > 0, 1.0)[:, None]
    order = scores.detach().masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks = order.argsort(dim=1)  # (R, C), 0 for the best
    rho = (discount[ranks][:, :, None] - discount[ranks][:, None, :]).abs()
    distance = (ranks[:, :, None] - ranks[:, None, :]).abs()  # 0 on the diagonal, where the gains are equal
    delta = discount[(distance - 1).clamp(min=0)] - discount[distance]
    pairs = (relevance[:, :, None] > relevance[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    weight = (rho + LAMBDA_MU * delta) * (gain[:, :, None] - gain[:, None, :]) * pairs
    s = scores.masked_fill(~mask, 0.0)
    losses = F.softplus(s[:, None, :] - s[:, :, None]) / torch.log(s.new_tensor(2.0))
    return (weight * losses).sum(dim=(1, 2))


SLATE_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "softmax": slate_softmax,
    "neural_ndcg": neural_ndcg,
    "lambda": lambda_loss,
}
