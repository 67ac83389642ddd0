"""The list-wise losses against brute force: explicit sums, double loops, and every order of lists of up to 6 items."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slatewise_train.listwise import LAMBDA_MU, SLATE_LOSSES, lambda_loss, neural_ndcg, sinkhorn, slate_softmax

LENGTHS = range(1, 7)
each = pytest.mark.parametrize("name", SLATE_LOSSES)


def drawn(length: int, seed: int = 0, rows: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with ties, relevance with zeros and ties, and a full mask: (rows, length) each."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-4, 5, (rows, length), generator=generator).double() / 2
    relevance = torch.randint(0, 4, (rows, length), generator=generator).double() / 2
    return scores, relevance, torch.ones(rows, length, dtype=torch.bool)


def dcg(gains: list[float]) -> float:
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))


def slow_softmax(scores: list[float], relevance: list[float]) -> float:
    if len(set(relevance)) < 2:
        return 0.0
    total = sum(math.exp(s) for s in scores)
    return sum(-r / sum(relevance) * math.log(math.exp(s) / total) for s, r in zip(scores, relevance, strict=True))


def slow_ndcg_loss(scores: list[float], relevance: list[float]) -> float:
    """1 - NDCG, the mean over all orders in which the scores do not increase."""
    if len(set(relevance)) < 2:
        return 0.0
    found = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            found.append(dcg([relevance[k] for k in order]) / dcg(sorted(relevance, reverse=True)))
    return 1 - sum(found) / len(found)


def slow_lambda(scores: list[float], relevance: list[float]) -> float:
    ideal = dcg(sorted(relevance, reverse=True))
    order = sorted(range(len(scores)), key=lambda k: -scores[k])
    rank = {item: place + 1 for place, item in enumerate(order)}
    total = 0.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if relevance[i] > relevance[j]:
                apart = abs(rank[i] - rank[j])
                rho = abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j]))
                delta = 1 / math.log2(1 + apart) - 1 / math.log2(2 + apart)
                gain = (relevance[i] - relevance[j]) / ideal
                total += (rho + LAMBDA_MU * delta) * gain * math.log2(1 + math.exp(scores[j] - scores[i]))
    return total


def slow(reference: Callable[[list[float], list[float]], float], scores: Tensor, relevance: Tensor) -> Tensor:
    rows = zip(scores.tolist(), relevance.tolist(), strict=True)
    return torch.tensor([reference(s, r) for s, r in rows], dtype=torch.float64)


@pytest.mark.parametrize("length", LENGTHS)
def test_softmax_equals_its_explicit_sum(length: int) -> None:
    scores, relevance, mask = drawn(length)
    torch.testing.assert_close(slate_softmax(scores, relevance, mask), slow(slow_softmax, scores, relevance))


@pytest.mark.parametrize("length", LENGTHS)
def test_lambda_loss_equals_a_double_loop(length: int) -> None:
    scores, relevance, mask = drawn(length)
    torch.testing.assert_close(lambda_loss(scores, relevance, mask), slow(slow_lambda, scores, relevance))


@pytest.mark.parametrize("length", LENGTHS)
def test_cold_neural_ndcg_is_the_mean_over_tied_orders(length: int) -> None:
    scores, relevance, mask = drawn(length)
    expected = slow(slow_ndcg_loss, scores, relevance)
    torch.testing.assert_close(neural_ndcg(scores, relevance, mask, 1e-3), expected, rtol=0, atol=1e-9)


def test_neural_ndcg_tends_to_the_exact_value() -> None:
    scores, relevance, mask = drawn(6, rows=64)
    exact = slow(slow_ndcg_loss, scores, relevance)
    errors = [(neural_ndcg(scores, relevance, mask, t) - exact).abs().mean().item() for t in (4.0, 1.0, 0.25, 0.06)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[0]


@each
@pytest.mark.parametrize("extra", [1, 5])
def test_padding_changes_neither_loss_nor_gradient(name: str, extra: int) -> None:
    """Padding with any content, put between the items: the other gradients stay, its own are 0."""
    scores, relevance, mask = drawn(6)
    places = torch.randperm(6 + extra, generator=torch.Generator().manual_seed(1))[:6].sort().values
    padded = [torch.full((8, 6 + extra), value, dtype=torch.float64) for value in (3.0, 2.0)]
    padded_mask = torch.zeros(8, 6 + extra, dtype=torch.bool)
    for wide, narrow in zip((*padded, padded_mask), (scores, relevance, mask), strict=True):
        wide[:, places] = narrow
    inputs = [scores.requires_grad_(), padded[0].requires_grad_()]
    losses = [SLATE_LOSSES[name](inputs[0], relevance, mask), SLATE_LOSSES[name](inputs[1], padded[1], padded_mask)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    one, other = (torch.autograd.grad(x.sum(), s)[0] for x, s in zip(losses, inputs, strict=True))
    torch.testing.assert_close(other[:, places], one, rtol=1e-3, atol=1e-4)
    assert (other[~padded_mask] == 0).all()


@each
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_relevance_has_no_loss_and_no_gradient(name: str, value: float) -> None:
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 5])  # the last slate has no items
    losses = SLATE_LOSSES[name](scores, torch.full((3, 5), value), mask)
    assert losses.tolist() == [0, 0, 0]
    assert (torch.autograd.grad(losses.sum(), scores)[0] == 0).all()


@each
def test_gradient_is_finite_for_extreme_scores(name: str) -> None:
    scores = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [1e-30, -1e-30, 50.0]], requires_grad=True)
    relevance = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1e-20, 0.0, 1e6]])
    losses = SLATE_LOSSES[name](scores, relevance, torch.ones(3, 3, dtype=torch.bool))
    assert losses.isfinite().all()
    assert torch.autograd.grad(losses.sum(), scores)[0].isfinite().all()


@each
def test_gradient_equals_finite_differences(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(2, 5, generator=generator, dtype=torch.float64).requires_grad_()
    relevance = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    assert torch.autograd.gradcheck(lambda s: SLATE_LOSSES[name](s, relevance, mask), scores, atol=1e-4)


@each
def test_loss_does_not_depend_on_the_unit_of_relevance(name: str) -> None:
    scores, relevance, mask = drawn(6)
    losses = [SLATE_LOSSES[name](scores, relevance * unit, mask) for unit in (1.0, 7.0)]
    torch.testing.assert_close(*losses)


@each
def test_descent_sorts_a_slate(name: str) -> None:
    """From equal scores, gradient steps lead to the order of the relevance."""
    relevance = torch.tensor([[0.1, 0.7, 0.0, 0.4, 1.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    scores = torch.tensor([[0.05, -0.1, 0.1, 0.0, -0.05]], requires_grad=True)
    for _ in range(300):
        (gradient,) = torch.autograd.grad(SLATE_LOSSES[name](scores, relevance, mask).sum(), scores)
        scores = (scores - 0.5 * gradient).detach().requires_grad_()
    assert scores.argsort(dim=1, descending=True).tolist() == [[4, 1, 3, 0, 2]]


def test_sinkhorn_makes_all_sums_one() -> None:
    matrix = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    matrix[1, :, 4:] = matrix[1, 4:] = 0.0  # a slate of 4 items
    scaled = sinkhorn(matrix)
    expected = torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2, [1.0] * 6])
    for dim in (1, 2):
        torch.testing.assert_close(scaled.sum(dim=dim), expected, rtol=0, atol=1e-4)


def test_neural_ndcg_is_exact_under_bfloat16() -> None:
    scores, relevance, mask = drawn(6)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = neural_ndcg(scores.float(), relevance, mask)
    torch.testing.assert_close(mixed.double(), neural_ndcg(scores, relevance, mask), rtol=1e-3, atol=1e-5)
