"""The losses against slow, obvious versions: unknown labels, and the correction of sampled negatives."""

from __future__ import annotations

import math

import pytest
import torch

from slatewise_train.losses import (
    equal_pairs,
    label_loss,
    label_losses,
    log_likelihood,
    sampling_offset,
    shared_softmax,
)
from slatewise_train.slates import draw_negatives


def test_label_loss_ignores_unknown_labels() -> None:
    logits = torch.tensor([0.5, -2.0, 1.0], requires_grad=True)
    labels = torch.tensor([1.0, torch.nan, 0.0])
    expected = (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(1.0))) / 2
    loss = label_loss(logits, labels)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert logits.grad is not None and logits.grad[1] == 0 and logits.grad.isfinite().all()
    each = label_losses(logits, labels)
    assert each[1] == 0 and each.sum().item() == pytest.approx(2 * expected)


def test_label_loss_without_known_label_is_zero() -> None:
    assert label_loss(torch.ones(3), torch.full((3,), torch.nan)).item() == 0
    assert label_loss(torch.ones(0), torch.ones(0)).item() == 0


@pytest.mark.parametrize(("positions", "count"), [(1, 1), (5, 7), (600, 300)])
def test_shared_softmax_and_gradients_equal_cross_entropy(positions: int, count: int) -> None:
    torch.manual_seed(0)
    users, sampled = torch.randn(positions, 4), torch.randn(count, 4)
    positive = torch.randn(positions)
    target, negatives = torch.randint(0, 50, (positions,)), torch.randint(0, 50, (count,))
    sides = [[value.clone().requires_grad_() for value in (users, positive, sampled)] for _ in range(2)]
    found = shared_softmax(*sides[0], target, negatives)
    others = (sides[1][0] @ sides[1][2].T).masked_fill(target[:, None] == negatives, -torch.inf)
    logits = torch.cat([sides[1][1][:, None], others], dim=1)
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(positions, dtype=torch.int64))
    torch.testing.assert_close(found, expected)
    (3 * found).backward()
    (3 * expected).backward()
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_shared_softmax_without_another_item_is_zero() -> None:
    users, positive, sampled = (torch.randn(*shape, requires_grad=True) for shape in ((2, 3), (2,), (1, 3)))
    loss = shared_softmax(users, positive, sampled, torch.tensor([8, 8]), torch.tensor([8]))
    loss.backward()
    assert loss.item() == 0
    assert not any(value.grad.any() for value in (users, positive, sampled))


def test_sampled_softmax_estimates_full_softmax() -> None:
    """Many draws: the corrected sum over the negatives is near the sum over the catalogue without the positive."""
    torch.manual_seed(0)
    users = torch.randn(1, 1, 4)
    vectors = torch.randn(50, 4)
    drawn, log_rate = draw_negatives(users, vectors, 200_000)
    scores = (users[0, 0] @ vectors.T) / 2  # other logits than those that the negatives are drawn by
    target = 7
    logits = torch.cat([scores[target : target + 1], scores[drawn[0, 0]]])
    offset = sampling_offset(log_rate[0, 0], drawn[0, 0] == target)
    torch.testing.assert_close(
        log_likelihood(logits, offset), torch.log_softmax(scores, dim=0)[target], rtol=0.01, atol=0.01
    )


def test_draw_negatives_is_half_uniform_half_by_dot() -> None:
    torch.manual_seed(0)
    users = torch.zeros(1, 1, 2)
    users[0, 0, 0] = 50.0
    vectors = torch.zeros(10, 2)
    vectors[3, 0] = 1.0  # the exit `dot` would always draw this item
    drawn, log_rate = draw_negatives(users, vectors, 20_000)
    share = torch.bincount(drawn.flatten(), minlength=10) / 20_000
    expected = torch.full((10,), 0.05)
    expected[3] = 0.55
    torch.testing.assert_close(share, expected, rtol=0, atol=0.02)
    torch.testing.assert_close(log_rate[0, 0].exp(), (20_000 * expected)[drawn[0, 0]], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 5), (5, 0), (1, 1), (300, 40)])
def test_equal_pairs_are_those_of_the_whole_comparison(left: int, right: int) -> None:
    torch.manual_seed(left)
    mine, others = torch.randint(9, (left,)), torch.randint(9, (right,))
    rows, columns = equal_pairs(mine, others)
    assert (rows.diff() >= 0).all()
    found = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert len(found) == len(rows)
    assert found == set(map(tuple, (mine[:, None] == others).nonzero().tolist()))
