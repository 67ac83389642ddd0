"""A bundle's next version: variants that are what their names say, held to their bounds and to the gate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from app.bundle import Ranker, load_bundle
from app.manifest import read_manifest
from app.settings import Settings
from models import compress as compressing
from models.compress import GATE, RECIPES, Draft, Source, agreement, as_markdown, compress, within_gate
from models.evaluate import Outcome
from models.train import TrainConfig
from tests.conftest import Tiny, serve

NAMES = ["fp32", "int8", "lowrank", "lowrank-int8"]


@pytest.fixture(scope="module")
def small() -> pytest.MonkeyPatch:
    """The tiny ranker's layers are small, and so may be what is measured on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.quantize.SMALLEST", 3)
        patch.setattr("models.invariance.SLATES", (1, 5))
        patch.setattr(compressing, "SAMPLES", 12)
        patch.setattr(compressing, "measure_latency", lambda *_: {"rows": [{"history": 200, "candidates": 200, "encode_p50": 1.0, "score_p50": 2.0}]})
        yield patch


@pytest.fixture(scope="module")
def source(tiny: Tiny, small: pytest.MonkeyPatch) -> Source:
    return Source(tiny.folder, tiny.trainer.data, TrainConfig(**tiny.toml["train"]), most_users=20)


@pytest.fixture(scope="module")
def folder(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(source, tmp_path_factory.mktemp("compressed"), RECIPES, force=True)


def test_every_variant_is_published_served_and_measured(folder: Path, source: Source) -> None:
    ranker = load_bundle(folder, 1)
    assert list(ranker.engines) == NAMES and not ranker.refused
    assert ranker.manifest.version == 2 and ranker.manifest.space == source.manifest.space, "vectors stay what they were"
    for name, variant in ranker.manifest.variants.items():
        assert variant.bytes == sum(path.stat().st_size for path in (folder / "variants" / name).glob("*.onnx") if path.stem != "rank")
        assert max(value for what, value in variant.invariance.items() if what != "int8_history_state") <= variant.bound <= 2e-3
        assert variant.quality.keys() == {"dot", "point", "set"} and (variant.resident_bytes or 0) > 0
        if name != "fp32":
            assert -1 <= variant.agreement["kendall_tau"] <= 1 and set(variant.difference) == {"leave_one_out_ndcg10", "slate_ndcg10", "slate_auc"}
    assert ranker.manifest.variants["int8"].agreement["kendall_tau"] > 0.95 < ranker.manifest.variants["int8"].agreement["top10_overlap"] + 0.1


def test_the_source_is_left_as_it_was_and_nothing_staged_remains(folder: Path, tiny: Tiny) -> None:
    assert read_manifest(tiny.folder).variants.keys() == {"fp32"}
    assert [path.name for path in folder.parent.iterdir()] == ["2"] and not (folder / "draft").exists()
    for graph in (tiny.folder / "variants/fp32").glob("*.onnx"):
        assert (folder / "variants/fp32" / graph.name).read_bytes() == graph.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_variants_graphs_are_what_its_name_says(folder: Path, name: str) -> None:
    for graph in ("encode", "point", "set"):
        found = onnx.load(folder / "variants" / name / f"{graph}.onnx").graph
        kinds, weights = {node.op_type for node in found.node}, {weight.name for weight in found.initializer}
        assert ("MatMulIntegerToFloat" in kinds) == ("int8" in name)
        assert any(".first." in weight for weight in weights) == ("lowrank" in name)


def test_low_rank_keeps_its_budget(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())["variants"]
    assert report.keys() == set(NAMES) and all(row["published"] for row in report.values())
    assert report["lowrank"]["ranks"] == report["lowrank-int8"]["ranks"] and any(report["lowrank"]["ranks"].values())

    def dense(name: str) -> int:
        sizes: dict[str, int] = {}
        for graph in ("encode", "point", "set"):
            for weight in onnx.load(folder / "variants" / name / f"{graph}.onnx").graph.initializer:
                if "blocks." in weight.name and len(weight.dims) == 2:
                    sizes[weight.name] = int(np.prod(weight.dims))
        return sum(sizes.values())

    assert dense("lowrank") <= RECIPES["lowrank"].share * dense("fp32")


def test_the_report_has_a_table_and_a_picture(folder: Path) -> None:
    table = (folder / "variants.md").read_text()
    assert all(f"| {name} |" in table for name in NAMES) and (folder / "variants.png").stat().st_size > 1_000
    manifest = read_manifest(folder)
    assert table.strip() == as_markdown(manifest.variants, manifest.default_exit)
    assert {"variants.md", "variants.png"} <= manifest.files.keys()


def test_a_request_may_name_a_variant_and_none_shares_anothers_history(folder: Path) -> None:
    with serve(Settings(bundles=folder.parent.parent)) as client:
        card = client.get("/models/tiny").json()
        assert list(card["variants"]) == NAMES and card["default_variant"] in NAMES
        example = card["example"]
        answers = {name: client.post("/score", json=example | {"variant": name}).json() for name in NAMES}
        assert all(answer["variant"] == name and answer["history"]["cache"] == "miss" for name, answer in answers.items())
        assert len({tuple(answer["results"]["scores"]) for answer in answers.values()}) == len(NAMES)
        again = {name: client.post("/score", json=example | {"variant": name}).json() for name in NAMES}
        assert all(answer["history"]["cache"] == "hit" for answer in again.values())
        for name in NAMES:
            np.testing.assert_allclose(again[name]["results"]["scores"], answers[name]["results"]["scores"], atol=1e-5)
        assert client.post("/score", json=example | {"variant": "auto"}).json()["variant"] == card["default_variant"]


def gained(ranks: list[int]) -> Outcome:
    return Outcome({"set": np.array(ranks)}, {}, None)


def test_the_gate_is_ninety_nine_hundredths_of_fp32(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "outcome", gained([0] * 100))
    assert within_gate(source, gained([0] * 99 + [50])) and not within_gate(source, gained([0] * 98 + [50, 50]))
    assert GATE == 0.99 and within_gate(source, None)


def test_what_is_below_the_gate_or_above_its_bound_is_not_published(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compressing, "within_gate", lambda *_: False)
    folder = compress(source, tmp_path, {"int8": RECIPES["int8"]})
    assert list(load_bundle(folder, 1).engines) == ["fp32"] and not (folder / "variants/int8").exists()
    assert "int8 keeps less than" in capsys.readouterr().out
    assert json.loads((folder / "report.json").read_text())["variants"]["int8"]["published"] is False, "the report says what was tried"
    monkeypatch.setattr("models.invariance.measure", lambda *_: {"padding": 1.0, "onnx_against_torch": 0.0})
    with pytest.raises(ValueError, match="int8 is above its bound"):
        compress(source, tmp_path, {"int8": RECIPES["int8"]})
    assert [path.name for path in (tmp_path / "tiny").iterdir() if not path.name.startswith(".")] == [folder.name]


def test_without_data_the_calibration_is_fp32s(tiny: Tiny, small: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = Source(tiny.folder, None)
    made: Draft = compressing.draft(source, RECIPES["lowrank-int8"], tmp_path)
    assert made.calibrations is source.calibrations and source.outcome is None
    assert agreement(source, source.exact) == {"kendall_tau": 1.0, "top10_overlap": 1.0, "largest_score_difference": 0.0}


def test_other_data_than_the_bundles_is_refused(tiny: Tiny, ranker: Ranker, tmp_path: Path) -> None:
    folder = tmp_path / "1"
    shutil.copytree(tiny.folder, folder)
    np.save(folder / "items.npy", ranker.items[:-1])
    with pytest.raises(ValueError, match="other data"):
        Source(folder, tiny.trainer.data)
