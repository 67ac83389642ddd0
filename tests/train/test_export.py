"""Export: the bundle is described by its manifest, and nothing above its bound is published."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from datetime import date
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
from slatewise.inference.arrays import FIRST_ITEM, PointScores
from slatewise.inference.engine import CANDIDATE_CHUNK, HISTORY_CHUNK
from slatewise.schemas import RankRequest
from slatewise.settings import Settings
from slatewise_train import bundle_writer
from slatewise_train.bundle_writer import FP32_BOUND, staging, write_content
from slatewise_train.config import (
    Config,
    DataConfig,
    DemoConfig,
    Head,
    MetaConfig,
    ModelConfig,
    TablesConfig,
    TrainConfig,
)
from slatewise_train.data import Data, build_sequences, clean_events, load_data, read_table
from slatewise_train.demo.content import (
    EXAMPLE_CANDIDATES,
    EXAMPLE_USERS,
    DemoData,
    demo_data,
    draw_slate,
    example_request,
    example_requests,
    least_events,
    made_up_sequences,
    make_request,
    titles_of,
)
from slatewise_train.evaluation import parity
from slatewise_train.evaluation.calibration import fit_calibrations, read_calibrations
from slatewise_train.export import ExportOptions, export, load_block, make_content
from slatewise_train.meta.limaml import MetaTrainer, user_vectors
from slatewise_train.new_model import build_model
from slatewise_train.rankers import families
from slatewise_train.rankers.base import EXITS, Calibration
from slatewise_train.rankers.late_fusion import key_of
from slatewise_train.rankers.ligr_onnx import LigrGraphs
from slatewise_train.train import Trainer, train
from tests.conftest import Tiny
from tests.support.application import serve
from tests.train.test_offline import make_data

FORCED = ExportOptions(force=True)  # a ranker that is trained for a moment beats no baseline
FEW = ExportOptions(most_users=2, force=True)


def test_bundle_files_are_those_of_the_manifest(tiny: Tiny) -> None:
    found = {str(path.relative_to(tiny.folder)): path for path in tiny.folder.rglob("*") if path.is_file()}
    digests = {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items() if name != "manifest.json"
    }
    assert digests == read_manifest(tiny.folder).files
    assert {f"variants/fp32/{graph}.onnx" for graph in ("encode", *EXITS, "rank")} == {
        name for name in digests if name.endswith(".onnx")
    }
    assert [path.name for path in tiny.folder.parent.iterdir()] == ["1"], "no staging folder is left"


@pytest.mark.parametrize("name", ["items.npy", "display.json", "variants/fp32/set.onnx", "variants/fp32/rank.onnx"])
def test_load_changed_file_is_refused(tiny: Tiny, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "1"
    shutil.copytree(tiny.folder, folder)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ManifestError, match="sha256"):
        load_bundle(folder)


def test_export_of_existing_version_is_refused(tiny: Tiny) -> None:
    before = (tiny.folder / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="exists"):
        export(tiny.trainer, tiny.learner, tiny.config, tiny.root, 1)
    assert (tiny.folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("measured", [1.0, 1.1e-5, float("nan")])
def test_export_above_bound_publishes_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: float
) -> None:
    monkeypatch.setattr(parity, "measure_parity", lambda *_: {"permutation": 0.0, "padding": measured})
    with pytest.raises(ValueError, match=r"above the bound.*padding"):
        export(tiny.trainer, tiny.learner, tiny.config, tmp_path, 1, FEW)
    assert not (tmp_path / "tiny" / "1").exists()
    with pytest.raises(ManifestError):
        load_rankers(tmp_path)


def test_export_publishes_optional_settings_above_bound(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """int8 history state is an option of the server, measured and in the manifest."""
    monkeypatch.setattr(bundle_writer, "measure_latency", lambda engines, _: {name: {} for name in engines})
    monkeypatch.setattr(parity, "measure_parity", lambda *_: {"padding": 0.0, "int8_history_state": 0.004})
    ranker = load_bundle(export(tiny.trainer, tiny.learner, tiny.config, tmp_path, 1, FEW))
    assert ranker.manifest.variants["fp32"].invariance == {"padding": 0.0, "int8_history_state": 0.004}
    assert "largest differences between scores, bound 1e-05: padding 0.0e+00\n" in capsys.readouterr().out


def test_staging_publishes_completely_or_not_at_all(tmp_path: Path) -> None:
    """A failed export leaves no version, and the next one removes its files first."""
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


def test_export_second_version_is_served(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny.root / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny" / ".staging-2").mkdir()  # of an export that was killed
    (tmp_path / "tiny" / ".staging-2" / "rubbish").touch()
    monkeypatch.setattr(bundle_writer, "measure_latency", lambda engines, _: {name: {} for name in engines})
    assert export(tiny.trainer, tiny.learner, tiny.config, tmp_path, 2, FEW) == tmp_path / "tiny" / "2"
    assert load_rankers(tmp_path)["tiny"].manifest.version == 2
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
    assert manifest.trained_on == tiny.config.tables.trained_on
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


def test_graphs_have_the_manifests_inputs_and_outputs(ranker: Ranker, tiny: Tiny) -> None:
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


def test_rank_graph_gives_the_golden_scores(ranker: Ranker, tiny: Tiny) -> None:
    """With the bundle's item table, calibrations and head weights, if the default exit is the highest."""
    request = RankRequest.model_validate(ranker.manifest.example)
    history = ranker.history(request)
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


