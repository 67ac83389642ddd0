"""A bundle's weights back in torch: written again, they are the bundle's graphs."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from slatewise.bundle.loader import versions
from slatewise.bundle.manifest import read_manifest
from slatewise.inference.engine import HISTORY_CHUNK
from slatewise_train.compression.source import restore
from slatewise_train.demo.reference import reference_content
from slatewise_train.export import publish, staging, write_content
from slatewise_train.rankers.ligr import Ligr
from slatewise_train.rankers.ligr_onnx import LigrGraphs
from tests.conftest import DEMO, Tiny


def assert_written_again(folder: Path) -> None:
    manifest = read_manifest(folder)
    model, calibrations = restore(folder)
    np.testing.assert_array_equal(model.item_table().detach().numpy(), np.load(folder / "items.npy"))
    graphs = LigrGraphs(model, calibrations, max(manifest.limits.history_used, HISTORY_CHUNK)).all()
    assert graphs.keys() == manifest.graphs.keys()
    for name, graph in graphs.items():
        assert graph == onnx.load(folder / "variants/fp32" / f"{name}.onnx"), name


def test_the_tiny_bundle(tiny: Tiny) -> None:
    assert_written_again(tiny.folder)


def test_the_demo() -> None:
    assert_written_again(DEMO / "movielens" / str(versions(DEMO / "movielens")[-1]))


@pytest.mark.parametrize(
    "change",
    [
        {"numeric": 0},
        {"set_blocks": 0},
        {"blocks": 1, "attention_heads": 1, "feed_forward": 2},
        {"key_heads": 2, "key_size": 2},
    ],
    ids=str,
)
def test_other_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, int]) -> None:
    """Without numeric features, without a set-wise block, and shallow."""
    whole = reference_content()
    config = dataclasses.replace(whole.model.config, items=len(whole.ids[:100]) + 2, width=16, **{"blocks": 2} | change)
    torch.manual_seed(1)
    model = Ligr(config, {}, torch.randn(config.numeric), torch.rand(config.numeric) + 1).eval()
    for last in (model.point_down, model.set_out):
        torch.nn.init.xavier_uniform_(last.weight)
    ids = whole.ids[:100]
    example = {"history": {"item_ids": ids[:3]}, "candidates": {"item_ids": ids[:5]}, "request_time": 1.7e9}
    features = whole.features[: config.numeric]
    content = dataclasses.replace(
        whole, model=model, ids=ids, features=features, example=example, history_used=64, warmup=[]
    )
    monkeypatch.setattr("slatewise_train.export.measure_latency", lambda engines, _: {name: {} for name in engines})
    monkeypatch.setattr("slatewise_train.evaluation.parity.SLATES", (1, 5))
    with staging(tmp_path, 1) as stage:
        write_content(stage, content)
        publish(stage, content, content.identity, 1, lambda _: {}, content.exits[-1])
    assert_written_again(tmp_path / "1")


def test_a_graph_without_a_weight_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "1"
    shutil.copytree(tiny.folder, folder)
    graph = onnx.load(folder / "variants/fp32/encode.onnx")
    for weight in graph.graph.initializer:
        if weight.name == "user_norm.weight":
            weight.name = "other"
    onnx.save(graph, folder / "variants/fp32/encode.onnx")
    with pytest.raises(KeyError, match="user_norm"):
        restore(folder)
