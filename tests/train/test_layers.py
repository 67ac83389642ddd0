"""The faster layers against their usual torch form: dropout, rotary positions, layers with one input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slatewise_train.rankers.layers import Dropout, apply_together, gated_update, rotate

torch.set_num_threads(1)


def slow_rotate(x: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = positions[..., None].float() * frequency
    if angle.ndim == 3:
        angle = angle[:, None]
    cos, sin = angle.cos(), angle.sin()
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


@pytest.mark.parametrize("positions", [torch.arange(5), torch.tensor([[0, 1, 2, 3, 4], [7, 7, 8, 90, 4]])])
def test_rotate_and_its_gradient_equal_the_slow_form(positions: Tensor) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8).transpose(1, 2)  # in the memory order of the blocks
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = rotate(one, positions), slow_rotate(other, positions)
    torch.testing.assert_close(found, expected)
    slope = torch.randn_like(expected)
    found.backward(slope)
    expected.backward(slope)
    torch.testing.assert_close(one.grad, other.grad)


def test_rotate_without_positions_or_rows_is_empty() -> None:
    assert rotate(torch.zeros(2, 1, 0, 4), torch.arange(0)).shape == (2, 1, 0, 4)
    assert rotate(torch.zeros(0, 1, 3, 4), torch.arange(3)).shape == (0, 1, 3, 4)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_keeps_the_mean(share: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(100_003, requires_grad=True)
    y = Dropout(share)(x)
    zeros = float((y == 0).float().mean())
    assert zeros == pytest.approx(share, abs=0.01)
    assert y.max().item() == pytest.approx(1 / (1 - share), rel=1e-3)
    assert y.mean().item() == pytest.approx(1, abs=0.02)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach()), "the gradient passes the kept values alone"


def test_dropout_is_off_in_evaluation_and_without_a_share() -> None:
    x = torch.randn(3, 5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert not Dropout(1.0)(x).any()
    assert Dropout(0.5)(torch.zeros(0, 4)).shape == (0, 4)


def test_dropout_repeats_with_the_seed_and_keeps_the_type() -> None:
    x = torch.ones(7, 3, dtype=torch.bfloat16)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(Dropout(0.5)(x))
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_dropout_of_neighbours_is_independent() -> None:
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(200_000)) > 0).float() - 0.5
    for distance in range(1, 9):  # four values come from one random word
        assert abs(float((kept[distance:] * kept[:-distance]).mean())) < 0.002


def test_layers_applied_together_equal_single_layers() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(6, n) for n in (4, 2, 8)]
    x = torch.randn(3, 5, 6)
    for found, layer in zip(apply_together(x, layers), layers, strict=True):
        torch.testing.assert_close(found, layer(x))
    seen: list[Tensor] = []
    layers[1].register_forward_hook(lambda _, __, output: seen.append(output))
    apply_together(x, layers)
    assert len(seen) == 1, "a layer with a hook is called"
    layers[0] = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 4))
    torch.testing.assert_close(apply_together(x, layers)[0], layers[0](x))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 1, 1), (4, 7, 33)])
@pytest.mark.parametrize("training", [True, False])
def test_gated_update_and_gradients_equal_the_slow_form(
    share: float, shape: tuple[int, int, int], training: bool
) -> None:
    torch.manual_seed(1)
    dropout = Dropout(share).train(training)
    found_from, slow_from = ([torch.randn(shape, requires_grad=True) for _ in range(3)] for _ in range(2))
    for mine, other in zip(found_from, slow_from, strict=True):
        other.data.copy_(mine.data)
    torch.manual_seed(2)
    found = gated_update(*found_from, dropout)
    torch.manual_seed(2)
    x, update, gate = slow_from
    slow = x + dropout(update) * torch.sigmoid(gate)
    torch.testing.assert_close(found, slow)
    weight = torch.randn(shape)
    for mine, other in zip(
        torch.autograd.grad((found * weight).sum(), found_from), torch.autograd.grad((slow * weight).sum(), slow_from),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, other)


def test_factors_of_dropout_are_zero_or_the_scale() -> None:
    torch.manual_seed(0)
    for share in (0.2, 0.9, 2**-16):
        factors = Dropout(share).draw(torch.Size([40, 50, 50]))
        least = round(share * 2**16)
        scale = torch.tensor(2**16 / (2**16 - least))
        assert ((factors == 0) | (factors == scale)).all()
        assert (factors == 0).float().mean().item() == pytest.approx(share, abs=0.01)
    torch.manual_seed(3)
    words = torch.empty(250, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    torch.manual_seed(3)
    assert torch.equal(Dropout(0.2).draw(torch.Size([1000])) > 0, words >= round(0.2 * 2**16) - 2**15)
