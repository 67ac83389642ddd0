"""`feed_forward_rank` in `[model]`: feed-forward layers of two thin matrices, from the first step to the graphs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from slatewise.inference.arrays import FIRST_ITEM, GAP_BUCKETS, Candidates, History
from slatewise.inference.engine import Engine
from slatewise_train.bundle_writer import write_graphs
from slatewise_train.graph_check import check_variant, layers_of_low_rank
from slatewise_train.rankers import families
from slatewise_train.rankers.base import uncalibrated
from slatewise_train.rankers.layers import LowRank
from slatewise_train.rankers.ligr import Ligr, LigrConfig
from slatewise_train.rankers.ligr_student import half, shrink

CONFIG = LigrConfig(items=30, actions=4, fields={}, numeric=2, heads=2, width=8, blocks=2, meta_size=3)
THIN = replace(CONFIG, feed_forward_rank=3)
GRAPHS = ["encode", "dot", "point", "set"]


def make_model(config: LigrConfig = THIN) -> Ligr:
    torch.manual_seed(1)
    model = Ligr(config, {}, torch.zeros(2), torch.ones(2))
    for name in ("point_down.weight", "set_out.weight"):  # zero before training
        nn.init.normal_(model.get_parameter(name))
    return model.eval()


def dense_form(model: Ligr) -> Ligr:
    """The ranker with each pair of thin layers multiplied out."""
    return shrink(model, {})


def test_layers_of_a_rank_are_thin_in_all_blocks() -> None:
    model = make_model()
    for block in (*model.blocks, *model.set_blocks):
        for layer, size, out in ((block.up, 8, 32), (block.down, 32, 8)):
            assert isinstance(layer, LowRank)
            assert layer.first.weight.shape == (3, size) and layer.second.weight.shape == (out, 3)
    names = model.dense_layers().keys()
    assert len(names) == 3 * 6 and not any("up" in name or "down" in name for name in names)


def test_thin_layers_start_as_the_closest_form_of_a_dense_one() -> None:
    """At full rank they are an orthogonal map's: the norms of both factors are equal, and the spread that of a dense
    layer."""
    whole = make_model(replace(CONFIG, width=64, feed_forward_rank=64)).blocks[0].up
    assert isinstance(whole, LowRank)
    bound = (6 / (64 + 256)) ** 0.5  # of Xavier's uniform weights
    weight = whole.product()
    assert 0.98 * bound < float(weight.abs().max()) < 1.001 * bound
    assert abs(float(weight.std()) / (bound / 3**0.5) - 1) < 0.05
    thin = make_model(replace(CONFIG, width=64, feed_forward_rank=16)).blocks[0].up
    assert isinstance(thin, LowRank)
    torch.testing.assert_close(
        thin.first.weight @ thin.first.weight.T, thin.second.weight.T @ thin.second.weight, atol=1e-5, rtol=0
    )
    assert not thin.second.bias.any() and torch.linalg.matrix_rank(thin.product()) == 16


def test_thin_layers_equal_the_dense_layer_of_their_product() -> None:
    model = make_model()
    dense = dense_form(model)
    assert dense.config.feed_forward_rank == 0 and isinstance(dense.blocks[0].up, nn.Linear)
    x = torch.randn(2, 7, 8)
    for one, other in zip(model.encode(x)[1], dense.encode(x)[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.set_logits(x), dense.set_logits(x), atol=1e-5, rtol=1e-5)
    assert half(model.config)["feed_forward"] == 2 and shrink(model, half(model.config)).config.feed_forward == 2


def test_without_a_rank_nothing_changes() -> None:
    """The identity of a checkpoint contains the config's text; bundles from before the key have no value for it."""
    assert "feed_forward_rank" not in repr(CONFIG) and "feed_forward_rank=3" in repr(THIN)
    assert repr(CONFIG).startswith("LigrConfig(items=30, actions=4, fields={}, numeric=2, heads=2, width=8, blocks=2, ")
    assert not any(isinstance(module, LowRank) for module in make_model(CONFIG).modules())


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(ValueError, match="feed_forward_rank = 9 must not be more than width = 8"):
        replace(CONFIG, feed_forward_rank=9)


def test_training_of_thin_layers_changes_both() -> None:
    model = make_model().train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.set_logits(torch.randn(2, 5, 8)).square().mean().backward()
    optimizer.step()
    for part in ("first.weight", "second.weight", "second.bias"):
        name = f"set_blocks.0.up.{part}"
        assert not torch.equal(model.state_dict()[name], before[name])


def scores(model: Ligr, folder: Path) -> np.ndarray:
    """Probabilities by the exported graphs for a fixed request."""
    exits = list(model.exits)
    write_graphs(folder, families.graphs(model, uncalibrated(exits, 2), 20).all())
    items = model.item_table().detach().numpy()
    engine = Engine(folder, items, exits)
    rng = np.random.default_rng(0)
    rows = rng.integers(FIRST_ITEM, len(items), 12)
    history = History(rows, rng.integers(0, 4, 12), rng.integers(0, GAP_BUCKETS, 12))
    numeric = rng.normal(size=(9, 2)).astype(np.float32)
    candidates = Candidates(items[rng.integers(FIRST_ITEM, len(items), 9)], numeric, np.zeros((1, 4), np.float32))
    return engine.score(history, candidates, np.ones(3, np.float32), "set")


def test_graphs_have_two_products_and_the_scores_of_one(tmp_path: Path) -> None:
    model = make_model()
    thin, dense = (scores(one, tmp_path / name) for name, one in (("thin", model), ("dense", dense_form(model))))
    np.testing.assert_allclose(thin, dense, atol=1e-6)
    weights = {weight.name for weight in onnx.load(tmp_path / "thin/set.onnx").graph.initializer}
    assert {"set_blocks.0.up.first.weight", "set_blocks.0.up.second.weight"} <= weights
    own = layers_of_low_rank(tmp_path / "thin", GRAPHS)
    assert own > 0 == layers_of_low_rank(tmp_path / "dense", GRAPHS)
    check_variant("fp32", tmp_path / "thin", GRAPHS, "items.npy", own)  # as it was trained
    check_variant("student", tmp_path / "dense", GRAPHS, "items.npy", own)
