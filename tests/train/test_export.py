"""A published bundle is what its manifest says, and what misses its bound is not published."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import polars as pl
import pytest
import torch

from slatewise.bundle.features import request_context
from slatewise.bundle.loader import load_bundle, load_rankers
from slatewise.bundle.manifest import ManifestError, read_manifest
from slatewise.bundle.ranker import Ranker, rows_of
from slatewise.inference.arrays import FIRST_ITEM, Candidates, History
from slatewise.inference.engine import CANDIDATE_CHUNK, HISTORY_CHUNK, Engine
from slatewise.schemas import RankRequest
from slatewise_train import export as exporting
from slatewise_train.data import DataConfig, Head, read_table
from slatewise_train.demo.reference import reference_content
from slatewise_train.evaluation import parity as invariance
from slatewise_train.export import (
    FP32_BOUND,
    demo_data,
    export,
    fit_calibrations,
    make_request,
    staging,
    write_content,
    write_graphs,
)
from slatewise_train.meta.limaml import MetaConfig, MetaTrainer, user_vectors
from slatewise_train.rankers.base import EXITS, Calibration
from slatewise_train.rankers.ligr_onnx import LigrGraphs
from slatewise_train.train import TrainConfig, build_model, load_data, train
from tests.conftest import Tiny


def test_bundle_holds_exactly_the_files_of_the_manifest_with_their_digests(tiny: Tiny) -> None:
    found = {str(path.relative_to(tiny.folder)): path for path in tiny.folder.rglob("*") if path.is_file()}
    digests = {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items() if name != "manifest.json"
    }
    assert digests == read_manifest(tiny.folder).files
    assert {f"variants/fp32/{graph}.onnx" for graph in ("encode", *EXITS, "rank")} == {
        name for name in digests if name.endswith(".onnx")
    }
    assert [path.name for path in tiny.folder.parent.iterdir()] == ["1"], "nothing staged is left"


@pytest.mark.parametrize("name", ["items.npy", "display.json", "variants/fp32/set.onnx", "variants/fp32/rank.onnx"])
def test_a_changed_file_is_refused(tiny: Tiny, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "1"
    shutil.copytree(tiny.folder, folder)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ManifestError, match="sha256"):
        load_bundle(folder, 1)


def test_a_published_version_does_not_change(tiny: Tiny) -> None:
    before = (tiny.folder / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="exists"):
        export(tiny.trainer, tiny.learner, tiny.toml, tiny.root, 1)
    assert (tiny.folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("measured", [1.0, 1.1e-5, float("nan")])
def test_a_missed_bound_publishes_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: float
) -> None:
    monkeypatch.setattr(invariance, "measure", lambda *_: {"permutation": 0.0, "padding": measured})
    with pytest.raises(ValueError, match=r"above the bound.*padding"):
        export(tiny.trainer, tiny.learner, tiny.toml, tmp_path, 1)
    assert not (tmp_path / "tiny" / "1").exists()
    with pytest.raises(ManifestError):
        load_rankers(tmp_path, 1)


def test_what_a_server_may_be_set_to_has_no_bound_here(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured, and said in the manifest."""
    monkeypatch.setattr(exporting, "measure_latency", lambda engines, _: {name: {} for name in engines})
    monkeypatch.setattr(invariance, "measure", lambda *_: {"padding": 0.0, "int8_history_state": 0.004})
    ranker = load_bundle(export(tiny.trainer, tiny.learner, tiny.toml, tmp_path, 1, most_users=2), 1)
    assert ranker.manifest.variants["fp32"].invariance == {"padding": 0.0, "int8_history_state": 0.004}


def test_a_bundle_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """An export that fails leaves no version; the next clears what it left and begins anew."""
    with pytest.raises(ValueError, match="half way"), staging(tmp_path / "shop", 1) as stage:
        (stage / "items.npy").touch()
        raise ValueError("half way")
    assert not (tmp_path / "shop" / "1").exists()
    with staging(tmp_path / "shop", 1) as stage:
        assert not list(stage.iterdir())
        (stage / "whole").touch()
        assert not (tmp_path / "shop" / "1").exists()
    assert [path.name for path in (tmp_path / "shop").rglob("*")] == ["1", "whole"]
    with pytest.raises(ValueError, match="exists"), staging(tmp_path / "shop", 1):
        pytest.fail("a published version does not change")


