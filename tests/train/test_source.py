"""The weights of a bundle: loaded again, they give the bundle's graphs bit for bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from slatewise.bundle.files import sha256
from slatewise.bundle.loader import load_bundle
from slatewise.bundle.manifest import ManifestError, read_manifest, versions
from slatewise.inference.engine import Engine
from slatewise_train.bundle_writer import CALIBRATION, longest_call, write_graphs
from slatewise_train.compression.source import Source
from slatewise_train.demo.reference import publish_uncalibrated, reference_content
from slatewise_train.evaluation.calibration import read_calibrations
from slatewise_train.evaluation.parity import Requests
from slatewise_train.rankers import families
from slatewise_train.rankers.weights import load_model, serving_form
from tests.conftest import DEMO, Tiny

DEMO_FOLDER = DEMO / "movielens" / str(versions(DEMO / "movielens")[-1])


def rebuilt_graphs(folder: Path) -> dict[str, onnx.ModelProto]:
    """The graphs of fp32, from the config, weights and calibrations that the bundle's files hold."""
    manifest = read_manifest(folder)
    calibrations = read_calibrations(folder / "variants/fp32" / CALIBRATION)
    longest = longest_call(manifest.limits.history_used)
    return families.graphs(load_model(folder, manifest), calibrations, longest).all()


def assert_rebuilt_graphs_are_equal(folder: Path) -> None:
    manifest = read_manifest(folder)
    model = load_model(folder, manifest)
    np.testing.assert_array_equal(model.item_table().detach().numpy(), np.load(folder / "items.npy"))
    graphs = rebuilt_graphs(folder)
    assert graphs.keys() == manifest.graphs.keys()
    for name, graph in graphs.items():
        assert graph == onnx.load(folder / "variants/fp32" / f"{name}.onnx"), name


def test_graphs_rebuilt_from_the_bundle_are_equal(tiny: Tiny) -> None:
    assert_rebuilt_graphs_are_equal(tiny.folder)


def test_graphs_rebuilt_from_the_demo_give_the_same_scores(tmp_path: Path) -> None:
    manifest = read_manifest(DEMO_FOLDER)
    write_graphs(tmp_path, rebuilt_graphs(DEMO_FOLDER))
    items = np.load(DEMO_FOLDER / "items.npy")
    copied, rebuilt = (Engine(f, items, manifest.exits) for f in (DEMO_FOLDER / "variants/fp32", tmp_path))
    draw = Requests(copied, manifest)
    for length, n in ((0, 1), (40, 37), (200, 600)):
        history = draw.history(length)
        candidates = draw.candidates(n)
        meta = draw.meta()
        for exit in manifest.exits:
            found, expected = (engine.score(history, candidates, meta, exit) for engine in (rebuilt, copied))
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"numeric": 0},
        {"set_blocks": 0},
        {"blocks": 1, "attention_heads": 1, "feed_forward": 2},
        {"key_heads": 2, "key_size": 2},
        {"decoder_blocks": 1},
        {"meta_size": 0},
    ],
    ids=str,
)
def test_graphs_rebuilt_from_other_shapes_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, int]
) -> None:
    """The shapes lack numeric features, set-wise blocks or meta-embeddings, are shallow, or share key heads."""
    whole = reference_content()
    ids = whole.ids[:100]
    config = dataclasses.replace(whole.model.config, items=len(ids) + 2, width=16, **{"blocks": 2} | change)
    torch.manual_seed(1)
    columns = families.ItemColumns({}, torch.randn(config.numeric), torch.rand(config.numeric) + 1)
    model = families.build(whole.model.family, config, columns).eval()
    for name in ("point_down.weight", "set_out.weight"):
        torch.nn.init.xavier_uniform_(model.get_parameter(name))
    example = {"history": {"item_ids": ids[:3]}, "candidates": {"item_ids": ids[:5]}, "request_time": 1.7e9}
    changes = {"ids": ids, "features": whole.features[: config.numeric], "example": example, "history_used": 64}
    vectors = whole.vectors[:, : config.meta_size]
    content = dataclasses.replace(whole, model=model, vectors=vectors, warmup=[], **changes)
    monkeypatch.setattr("slatewise_train.bundle_writer.measure_latency", lambda engines, _: {n: {} for n in engines})
    monkeypatch.setattr("slatewise_train.evaluation.parity.SLATES", (1, 5))
    folder = publish_uncalibrated(content, tmp_path / "reference", 1)
    assert_rebuilt_graphs_are_equal(folder)
    assert load_bundle(folder).default_meta.shape == (config.meta_size,)


def test_serving_form_folds_fields_into_the_item_vectors(tiny: Tiny) -> None:
    model = tiny.trainer.model
    folded = serving_form(model)
    assert model.config.fields and not folded.config.fields
    torch.testing.assert_close(folded.item_table(), model.item_table(), rtol=0, atol=0)
    for name, value in folded.state_dict().items():
        if name != "item.weight":
            torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    shutil.copytree(tiny.folder, tmp_path / "1")
    return tmp_path / "1"


def rewrite_weights(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write weights.npz, and its digest into the manifest."""
    np.savez(folder / "weights.npz", **arrays)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["weights.npz"] = sha256(folder / "weights.npz")
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_load_weights_of_another_model_is_refused(copy: Path, change: str) -> None:
    with np.load(copy / "weights.npz") as found:
        arrays = dict(found)
    bias = arrays.pop("user_norm.weight")
    arrays |= {
        "missing": {},
        "unknown": {"user_norm.weight": bias, "other": bias},
        "shape": {"user_norm.weight": bias[1:]},
    }[change]
    rewrite_weights(copy, arrays)
    with pytest.raises(ManifestError, match="weights of another model"):
        load_model(copy, read_manifest(copy))


def test_load_weights_with_other_digest_is_refused(copy: Path) -> None:
    content = (copy / "weights.npz").read_bytes()
    (copy / "weights.npz").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ManifestError, match=r"weights\.npz does not have the manifest's sha256"):
        load_model(copy, read_manifest(copy))


def test_load_pickled_weights_is_refused(copy: Path) -> None:
    rewrite_weights(copy, {"user_norm.weight": np.array([{}], object)})
    with pytest.raises(ManifestError, match=r"cannot be read.*allow_pickle=False"):
        load_model(copy, read_manifest(copy))


def test_source_of_format_1_says_to_export_again(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["model"]
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(ManifestError, match="format 1 has no weights to load; export the ranker again"):
        Source(copy, None)


def test_source_with_other_data_is_refused(tiny: Tiny, copy: Path) -> None:
    np.save(copy / "items.npy", np.load(copy / "items.npy")[:-1])
    with pytest.raises(ValueError, match="other data"):
        Source(copy, tiny.trainer.data)