def test_unknown_item_has_the_vector_of_training(ranker: Ranker, tiny: Tiny) -> None:
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
    assert unknown.positions.tolist() == [0, 1, 2]


def test_demo_users_have_requests_of_their_own(ranker: Ranker, tiny: Tiny) -> None:
    examples = json.loads((tiny.folder / "examples.json").read_text())
    assert examples == ranker.examples and examples[0] == ranker.manifest.example
    users = [body["user"] for body in examples]
    assert len(set(users)) == len(users) and 2 <= len(users) <= EXAMPLE_USERS
    assert set(users) <= ranker.embedded_users.keys()
    for body in examples:
        request = RankRequest.model_validate(body)
        assert len(request.candidates.item_ids) == EXAMPLE_CANDIDATES
        assert set(request.history.item_ids) <= ranker.vocabulary.items.keys()


@pytest.mark.parametrize(
    ("lengths", "least"), [([], 3), ([1], 3), ([5, 2, 9], 3), ([5, 7, 9], 5), ([*range(1, 31)], 19), ([90] * 12, 40)]
)
def test_least_events_follow_the_histories(lengths: list[int], least: int) -> None:
    assert least_events(np.array(lengths)) == least


def test_made_up_user_has_the_only_request(tiny: Tiny) -> None:
    data = tiny.trainer.data
    sequences = made_up_sequences(data, np.random.default_rng(0))
    shown = DemoData(sequences, sequences.users, np.zeros((0, 1), np.float32), {})
    example = example_request(shown, data, np.random.default_rng(0))
    assert example_requests(shown, data, example, np.random.default_rng(0)) == [example]


def test_example_is_valid_and_has_titles(ranker: Ranker, tiny: Tiny) -> None:
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
    assert first == 0, "so all events that are sent are read"
    history = ranker.history(request)
    candidates, unknown = ranker.candidates(request, request.request_time or 0.0)
    assert not len(unknown.positions)
    np.testing.assert_array_equal(candidates.context[0], request_context(request.request_time or 0.0))
    probabilities = ranker.engines["fp32"].score(
        history, candidates, ranker.embedded_meta[ranker.embedded_users[str(request.user)]], manifest.default_exit
    )
    golden = np.array(manifest.variants["fp32"].golden_scores)
    np.testing.assert_allclose(golden, probabilities[:, 0] * 1.0 + probabilities[:, 1] * 0.5, rtol=0, atol=FP32_BOUND)
    assert len(golden) == len(candidates) and np.ptp(golden) > 1e-4, "scores that are all alike would prove nothing"


