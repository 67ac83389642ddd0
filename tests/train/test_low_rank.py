"""Low rank: each method against its theorem, the allocator against uniform ranks, and whole models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slatewise.inference.arrays import GAP_BUCKETS
from slatewise_train.compression.low_rank import (
    METHODS,
    Layer,
    LayerStatistics,
    allocate,
    collect_statistics,
    factor,
    layer_of,
    spectrum,
    timed_layer,
)
from slatewise_train.rankers.base import EXITS, Calibration
from slatewise_train.rankers.layers import LowRank
from slatewise_train.rankers.ligr import Ligr, LigrConfig
from slatewise_train.rankers.ligr_onnx import LigrGraphs

SIZES = st.tuples(st.integers(1, 24), st.integers(1, 24))


def drawn(size: tuple[int, int], seed: int, rows: int = 60) -> tuple[Tensor, Tensor, Tensor, LayerStatistics]:
    """weight (out, in), bias (out,), anisotropic inputs (rows, in), and the statistics of the outputs."""
    torch.manual_seed(seed)
    out, inner = size
    weight = torch.randn(out, inner, dtype=torch.float64)
    bias = torch.randn(out, dtype=torch.float64)
    inputs = torch.randn(rows, inner, dtype=torch.float64) @ torch.diag(
        torch.logspace(0, -2, inner, dtype=torch.float64)
    ) + torch.randn(inner)
    outputs = inputs @ weight.T + bias
    mean = outputs.mean(0)
    covariance = (outputs - mean).T @ (outputs - mean) / rows
    return weight, bias, inputs, LayerStatistics(mean, covariance, torch.rand(out, dtype=torch.float64))


def error(method: str, weight: Tensor, bias: Tensor, inputs: Tensor, seen: LayerStatistics, rank: int) -> float:
    """Mean squared error of the outputs."""
    factors = METHODS[method](weight, bias, seen, rank)
    assert factors.first.shape == (rank, weight.shape[1]) and factors.second.shape == (weight.shape[0], rank)
    found = inputs @ factors.first.T @ factors.second.T + factors.bias
    return float((found - inputs @ weight.T - bias).square().sum(1).mean())


@pytest.mark.parametrize("method", METHODS)
@given(size=SIZES, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_factors_of_full_rank_equal_the_layer(method: str, size: tuple[int, int], seed: int) -> None:
    weight, bias, inputs, seen = drawn(size, seed)
    assert error(method, weight, bias, inputs, seen, min(size) if method != "afm" else size[0]) < 1e-10


@given(size=SIZES, seed=st.integers(0, 99), data=st.data())
@settings(max_examples=60, deadline=None)
def test_afm_has_the_lowest_error_on_the_outputs(size: tuple[int, int], seed: int, data: st.DataObject) -> None:
    """The theorem: at equal rank no map of this form has a lower error, `svd` and `fwsvd` included."""
    weight, bias, inputs, seen = drawn(size, seed)
    rank = data.draw(st.integers(1, min(size)))
    afm = error("afm", weight, bias, inputs, seen, rank)
    assert all(afm <= error(method, weight, bias, inputs, seen, rank) + 1e-9 for method in ("svd", "fwsvd"))
    left = spectrum("afm", weight, seen)[rank:].square().sum()
    assert afm == pytest.approx(float(left), abs=1e-8), "the error that the spectrum predicts"


@given(size=SIZES, seed=st.integers(0, 99), data=st.data())
@settings(max_examples=30, deadline=None)
def test_svd_and_fwsvd_have_the_lowest_error_in_their_norms(
    size: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    weight, bias, _, seen = drawn(size, seed)
    rank = data.draw(st.integers(1, min(size)))
    left = {}
    for method in ("svd", "fwsvd"):
        factors = METHODS[method](weight, bias, seen, rank)
        left[method] = factors.second @ factors.first - weight
    rows = seen.fisher.sqrt()[:, None]
    assert left["svd"].norm() <= left["fwsvd"].norm() + 1e-9
    assert (rows * left["fwsvd"]).norm() <= (rows * left["svd"]).norm() + 1e-9


def test_fwsvd_of_full_rank_is_exact_without_gradients() -> None:
    weight, bias, inputs, seen = drawn((6, 6), 1)
    for fisher in (torch.tensor([0.0, 1, 0, 2, 3, 0]), torch.zeros(6)):
        assert (
            error("fwsvd", weight, bias, inputs, LayerStatistics(seen.mean, seen.covariance, fisher.double()), 6)
            < 1e-10
        )


def uniform(layers: Mapping[str, Layer], budget: float) -> dict[str, int | None]:
    """The reference for `allocate`: the same share of saving ranks in every layer, as large as the budget allows."""
    most = {name: sum(cost < layer.whole for cost in layer.costs[1:]) for name, layer in layers.items()}
    for percent in range(100, -1, -1):
        found = {name: max(1, round(percent / 100 * n)) if n else None for name, n in most.items()}
        if sum(layers[name].cost(rank) for name, rank in found.items()) <= budget:
            return found
    raise ValueError(f"a budget of {budget:g} is less than rank 1 of every layer costs")


layers = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.tuples(SIZES, st.lists(st.floats(1e-3, 1), min_size=24, max_size=24)),
    min_size=1,
    max_size=8,
)


@given(drawn_layers=layers, share=st.floats(0, 1.2))
def test_allocate_meets_budget_and_beats_uniform_ranks(drawn_layers: dict, share: float) -> None:
    described = {}
    for name, ((out, inner), values) in drawn_layers.items():
        described[name] = layer_of(
            torch.tensor(sorted(values[: min(out, inner)], reverse=True)), torch.zeros(out, inner)
        )
    whole = sum(layer.whole for layer in described.values())
    try:
        other = uniform(described, share * whole)
    except ValueError:
        other = None
    try:
        ranks = allocate(described, share * whole)
    except ValueError as refused:
        assert other is None and "less than the lowest rank" in str(refused)
        assert sum(layer.cost(layer.rank(1.0)) for layer in described.values()) > share * whole
        return

    def largest(found: dict[str, int | None]) -> float:
        return max(described[name].error(rank) for name, rank in found.items())

    assert sum(described[name].cost(rank) for name, rank in ranks.items()) <= share * whole
    assert other is None or largest(ranks) <= largest(other)
    assert all(rank is None or 1 <= rank < len(described[name].costs) for name, rank in ranks.items())


def test_allocate_does_not_factor_layers_without_a_saving() -> None:
    square = Layer([1.0, 0.9, 0.8, 0.7], [0.0, 8.0, 16.0, 24.0], 16.0)  # 4 x 4: rank 1 saves half, rank 2 nothing
    assert allocate({"a": square}, 16) == {"a": None}
    assert allocate({"a": square}, 15) == {"a": 1}
    with pytest.raises(ValueError, match="budget of 7"):
        allocate({"a": square}, 7)


@pytest.fixture(scope="module")
def model() -> Ligr:
    torch.manual_seed(0)
    config = LigrConfig(
        items=40, actions=4, fields={}, numeric=2, heads=2, width=16, blocks=2, attention_heads=2, meta_size=4
    )
    model = Ligr(config, {}, torch.zeros(2), torch.ones(2))
    for last in (model.point_down, model.set_out):  # zero before training: no gradient would pass
        nn.init.xavier_uniform_(last.weight)
    return model.eval()


def logits_of(model: Ligr, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    table = model.item_table()
    n = 7
    rows = torch.randint(2, 40, (1, 12))
    actions = torch.randint(0, 4, (1, 12))
    gaps = torch.randint(0, GAP_BUCKETS, (1, 12))
    state, users = model.encode(model.tokens(table[rows], actions, gaps))
    vectors = table[torch.randint(2, 40, (1, n))]
    fused = model.fuse(torch.randn(1, n, 2), torch.randn(1, 1, 4), torch.randn(1, 1, 4))
    hidden = model.hidden(vectors, state, torch.tensor([12]), None, fused)
    point = model.dot_logits(users[:, -1:], vectors) + model.point_logits(hidden)
    return {"point": point, "set": point + model.set_logits(hidden)}


@torch.no_grad()
def values_of(model: Ligr, seed: int) -> dict[str, Tensor]:
    return logits_of(model, seed)


def losses(model: Ligr, batches: int = 6) -> Iterator[Tensor]:
    for seed in range(batches):
        yield logits_of(model, seed)["set"].square().mean()


def test_collect_statistics_covers_all_rows(model: Ligr) -> None:
    """Mean and covariance of all rows, set-wise block included; gradients and hooks are removed at the end."""
    outputs: list[Tensor] = []
    hook = model.blocks[0].up.register_forward_hook(
        lambda *call: outputs.append(call[2].detach().flatten(0, -2).double())
    )
    seen = collect_statistics(model, lambda: losses(model))
    hook.remove()
    rows = torch.cat(outputs)
    assert seen.keys() == model.dense_layers().keys() and len(seen) == 3 * 8
    torch.testing.assert_close(seen["blocks.0.up"].mean, rows.mean(0))
    torch.testing.assert_close(seen["blocks.0.up"].covariance, rows.T.cov(correction=0))
    assert all((one.fisher > 0).any() for one in seen.values())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_factor_leaves_model_and_error_falls_with_rank(model: Ligr, method: str) -> None:
    seen = collect_statistics(model, lambda: losses(model))
    whole = values_of(model, 99)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = []
    for rank in (1, 8, 16):
        small = factor(model, seen, method, dict.fromkeys(seen, rank))
        assert all(
            isinstance(getattr(block, part), LowRank)
            for block in [*small.blocks, *small.set_blocks]
            for part in ("query", "up", "feed_forward_gate")
        )
        found.append(max(float((value - whole[exit]).abs().max()) for exit, value in values_of(small, 99).items()))
    assert found[2] < min(found[:2]) and (method == "afm" or found[2] < 1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_factor_by_afm_at_output_rank_equals_the_model(model: Ligr) -> None:
    seen = collect_statistics(model, lambda: losses(model, 40))
    whole = values_of(model, 99)
    small = factor(model, seen, "afm", {name: layer.out_features for name, layer in model.dense_layers().items()})
    for exit, value in values_of(small, 99).items():
        torch.testing.assert_close(value, whole[exit], atol=1e-5, rtol=0)


def test_graphs_of_factored_layers_have_two_products(model: Ligr) -> None:
    small = factor(
        model, collect_statistics(model, lambda: losses(model)), "svd", {"blocks.0.up": 4, "set_blocks.0.down": 3}
    )
    identity = {exit: [Calibration.identity()] * 2 for exit in EXITS}
    for graph, more in (("encode", 1), ("point", 1), ("set", 1)):
        count = [
            sum(node.op_type == "Gemm" for node in LigrGraphs(one, identity, 20).all()[graph].graph.node)
            for one in (model, small)
        ]
        assert count[1] == count[0] + more
    assert isinstance(small.blocks[0].up, LowRank) and isinstance(small.blocks[1].up, nn.Linear)


def test_timed_layer_costs_grow_with_rank() -> None:
    weight = torch.randn(64, 48, dtype=torch.float64)
    curve = torch.linalg.svdvals(weight)
    layer = timed_layer(curve, weight, rows=8, steps=4)
    sizes = layer_of(curve, weight)
    assert layer.errors == sizes.errors and len(layer.costs) == len(sizes.costs)
    assert layer.costs[0] == 0 and layer.costs == sorted(layer.costs) and layer.costs[1] > 0 < layer.whole