def test_second_version_stands_beside_the_first_and_is_served(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny.root / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny" / ".staging-2").mkdir()  # of an export that was killed
    (tmp_path / "tiny" / ".staging-2" / "rubbish").touch()
    monkeypatch.setattr(exporting, "measure_latency", lambda engines, _: {name: {} for name in engines})
    assert export(tiny.trainer, tiny.learner, tiny.toml, tmp_path, 2, most_users=2) == tmp_path / "tiny" / "2"
    assert load_rankers(tmp_path, 1)["tiny"].manifest.version == 2
    assert not (tmp_path / "tiny" / "2" / "rubbish").exists()
    for name in ("items.npy", "ids.json", "display.json"):
        assert (tmp_path / "tiny" / "2" / name).read_bytes() == (tiny.folder / name).read_bytes(), (
            "the same weights give the same bytes"
        )


def test_manifest_describes_the_trained_ranker(ranker: Ranker, tiny: Tiny) -> None:
    manifest = ranker.manifest
    data = tiny.trainer.data
    model = tiny.trainer.model
    assert (manifest.ranker, manifest.version, manifest.space) == ("tiny", 1, "tiny-1")
    assert manifest.trained_on == tiny.toml["data"]["trained_on"]
    assert manifest.heads == {"watch": 1.0, "like": 0.5}
    assert manifest.exits == list(EXITS) and manifest.default_exit in EXITS
    assert (manifest.width, manifest.meta_size) == (model.config.width, model.config.meta_size)
    assert manifest.limits.history_used == data.config.history_length and manifest.limits.set_wise == 1024
    assert manifest.features == ["popularity", "year"] and manifest.actions == data.catalogue.vocabulary.actions
    np.testing.assert_array_equal(ranker.items, model.item_table().detach().numpy())
    assert json.loads((tiny.folder / "ids.json").read_text()) == data.catalogue.vocabulary.items
    np.testing.assert_array_equal(ranker.default_meta, model.default_meta.detach().numpy())
    kinds = [head.kind for head in data.config.heads]
    np.testing.assert_array_equal(
        ranker.embedded_meta, user_vectors(tiny.learner, model, kinds, data.sequences, data.config.history_length)
    )
    assert list(ranker.embedded_users) == data.sequences.users


def test_graphs_are_what_the_manifest_says(ranker: Ranker, tiny: Tiny) -> None:
    for name, io in ranker.manifest.graphs.items():
        session = ranker.engines["fp32"].sessions[name]
        for described, found in ((io.inputs, session.get_inputs()), (io.outputs, session.get_outputs())):
            assert {n: t.shape for n, t in described.items()} == {v.name: v.shape for v in found}
            kinds = {"float32": "tensor(float)", "float64": "tensor(double)", "int64": "tensor(int64)"}
            assert {n: kinds[t.dtype] for n, t in described.items()} == {v.name: v.type for v in found}
        graph = onnx.load(tiny.folder / "variants" / "fp32" / f"{name}.onnx")
        assert all(len(ranker.items) not in weight.dims for weight in graph.graph.initializer), (
            "one item table for all graphs"
        )
    served = [tiny.folder / "variants" / "fp32" / f"{name}.onnx" for name in ("encode", *EXITS)]
    assert set(ranker.manifest.graphs) == {path.stem for path in served}
    assert ranker.manifest.variants["fp32"].bytes == sum(
        path.stat().st_size for path in (*served, tiny.folder / "items.npy")
    )


def test_rank_in_the_bundle_gives_the_golden_scores_in_one_graph(ranker: Ranker, tiny: Tiny) -> None:
    """With the bundle's item table, calibrations and head weights, where the default exit is the highest."""
    request = RankRequest.model_validate(ranker.manifest.example)
    history, _ = ranker.history(request)
    candidates, _ = ranker.candidates(request, request.request_time or 0.0)
    rows = rows_of(ranker.vocabulary.items, request.candidates.item_ids)
    meta = ranker.embedded_meta_of(request.user)
    session = ort.InferenceSession(
        str(tiny.folder / "variants" / "fp32" / "rank.onnx"), providers=["CPUExecutionProvider"]
    )
    feeds = {
        "history": history.items,
        "actions": history.actions,
        "gaps": history.gaps,
        "candidates": rows,
        "numeric": candidates.numeric,
        "meta": meta,
    }
    probabilities, scores = session.run(
        ["probabilities", "scores"], {name: a[None] for name, a in feeds.items()} | {"context": candidates.context}
    )
    expected = ranker.engines["fp32"].score(history, candidates, meta, ranker.manifest.exits[-1])
    np.testing.assert_allclose(probabilities[0], expected, rtol=0, atol=FP32_BOUND)
    np.testing.assert_allclose(scores[0], expected @ ranker.score_weights(None), rtol=0, atol=2 * FP32_BOUND)
    if ranker.manifest.default_exit == ranker.manifest.exits[-1]:
        np.testing.assert_allclose(
            scores[0], ranker.manifest.variants["fp32"].golden_scores, rtol=0, atol=2 * FP32_BOUND
        )


def test_fields_of_the_bundle_describe_an_unknown_item_as_training_did(ranker: Ranker, tiny: Tiny) -> None:
    data = tiny.trainer.data
    rows = [FIRST_ITEM, FIRST_ITEM + 50, len(ranker.items) - 1]
    vocabulary = data.catalogue.vocabulary
    fields = {}
    for name, values in vocabulary.fields.items():
        fields[name] = [[values[v - 1] for v in data.catalogue.field_values[name][row] if v] or None for row in rows]
    body = {"candidates": {"item_ids": ["never seen"] * len(rows), "fields": fields}}
    candidates, unknown = ranker.candidates(RankRequest.model_validate(body), 0.0)
    model = tiny.trainer.model
    with torch.no_grad():
        expected = model.cold_item_vectors(model.item_table())[rows].numpy()
    np.testing.assert_allclose(candidates.vectors, expected, rtol=0, atol=1e-6)
    assert unknown.tolist() == [0, 1, 2]


def test_example_is_a_request_that_works_and_shows_enough(ranker: Ranker, tiny: Tiny) -> None:
    request = RankRequest.model_validate(ranker.manifest.example)
    assert len(request.candidates.item_ids) >= 20 and len(request.history.item_ids) >= 10
    assert request.request_time is not None and request.user in ranker.embedded_users
    assert len(set(request.candidates.item_ids)) == len(request.candidates.item_ids)
    assert not set(request.candidates.item_ids) & set(request.history.item_ids)
    assert request.history.timestamps == sorted(request.history.timestamps or [])
    assert request.request_time >= (request.history.timestamps or [])[-1]
    display = json.loads((tiny.folder / "display.json").read_text())
    for item in (*request.history.item_ids, *request.candidates.item_ids):
        assert str(item) in ranker.vocabulary.items and display[str(item)]["title"]
    assert set(request.history.actions or []) <= set(ranker.manifest.actions)
    assert set(request.candidates.features) == set(ranker.manifest.features)


def test_golden_scores_are_reproduced(ranker: Ranker) -> None:
    manifest = ranker.manifest
    request = RankRequest.model_validate(ranker.manifest.example)
    first = max(0, len(request.history.item_ids) - manifest.limits.history_used)
    assert first == 0, "so what is read is what is sent"
    history, _ = ranker.history(request)
    candidates, unknown = ranker.candidates(request, request.request_time or 0.0)
    assert not len(unknown)
    np.testing.assert_array_equal(candidates.context[0], request_context(request.request_time or 0.0))
    probabilities = ranker.engines["fp32"].score(
        history, candidates, ranker.embedded_meta[ranker.embedded_users[str(request.user)]], manifest.default_exit
    )
    golden = np.array(manifest.variants["fp32"].golden_scores)
    np.testing.assert_allclose(golden, probabilities[:, 0] * 1.0 + probabilities[:, 1] * 0.5, rtol=0, atol=FP32_BOUND)
    assert len(golden) == len(candidates) and np.ptp(golden) > 1e-4, "scores that are all alike would prove nothing"


def test_another_golden_score_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "1"
    shutil.copytree(tiny.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["variants"]["fp32"]["golden_scores"][3] += 1e-4
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="golden scores differ"):
        load_bundle(folder, 1)


def test_every_exit_has_its_quality_and_it_is_the_reports(ranker: Ranker, tiny: Tiny) -> None:
    report = json.loads((tiny.folder / "report.json").read_text())
    variant = ranker.manifest.variants["fp32"]
    assert set(variant.quality) == set(EXITS)
    for exit, row in variant.quality.items():
        assert row == {"leave_one_out": report["leave_one_out"][exit], "slates": report["slates"][exit]}
        assert row["leave_one_out"]["users"] == sum(np.diff(tiny.trainer.data.sequences.offsets) >= 2)
    assert report["bad_rows"] == tiny.trainer.data.bad_rows
    assert variant.latency_ms["machine"] and len(variant.latency_ms["rows"]) == 6
    assert (tiny.folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_warmup_has_the_smallest_and_the_largest_shapes(ranker: Ranker) -> None:
    shapes = [(len(r.history.item_ids), len(r.candidates.item_ids)) for r in ranker.warmup]
    assert shapes == [(0, 1), (1, 20), (128, CANDIDATE_CHUNK), (HISTORY_CHUNK, ranker.manifest.limits.set_wise)]


def test_calibrations_are_fitted_on_the_validation_users_alone(ranker: Ranker, tiny: Tiny) -> None:
    data = tiny.trainer.data
    asked = []

    class Recorder:
        sessions = dict.fromkeys(("encode", *EXITS))
        items = ranker.items

        def score(self, history: Any, candidates: Any, meta: np.ndarray, exit: str) -> np.ndarray:
            asked.append(history)
            return np.random.default_rng(len(asked)).uniform(0.2, 0.8, (len(candidates), 2))

    found = fit_calibrations(Recorder(), data, ranker.default_meta)  # type: ignore[arg-type]
    assert set(found) == set(EXITS) and all(len(column) == 2 for column in found.values())
    users = data.split.validation_users
    ends = {tuple(data.sequences.items[data.sequences.offsets[u] :][: data.split.train_lengths[u]][-5:]) for u in users}
    assert {tuple(history.items[-5:]) for history in asked} == ends
    assert len(found["point"][1].knots), "150 labels are enough"


def test_without_validation_users_calibrations_are_the_identity(ranker: Ranker, tiny: Tiny) -> None:
    data = tiny.trainer.data
    split = dataclasses.replace(data.split, validation_users=np.zeros(0, np.int64))
    found = fit_calibrations(ranker.engines["fp32"], dataclasses.replace(data, split=split), ranker.default_meta)
    x = np.linspace(-5, 5, 11)
    assert all((c(x) == x).all() for column in found.values() for c in column)


def test_ranker_without_set_blocks_has_no_exit_set(tiny: Tiny) -> None:
    data = tiny.trainer.data
    model = build_model(data.catalogue, data.config, tiny.toml["model"] | {"set_blocks": 0})
    graphs = LigrGraphs(model, {exit: [Calibration.identity()] * 2 for exit in EXITS}, 10).all()
    assert set(graphs) == {"encode", "dot", "point"}


@pytest.fixture
def demo(tiny: Tiny, tmp_path: Path) -> dict[str, Any]:
    """A TOML whose demo has two users and some items; one item, a user's event, is unknown to the ranker."""
    items = read_table(Path(tiny.toml["data"]["items"])).head(400)
    events = read_table(Path(tiny.toml["data"]["events"])).filter(
        pl.col("user_id").is_in(["1", "6"]) & pl.col("item_id").is_in(items["item_id"].to_list())
    )
    unknown = items.head(1).with_columns(item_id=pl.lit("999999"), title=pl.lit("Nobody Knows"))
    pl.concat([items, unknown]).write_csv(tmp_path / "items.csv")
    pl.concat([events, events.head(1).with_columns(item_id=pl.lit("999999"))]).write_csv(tmp_path / "events.csv")
    return tiny.toml | {
        "demo": {"events": str(tmp_path / "events.csv"), "items": str(tmp_path / "items.csv"), "user_prefix": "demo:"}
    }


def test_only_the_demo_is_shown(tiny: Tiny, demo: dict[str, Any]) -> None:
    shown = demo_data(tiny.trainer, tiny.learner, demo)
    listed = read_table(Path(demo["demo"]["items"]))
    assert set(shown.titles) == set(listed["item_id"].to_list()) - {"999999"}
    assert len(shown.titles) < len(tiny.trainer.data.catalogue.vocabulary.items)
    row = next(listed.iter_rows(named=True))
    assert shown.titles[row["item_id"]] == {
        "title": row["title"],
        "genres": row["genres"].split("|"),
        "decade": [row["decade"]],
    }
    assert shown.users and set(shown.users) == {"demo:" + user for user in shown.sequences.users}
    assert (
        shown.vectors.shape == (len(shown.users), tiny.trainer.model.config.meta_size)
        and shown.vectors.dtype == np.float32
    )


def test_users_vectors_are_learned_without_touching_the_ranker(tiny: Tiny, demo: dict[str, Any]) -> None:
    model = tiny.trainer.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vectors = demo_data(tiny.trainer, tiny.learner, demo).vectors
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert np.isfinite(vectors).all()
    assert (np.abs(vectors - model.default_meta.detach().numpy()).max(axis=1) > 1e-4).all()


def test_a_user_of_unknown_items_alone_keeps_the_default_vector(tiny: Tiny) -> None:
    s = tiny.trainer.data.sequences
    items = s.items.copy()
    items[: s.offsets[1]] = 0
    kinds = [head.kind for head in tiny.trainer.data.config.heads]
    vectors = user_vectors(tiny.learner, tiny.trainer.model, kinds, dataclasses.replace(s, items=items), 128)
    default = tiny.trainer.model.default_meta.detach().numpy()
    np.testing.assert_array_equal(vectors[0], default)
    assert (vectors[1:] != default).any(axis=1).all()


def test_example_of_a_demo_names_nothing_that_is_not_shown(tiny: Tiny, demo: dict[str, Any]) -> None:
    shown = demo_data(tiny.trainer, tiny.learner, demo)
    request = make_request(shown, tiny.trainer.data, 0, shown.users[0], 40, 24, np.random.default_rng(0))
    assert request["user"].startswith("demo:")
    assert set(request["history"]["item_ids"]) | set(request["candidates"]["item_ids"]) <= set(shown.titles)
    RankRequest.model_validate(request)


def bring_your_own(folder: Path, config: DataConfig, items: int, users: int = 12, length: int = 14) -> Ranker:
    """CSV files of a shop, trained for a moment, exported and loaded."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{u}", f"i{rng.integers(items)}", 1e9 + 100 * k, int(rng.integers(2)))
        for u in range(users)
        for k in range(length)
    ]
    pl.DataFrame(rows, ["user_id", "item_id", "timestamp", "label_buy"], orient="row").write_csv(folder / "events.csv")
    pl.DataFrame({"item_id": [f"i{k}" for k in range(items)], "price": [k + 0.5 for k in range(items)]}).write_csv(
        folder / "items.csv"
    )
    toml = {"data": {name: str(folder / f"{name}.csv") for name in ("events", "items")}}
    shape = {"width": 8, "blocks": 1, "attention_heads": 1, "set_blocks": 1, "meta_size": 4}
    short = TrainConfig(epochs=2, ladder_epochs=1, batch_events=256, negatives=16, warmup_steps=1)
    trainer = train(load_data(config, toml), shape, short, folder / "train")
    learner = MetaTrainer(trainer.model, trainer.data, MetaConfig(shortest=2, query=3, support=5, epochs=1)).train(
        folder / "train"
    )
    return load_bundle(export(trainer, learner, toml, folder, 1), 1)


NEXT = Head("next", "next", 1.0)
BUY = Head("buy", "label", 1.0)
HELD_OUT = {"slate_size": 4, "slate_users": 3, "validation_users": 3, "history_length": 80}


@pytest.mark.parametrize(
    "config",
    [
        DataConfig("shop", (NEXT, BUY), **HELD_OUT),
        DataConfig("shop", (NEXT,), numeric=("price",), **HELD_OUT),
        DataConfig("shop", (BUY,), numeric=("price",), **HELD_OUT),
        DataConfig("shop", (NEXT,), slate_size=4, history_length=80),
        DataConfig("shop", (NEXT, BUY), **(HELD_OUT | {"history_length": 10})),
    ],
    ids=["no columns", "only next", "only a label", "nobody held out", "short history"],
)
def test_bring_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: DataConfig) -> None:
    monkeypatch.setattr(exporting, "measure_latency", lambda engines, _: {name: {} for name in engines})
    monkeypatch.setattr(invariance, "SLATES", (1, 5))
    ranker = bring_your_own(tmp_path, config, items=90)
    assert list(ranker.manifest.heads) == [head.name for head in config.heads]
    assert ranker.manifest.features == list(config.numeric)
    assert set(ranker.engines) == {"fp32"}


def test_bring_your_own_small_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "measure_latency", lambda engines, _: {name: {} for name in engines})
    monkeypatch.setattr(invariance, "SLATES", (1, 5))
    ranker = bring_your_own(tmp_path, DataConfig("shop", (NEXT, BUY), **HELD_OUT), items=12)
    assert len(ranker.manifest.example["candidates"]["item_ids"]) >= 20, "duplicates are allowed"


# The reference bundle


def test_the_reference_has_the_shape_that_is_documented() -> None:
    content = reference_content()
    config = content.model.config
    assert (config.width, config.blocks, config.attention_heads, config.feed_forward, config.set_blocks) == (
        128,
        4,
        4,
        4,
        1,
    )
    assert (config.heads, config.numeric, config.meta_size, config.fields) == (2, 4, 64, {})
    assert (len(content.model.blocks), len(content.model.set_blocks)) == (4, 1)
    assert content.model.blocks[0].up.weight.shape == (512, 128) and content.model.set_out.weight.shape == (2, 128)
    assert content.ids == [str(k) for k in range(5_000)]
    assert content.model.item_table().shape == (5_000 + FIRST_ITEM, 128)
    assert len(content.actions) == config.actions - 1 and len(content.features) == 4 and len(content.heads) == 2
    assert content.vectors.shape == (len(content.users), 64) and content.vectors.dtype == np.float32
    assert content.exits == list(EXITS) and content.history_used == 2_048
    assert not content.model.training


def test_the_reference_is_the_same_twice() -> None:
    """Weights, vectors and requests, whatever was drawn before."""
    one = reference_content()
    torch.manual_seed(123)
    np.random.default_rng().normal()
    other = reference_content()
    first, second = (content.model.state_dict() for content in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0)
    np.testing.assert_array_equal(one.vectors, other.vectors)
    for name in ("ids", "actions", "features", "fields", "heads", "users", "titles", "example", "warmup"):
        assert getattr(one, name) == getattr(other, name), name


def test_the_references_weights_set_every_exit_and_head_apart() -> None:
    """Nothing that training would move is left at zero, where a part of the work would change nothing."""
    model = reference_content().model
    for name in ("point_down.weight", "set_out.weight", "default_meta", "fusion.weight"):
        assert (model.state_dict()[name].abs() > 0).float().mean() > 0.99, name


def test_the_references_example_and_warmup_are_requests_of_its_own() -> None:
    content = reference_content()
    request = RankRequest.model_validate(content.example)
    assert request.user in content.users and request.request_time is not None
    assert len(request.candidates.item_ids) >= 20 and len(request.history.item_ids) >= 10
    assert set(request.candidates.item_ids) | set(request.history.item_ids) <= set(content.ids)
    assert request.history.actions is not None and set(request.history.actions) <= set(content.actions)
    assert request.history.timestamps is not None and None not in request.history.timestamps
    assert len(request.history.actions) == len(request.history.timestamps) == len(request.history.item_ids)
    assert request.history.timestamps == sorted(t for t in request.history.timestamps if t is not None)
    assert set(request.candidates.features) == set(content.features)
    assert all(len(column) == len(request.candidates.item_ids) for column in request.candidates.features.values())
    shapes = [
        (len(r.history.item_ids), len(r.candidates.item_ids)) for r in map(RankRequest.model_validate, content.warmup)
    ]
    assert shapes == [(0, 1), (1, 20), (2_048, CANDIDATE_CHUNK), (HISTORY_CHUNK, 1_024)]
    json.dumps([content.example, content.warmup])


def test_the_references_content_is_a_bundle_that_ranks_its_example(tmp_path: Path) -> None:
    """Written as it is published, but for what is measured on it."""
    content = reference_content()
    write_content(tmp_path, content)
    items = np.load(tmp_path / "items.npy")
    write_graphs(tmp_path, LigrGraphs(content.model, content.identity, content.longest_call).all())
    engine = Engine(tmp_path, items, content.exits, 1)
    request = RankRequest.model_validate(content.example)
    rows = [content.ids.index(i) + FIRST_ITEM for i in request.history.item_ids]
    slate = items[[content.ids.index(i) + FIRST_ITEM for i in request.candidates.item_ids]]
    numeric = np.array([request.candidates.features[name] for name in content.features], np.float32).T
    candidates = Candidates(slate, np.ascontiguousarray(numeric), request_context(request.request_time or 0.0)[None])
    history = History(np.array(rows), np.ones(len(rows), np.int64), np.full(len(rows), 5))
    found = [engine.score(history, candidates, content.vectors[0], exit) for exit in content.exits]
    assert all(
        p.shape == (len(slate), 2) and (p > 0).all() and (p < 1).all() and (np.ptp(p, axis=0) > 1e-4).all()
        for p in found
    )
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.combinations(found, 2)), "three exits, not one"