def test_load_other_golden_score_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "1"
    shutil.copytree(tiny.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["variants"]["fp32"]["golden_scores"][3] += 1e-4
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="golden scores differ"):
        load_bundle(folder)


def test_manifest_quality_equals_the_report(ranker: Ranker, tiny: Tiny) -> None:
    report = json.loads((tiny.folder / "report.json").read_text())
    variant = ranker.manifest.variants["fp32"]
    assert set(variant.quality) == set(EXITS)
    for exit, row in variant.quality.items():
        assert row == {"leave_one_out": report["leave_one_out"][exit], "slates": report["slates"][exit]}
        assert row["leave_one_out"]["users"] == sum(np.diff(tiny.trainer.data.sequences.offsets) >= 2)
    assert report["bad_rows"] == tiny.trainer.data.bad_rows
    assert variant.latency_ms["machine"] and len(variant.latency_ms["rows"]) == 6
    assert (tiny.folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_warmup_has_smallest_and_largest_shapes(ranker: Ranker) -> None:
    shapes = [(len(r.history.item_ids), len(r.candidates.item_ids)) for r in ranker.warmup]
    assert shapes == [(0, 1), (1, 20), (128, CANDIDATE_CHUNK), (HISTORY_CHUNK, ranker.manifest.limits.set_wise)]


def test_calibrations_are_fitted_on_validation_users_only(ranker: Ranker, tiny: Tiny) -> None:
    data = tiny.trainer.data
    asked = []

    class Recorder:
        sessions = dict.fromkeys(("encode", *EXITS))
        items = ranker.items
        start = None

        def extend(self, state: None, history: Any) -> None:
            asked.append(history)

        def dot(self, candidates: Any, state: None) -> np.ndarray:
            return np.random.default_rng(len(asked)).uniform(0.2, 0.8, (len(candidates), 2))

        def point(self, candidates: Any, meta: np.ndarray, state: None) -> PointScores:
            probabilities = self.dot(candidates, state)
            return PointScores(probabilities, probabilities, probabilities)

        def set(self, point: PointScores) -> np.ndarray:
            return point.probabilities

    found = fit_calibrations(Recorder(), data, ranker.default_meta)  # type: ignore[arg-type]
    assert set(found) == set(EXITS) and all(len(column) == 2 for column in found.values())
    users = data.split.validation_users
    ends = {tuple(data.sequences.items[data.sequences.offsets[u] :][: data.split.train_lengths[u]][-5:]) for u in users}
    assert {tuple(history.items[-5:]) for history in asked} == ends
    assert len(asked) == len(users), "a history is encoded once for all exits and heads"
    assert len(found["point"][1].knots), "150 labels are enough"


def test_calibrations_without_validation_users_are_identities(ranker: Ranker, tiny: Tiny) -> None:
    data = tiny.trainer.data
    split = dataclasses.replace(data.split, validation_users=np.zeros(0, np.int64))
    found = fit_calibrations(ranker.engines["fp32"], dataclasses.replace(data, split=split), ranker.default_meta)
    x = np.linspace(-5, 5, 11)
    assert all((c(x) == x).all() for column in found.values() for c in column)


def test_calibrations_are_written_beside_their_graphs(tiny: Tiny) -> None:
    calibrations = read_calibrations(tiny.folder / "variants/fp32/calibration.json")
    assert list(calibrations) == list(EXITS)
    for exit, column in calibrations.items():
        graph = onnx.load(tiny.folder / f"variants/fp32/{exit}.onnx").graph
        weights = {weight.name: onnx.numpy_helper.to_array(weight) for weight in graph.initializer}
        for k, found in enumerate(column):
            name = f"calibration.{exit}.{k}"
            assert (found.slope, found.bias) == (weights[f"{name}.slope"], weights[f"{name}.bias"])
            if len(found.knots):
                np.testing.assert_array_equal(found.knots, weights[f"{name}.knots"])
                np.testing.assert_array_equal(found.bends, weights[f"{name}.bends"][:, 0])


def test_ranker_without_set_blocks_has_no_exit_set(tiny: Tiny) -> None:
    data = tiny.trainer.data
    model = build_model(data.catalogue, data.config, ModelConfig("ligr", tiny.config.model.shape | {"set_blocks": 0}))
    graphs = LigrGraphs(model, {exit: [Calibration.identity()] * 2 for exit in EXITS}, 10).all()
    assert set(graphs) == {"encode", "dot", "point"}


@pytest.fixture
def demo(tiny: Tiny, tmp_path: Path) -> Config:
    """A config with a demo of two users and some items, one of which the ranker does not know."""
    items = read_table(Path(tiny.config.tables.items)).head(400)
    events = read_table(Path(tiny.config.tables.events)).filter(
        pl.col("user_id").is_in(["1", "6"]) & pl.col("item_id").is_in(items["item_id"].to_list())
    )
    unknown = items.head(1).with_columns(item_id=pl.lit("999999"), title=pl.lit("Unknown Film"))
    pl.concat([items, unknown]).write_csv(tmp_path / "items.csv")
    pl.concat([events, events.head(1).with_columns(item_id=pl.lit("999999"))]).write_csv(tmp_path / "events.csv")
    demo = DemoConfig(str(tmp_path / "events.csv"), str(tmp_path / "items.csv"), "demo:")
    return dataclasses.replace(tiny.config, demo=demo)


def test_short_demo_users_have_requests_and_are_counted(
    tiny: Tiny, demo: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.demo is not None
    events = Path(demo.demo.events)
    table = read_table(events)
    short = [table.head(n).with_columns(user_id=pl.lit(f"short{n}")) for n in (2, 4, 6)]
    pl.concat(short).write_csv(events)
    data = tiny.trainer.data
    shown = demo_data(data, tiny.trainer.model, tiny.learner, demo)
    rng = np.random.default_rng(0)
    found = example_requests(shown, data, example_request(shown, data, rng), rng)
    assert {body["user"] for body in found} == {"demo:short4", "demo:short6"}
    line = "[demo] 2 of 3 users have a request in the bundle: of the 2 with at least 3 known events, and at most 12"
    assert line in capsys.readouterr().out


def test_demo_data_shows_only_the_demo_table(tiny: Tiny, demo: Config) -> None:
    shown = demo_data(tiny.trainer.data, tiny.trainer.model, tiny.learner, demo)
    listed = read_table(Path(demo.demo.items))
    assert set(shown.titles) == set(listed["item_id"].to_list()) - {"999999"}
    assert len(shown.titles) < len(tiny.trainer.data.catalogue.vocabulary.items)
    row = next(listed.iter_rows(named=True))
    assert shown.titles[row["item_id"]] == {
        "title": row["title"],
        "genres": row["genres"].split("|"),
        "decade": [row["decade"]],
    }
    assert shown.users and set(shown.users) == {"demo:" + user for user in shown.sequences.users}
    assert demo.demo is not None
    plain = dataclasses.replace(demo, demo=dataclasses.replace(demo.demo, items=None))
    found = demo_data(tiny.trainer.data, tiny.trainer.model, tiny.learner, plain)
    assert found.users == shown.users and found.titles.keys() > shown.titles.keys(), "titles of [data]"
    assert (
        shown.vectors.shape == (len(shown.users), tiny.trainer.model.config.meta_size)
        and shown.vectors.dtype == np.float32
    )


def test_demo_reads_its_tables_as_training_does(tiny: Tiny, demo: Config) -> None:
    """Rows that were only shown, other names of columns, and ids that a tool made floats."""
    plain = demo_data(tiny.trainer.data, tiny.trainer.model, tiny.learner, demo)
    events, items = Path(demo.demo.events), Path(demo.demo.items)
    taken = read_table(events)
    shown = taken.with_columns(action=pl.lit("impression"), item_id=pl.lit("1"))
    renamed = pl.concat([taken, shown]).with_columns(pl.col("item_id") + ".0").rename({"item_id": "film"})
    renamed.write_csv(events)
    listed = read_table(items).with_columns(pl.col("item_id") + ".0")
    extra = listed.head(1).with_columns(item_id=pl.lit("not a number"))
    pl.concat([listed, extra]).rename({"item_id": "film"}).write_csv(items)
    actions = tuple(taken["action"].unique())
    tables = dataclasses.replace(demo.tables, columns={"item_id": "film"}, history_actions=actions)
    found = demo_data(tiny.trainer.data, tiny.trainer.model, tiny.learner, dataclasses.replace(demo, tables=tables))
    assert found.titles == plain.titles and found.users == plain.users
    np.testing.assert_array_equal(found.sequences.items, plain.sequences.items)
    np.testing.assert_array_equal(found.vectors, plain.vectors)


def test_titles_of_every_type_become_text() -> None:
    """display.json has no dates, and the export comes after the training."""
    table = pl.DataFrame({"day": [date(2026, 1, 31), None], "number": [7, 8], "list": [["a"], []]})
    assert titles_of(table, "day").to_list() == ["2026-01-31", None]
    assert titles_of(table, "number").to_list() == ["7", "8"]
    assert titles_of(table, "list").to_list() == titles_of(table, "none").to_list() == [None, None]


def test_bundle_says_which_rows_make_history(tiny: Tiny, tmp_path: Path) -> None:
    tables = dataclasses.replace(tiny.config.tables, history_actions=("like", "label:like"))
    content = make_content(tiny.trainer, tiny.learner, dataclasses.replace(tiny.config, tables=tables))
    assert write_content(tmp_path, content, 1).history_actions == ["like", "label:like"]
    assert read_manifest(tiny.folder).history_actions == [], "the TOML states nothing"


def test_computing_demo_vectors_does_not_change_the_ranker(tiny: Tiny, demo: Config) -> None:
    model = tiny.trainer.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vectors = demo_data(tiny.trainer.data, tiny.trainer.model, tiny.learner, demo).vectors
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert np.isfinite(vectors).all()
    assert (np.abs(vectors - model.default_meta.detach().numpy()).max(axis=1) > 1e-4).all()


def test_user_with_only_unknown_items_has_default_vector(tiny: Tiny) -> None:
    s = tiny.trainer.data.sequences
    items = s.items.copy()
    items[: s.offsets[1]] = 0
    kinds = [head.kind for head in tiny.trainer.data.config.heads]
    vectors = user_vectors(tiny.learner, tiny.trainer.model, kinds, dataclasses.replace(s, items=items), 128)
    default = tiny.trainer.model.default_meta.detach().numpy()
    np.testing.assert_array_equal(vectors[0], default)
    assert (vectors[1:] != default).any(axis=1).all()


def test_demo_example_has_only_items_with_a_title(tiny: Tiny, demo: Config) -> None:
    shown = demo_data(tiny.trainer.data, tiny.trainer.model, tiny.learner, demo)
    request = make_request(shown, tiny.trainer.data, 0, np.random.default_rng(0))
    assert request["user"].startswith("demo:")
    assert set(request["history"]["item_ids"]) | set(request["candidates"]["item_ids"]) <= set(shown.titles)
    RankRequest.model_validate(request)


def shown_of(data: Data, history: list[str]) -> DemoData:
    """A demo user with a history of item ids."""
    rows = [("demo", item, 1e9 + 60 * k) for k, item in enumerate(history)]
    events, _ = clean_events(pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row"), 0.0)
    sequences = build_sequences(events, data.catalogue.vocabulary, DataConfig("shop", (Head("next", "next", 1.0),)))
    titles = {item: {"title": item} for item in data.catalogue.vocabulary.items}
    return DemoData(sequences, sequences.users, np.zeros((0, 4), np.float32), titles)


@pytest.mark.parametrize("history", [["a"], ["a", "b"], ["a", "b", "c"], ["unknown"]])
def test_example_of_a_user_with_few_events_is_valid(history: list[str]) -> None:
    data = make_data({"u": ["a", "b", "c"], "v": ["b", "c"]}, list("abcd"))
    example = example_request(shown_of(data, history), data, np.random.default_rng(0))
    request = RankRequest.model_validate(example)
    known = [item for item in history if item != "unknown"]
    assert request.history.item_ids == known[: len(known) - len(known) // 3]
    assert len(request.candidates.item_ids) == 24 and set(request.candidates.item_ids) <= set("abcd")
    assert request.request_time is not None and request.request_time > 0


def test_example_of_a_small_catalogue_has_only_its_items() -> None:
    """The unknown item and the start token have rows below the catalogue's, and no id."""
    data = make_data({"u": ["a", "b"]}, ["a", "b", "c"])
    nothing = np.zeros(0, np.int64)
    drawn = draw_slate(shown_of(data, ["a", "b"]), data, np.array([2, 3]), nothing, np.random.default_rng(0))
    assert set(drawn.tolist()) == {4}


def test_export_of_users_with_two_events_has_an_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_writer, "measure_latency", lambda engines, _: {name: {} for name in engines})
    monkeypatch.setattr(parity, "measure_parity", lambda *_: {"padding": 0.0})
    trainer, whole = train_shop(tmp_path, DataConfig("shop", (NEXT,), slate_size=1), items=2, users=6, length=2)
    manifest = read_manifest(export(trainer, None, whole, tmp_path / "bundles", 1, FORCED))
    assert 1 <= len(manifest.example["history"]["item_ids"]) <= 2


SHOP = {"width": 8, "blocks": 1, "attention_heads": 1, "set_blocks": 1, "meta_size": 4}


def train_shop(
    folder: Path, config: DataConfig, items: int, users: int = 12, length: int = 14
) -> tuple[Trainer, Config]:
    """A ranker trained for a moment on CSV files of a shop, and its config."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{u}", f"i{rng.integers(items)}", 1e9 + 100 * k, int(rng.integers(2)))
        for u in range(users)
        for k in range(length)
    ]
    pl.DataFrame(rows, ["user_id", "item_id", "timestamp", "label_buy"], orient="row").write_csv(folder / "events.csv")
    columns: dict[str, list[Any]] = {name: [f"v{k % 3}" for k in range(items)] for name in config.categorical}
    columns |= {"item_id": [f"i{k}" for k in range(items)], "price": [k + 0.5 for k in range(items)]}
    pl.DataFrame(columns).write_csv(folder / "items.csv")
    tables = TablesConfig(str(folder / "events.csv"), str(folder / "items.csv"), history_actions=("*",))
    short = TrainConfig(epochs=2, cascade_epochs=1, batch_events=256, negatives=16, warmup_steps=1)
    trainer = train(load_data(config, tables), ModelConfig("ligr", SHOP), short, folder / "train")
    return trainer, Config(config, tables)


def bring_your_own(folder: Path, config: DataConfig, items: int) -> Ranker:
    """The ranker of `train_shop` with a meta block, exported and loaded."""
    trainer, whole = train_shop(folder, config, items)
    learner = MetaTrainer(trainer.model, trainer.data, MetaConfig(shortest=2, query=3, support=5, epochs=1)).train(
        folder / "train"
    )
    return load_bundle(export(trainer, learner, whole, folder, 1, FORCED))


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
def test_export_of_own_data_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: DataConfig) -> None:
    monkeypatch.setattr(bundle_writer, "measure_latency", lambda engines, _: {name: {} for name in engines})
    monkeypatch.setattr(parity, "SLATES", (1, 5))
    ranker = bring_your_own(tmp_path, config, items=90)
    assert list(ranker.manifest.heads) == [head.name for head in config.heads]
    assert ranker.manifest.features == list(config.numeric)
    assert set(ranker.engines) == {"fp32"}


def test_export_of_small_catalogue_repeats_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_writer, "measure_latency", lambda engines, _: {name: {} for name in engines})
    monkeypatch.setattr(parity, "SLATES", (1, 5))
    ranker = bring_your_own(tmp_path, DataConfig("shop", (NEXT, BUY), **HELD_OUT), items=12)
    assert len(ranker.manifest.example["candidates"]["item_ids"]) >= 20, "duplicates are allowed"


def test_export_without_meta_block_serves_with_status_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No user has the events that a meta block needs, so there is none to export."""
    monkeypatch.setattr(bundle_writer, "measure_latency", lambda engines, _: {name: {} for name in engines})
    monkeypatch.setattr(parity, "SLATES", (1, 5))
    config = DataConfig("shop", (NEXT, BUY), slate_size=2, slate_users=3, validation_users=3, history_length=80)
    trainer, whole = train_shop(tmp_path, config, items=90, length=8)
    with pytest.raises(ValueError, match="no user has 15 training events"):
        MetaTrainer(trainer.model, trainer.data, MetaConfig())
    folder = export(trainer, None, whole, tmp_path / "bundles", 1, FORCED)
    manifest = read_manifest(folder)
    assert manifest.meta_size == 0 and manifest.model is not None and manifest.model.config["meta_size"] == 0
    assert not {"default_meta.npy", "meta_embeddings.npy", "users.json", "meta_block.npz"} & manifest.files.keys()
    with serve(Settings(bundles=tmp_path / "bundles")) as client:
        answer = client.post("/score", json=manifest.example).json()
    assert answer["meta_embedding"]["status"] == "off"
    sums = np.array(answer["results"]["scores"]) * sum(manifest.heads.values())
    np.testing.assert_allclose(sums, manifest.variants["fp32"].golden_scores, atol=2 * FP32_BOUND)


def test_categorical_columns_may_have_any_name(tmp_path: Path) -> None:
    """torch refuses names with a dot, and those of its own attributes."""
    names = ("type", "brand.name", "brand%2Ename", "%type", "keys", "weight", "ünïcode", "a b", "training")
    config = DataConfig("shop", (NEXT, BUY), categorical=names, slate_size=2, slate_users=3, validation_users=3)
    trainer, whole = train_shop(tmp_path, config, items=90)
    ranker = load_bundle(export(trainer, None, whole, tmp_path / "bundles", 1, FORCED))
    assert set(ranker.manifest.fields) == set(names)
    assert len(set(map(key_of, names))) == len(names) and key_of("a b") == "a b" and key_of("ünïcode") == "ünïcode"
    again = Trainer(trainer.data, ModelConfig("ligr", SHOP), trainer.config)
    again.load(tmp_path / "train" / "checkpoint.pt")
    assert torch.equal(again.model.field_table("brand.name"), trainer.model.field_table("brand.name"))
    student = families.shrink(trainer.model, {"feed_forward": 2})
    assert torch.equal(student.field_table("type"), trainer.model.field_table("type"))


def test_without_meta_gives_the_scores_of_the_default_vector(tiny: Tiny, ranker: Ranker) -> None:
    model = tiny.trainer.model.eval()
    draw = parity.Requests(ranker.engines["fp32"], ranker.manifest, 3)
    history = draw.history(40)
    candidates = draw.candidates(20)
    default = model.default_meta.detach().numpy()
    expected = parity.torch_logits(model, ranker.items, history, candidates, default)
    found = parity.torch_logits(model.without_meta(), ranker.items, history, candidates, default[:0])
    for exit, logits in expected.items():
        np.testing.assert_allclose(found[exit], logits, atol=1e-5)


def test_load_block_without_file_explains_and_returns_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_block(tmp_path, Path("my.toml")) is None
    assert "`slatewise limaml my.toml` makes it" in capsys.readouterr().err
