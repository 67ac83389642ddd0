"""Compression: variants are of the kind of their names, within their bounds, and pass the quality gate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import torch

from slatewise.bundle.loader import load_bundle
from slatewise.bundle.manifest import Variant, read_manifest
from slatewise.settings import Settings
from slatewise_train.compress import compress, read_shape, variant_names
from slatewise_train.compression import variants as making
from slatewise_train.compression.bases import Options, make_bases
from slatewise_train.compression.distill import DistillConfig
from slatewise_train.compression.source import Source
from slatewise_train.compression.variants import GATE, Recipe, agreement, dominated, draft, round_bound, within_gate
from slatewise_train.evaluation.latency import STATUS
from slatewise_train.evaluation.offline import Outcome
from slatewise_train.evaluation.report import variants_table
from slatewise_train.graph_check import table_of
from slatewise_train.rankers import families
from tests.conftest import Tiny
from tests.support.application import serve
from tests.train.small_source import TIMES, small_source

NAMES = variant_names(Options.shares)
ALL = ["fp32", *NAMES]


@pytest.fixture(scope="module")
def source(tiny: Tiny) -> Iterator[Source]:
    with small_source(tiny, integer_side=3) as found:
        yield found


@pytest.fixture(scope="module")
def folder(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("compressed")
    learning = DistillConfig(epochs=1, batch_events=1024, positions=64, items=128, windows=4, warmup_steps=2)
    return compress(source, base / "bundles", NAMES, Options(distill=learning, checkpoints=base / "checkpoints"), NAMES)


def test_compress_measures_variants_that_the_server_loads(folder: Path, source: Source) -> None:
    ranker = load_bundle(folder)
    assert list(ranker.engines) == ALL and not ranker.refused
    assert ranker.manifest.version == 2 and ranker.manifest.space == source.manifest.space, "users' vectors stay valid"
    for name, variant in ranker.manifest.variants.items():
        graphs = [path for path in (folder / "variants" / name).glob("*.onnx") if path.stem != "rank"]
        assert variant.items == table_of(name.split("-"))
        assert variant.bytes == sum(path.stat().st_size for path in (folder / variant.items, *graphs))
        worst = max(value for what, value in variant.invariance.items() if what != "int8_history_state")
        assert worst <= variant.bound / 2 and 1e-5 <= variant.bound <= (variant.golden_bound or 1e-5) <= 2e-3
        assert variant.quality.keys() == {"dot", "point", "set"} and variant.latency_ms == TIMES
        assert (variant.resident_bytes or 0) > 0 if STATUS.exists() else variant.resident_bytes is None
        if name != "fp32":
            assert -1 <= variant.agreement["kendall_tau"] <= 1 and variant.within_gate is not None
            assert set(variant.difference) == {
                "leave_one_out_hr10",
                "leave_one_out_ndcg10",
                "slate_ndcg10",
                "slate_auc",
            }
    assert (
        ranker.manifest.variants["int8"].agreement["kendall_tau"]
        > 0.95
        < ranker.manifest.variants["int8"].agreement["top10_overlap"] + 0.1
    )
    assert ranker.manifest.variants["student"].bytes < ranker.manifest.variants["fp32"].bytes


def test_compress_leaves_the_source_and_no_staging_folder(folder: Path, tiny: Tiny) -> None:
    assert read_manifest(tiny.folder).variants.keys() == {"fp32"}
    assert [path.name for path in folder.parent.iterdir()] == ["2"] and not (folder / "draft").exists()
    for graph in (tiny.folder / "variants/fp32").glob("*.onnx"):
        assert (folder / "variants/fp32" / graph.name).read_bytes() == graph.read_bytes()


def test_compress_writes_a_checkpoint_for_each_training(folder: Path) -> None:
    ranks = ["lowrank,afm,0.5,size.json", "lowrank,afm,0.5,size.pt"]
    names = [*ranks, "student,blocks=1,feed_forward=2,key_size=4.pt", "tables4.pt"]
    assert sorted(path.name for path in (folder.parents[2] / "checkpoints/tiny/1").iterdir() if path.is_file()) == names


def test_resumed_compress_measures_only_missing_variants(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(checkpoints=tmp_path / "checkpoints")
    calls = list[str]()
    original = making.measure_variant

    def measured(source: Source, stage: Path, name: str, *rest: Any) -> Variant:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(name)
        return original(source, stage, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(making, "measure_variant", measured)
        with pytest.raises(KeyboardInterrupt):
            compress(source, tmp_path / "bundles", ["int8", "int8-tables8"], options, NAMES)
        calls.clear()
        calls.append("nothing yet")
        patch.setattr(making, "measure_variant", lambda *given: calls.append(given[2]) or original(*given))
        folder = compress(source, tmp_path / "bundles", ["int8", "int8-tables8"], options, NAMES)
    assert calls == ["nothing yet", "int8-tables8"]
    again = compress(
        source, tmp_path / "again", ["int8", "int8-tables8"], Options(checkpoints=tmp_path / "other"), NAMES
    )
    for name in ("int8", "int8-tables8"):
        for graph in (again / "variants" / name).iterdir():
            assert (folder / "variants" / name / graph.name).read_bytes() == graph.read_bytes()
    assert not [path for path in (tmp_path / "bundles/tiny").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ALL)
def test_variant_graphs_match_the_name_of_the_variant(folder: Path, name: str) -> None:
    for graph in ("encode", "point", "set"):
        found = onnx.load(folder / "variants" / name / f"{graph}.onnx").graph
        kinds = {node.op_type for node in found.node}
        weights = {weight.name for weight in found.initializer}
        assert ("MatMulIntegerToFloat" in kinds) == ("int8" in name)
        assert any(".first." in weight for weight in weights) == ("lowrank" in name)
        if graph != "set":
            assert any(weight.startswith("blocks.1.") for weight in weights) == ("student" not in name), (
                "a student has half the blocks"
            )


def test_low_rank_variant_stays_within_its_budget(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["variants"].keys() == set(ALL) and all(row["published"] for row in report["variants"].values())
    assert report["ranks"].keys() == {"lowrank"} and any(report["ranks"]["lowrank"].values())

    def dense(name: str) -> int:
        sizes: dict[str, int] = {}
        for graph in ("encode", "point", "set"):
            for weight in onnx.load(folder / "variants" / name / f"{graph}.onnx").graph.initializer:
                if "blocks." in weight.name and len(weight.dims) == 2:
                    sizes[weight.name] = int(np.prod(weight.dims))
        return sum(sizes.values())

    assert dense("lowrank") <= Options().shares[0] * dense("fp32")


def test_compress_writes_table_and_plot(folder: Path) -> None:
    table = (folder / "variants.md").read_text()
    manifest = read_manifest(folder)
    assert all(f"| {name} |" in table for name in ALL) and (folder / "variants.png").stat().st_size > 1_000
    rows = json.loads((folder / "report.json").read_text())["variants"]
    reasons = {name: row["reason"] for name, row in rows.items() if row["reason"]}
    assert table.strip() == variants_table(manifest.variants, manifest.default_exit, reasons, reasons)
    assert {"variants.md", "variants.png", "items8.npy", "items4.npy"} <= manifest.files.keys()


def test_named_variants_do_not_share_cached_histories(folder: Path) -> None:
    with serve(Settings(bundles=folder.parent.parent)) as client:
        card = client.get("/models/tiny").json()
        assert list(card["variants"]) == ALL and card["default_variant"] in ALL
        example = card["example"]
        answers = {name: client.post("/score", json=example | {"variant": name}).json() for name in ALL}
        assert all(
            answer["variant"] == name and answer["history"]["cache"] == "miss" for name, answer in answers.items()
        )
        assert len({tuple(answer["results"]["scores"]) for answer in answers.values()}) == len(ALL)
        again = {name: client.post("/score", json=example | {"variant": name}).json() for name in ALL}
        assert all(answer["history"]["cache"] == "hit" for answer in again.values())
        for name in ALL:
            np.testing.assert_allclose(again[name]["results"]["scores"], answers[name]["results"]["scores"], atol=1e-5)
        assert client.post("/score", json=example | {"variant": "auto"}).json()["variant"] == card["default_variant"]


def scores_of(client: httpx.Client, body: dict[str, Any]) -> np.ndarray:
    answer = client.post("/score", json=body)
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["results"]["scores"])


def picked(body: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Return the body with the candidates at these positions, in this order."""
    candidates = body["candidates"]
    features = {name: [column[k] for k in rows] for name, column in candidates["features"].items()}
    return body | {"candidates": {"item_ids": [candidates["item_ids"][k] for k in rows], "features": features}}


def until(body: dict[str, Any], events: int) -> dict[str, Any]:
    """The body with only the first events of its history."""
    return body | {"history": {name: column[:events] for name, column in body["history"].items()}}


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[httpx.Client]:
    with serve(Settings(bundles=folder.parent.parent)) as client:
        yield client


@pytest.mark.parametrize("name", ["int8", "student-int8-tables8", "int8-tables4"])
def test_variant_scores_over_http_are_within_its_bound(served: httpx.Client, name: str) -> None:
    """Permuted, one by one, extended and concurrent requests score within the bound and order alike."""
    card = served.get("/models/tiny").json()
    bound = card["variants"][name]["bound"]
    body = card["example"] | {"variant": name}
    alone = body | {"user": None}
    scores = scores_of(served, alone | {"user": None})
    n = len(body["candidates"]["item_ids"])
    mine = scores_of(served, body)
    assert bound <= 2e-3
    order = np.random.default_rng(0).permutation(n)
    same = {"permuted": (scores_of(served, picked(alone, order.tolist())), scores[order])}
    point = scores_of(served, alone | {"exit": "point"})
    same["one by one"] = (
        np.concatenate([scores_of(served, picked(alone, [k]) | {"exit": "point"}) for k in range(n)]),
        point,
    )
    events = len(body["history"]["item_ids"])
    for first in (1, events // 2, events - 1):
        served.post("/score", json=until(body, first) | {"user": f"grown-{name}-{first}"})
        grown, fresh = (scores_of(served, body | {"user": f"{kind}-{name}-{first}"}) for kind in ("grown", "fresh"))
        same[f"extended from {first}"] = (grown, fresh)
    with ThreadPoolExecutor(8) as pool:
        others = [
            pool.submit(scores_of, served, until(picked(alone, list(range(1 + k % n))), 1 + k % events))
            for k in range(24)
        ]
        same["concurrent"] = (pool.submit(scores_of, served, body).result(), mine)
        assert all(len(other.result()) for other in others)
    for what, (found, wanted) in same.items():
        assert np.abs(found - wanted).max() <= bound, what
        first, second = (np.sign(values[:, None] - values) for values in (found, wanted))
        assert (first * second).sum() / np.abs(second).sum() >= 0.999, f"Kendall's tau, {what}"


@pytest.mark.parametrize("chosen", ["int8", "fp32,student-int8", "lowrank, int8-tables8"])
def test_server_loads_only_the_chosen_variants(folder: Path, chosen: str) -> None:
    names = {name.strip() for name in chosen.split(",")}
    with serve(Settings(bundles=folder.parent.parent, variants=chosen)) as client:
        card = client.get("/models/tiny").json()
        assert set(card["variants"]) == names and card["default_variant"] in names
        assert client.post("/score", json=card["example"]).json()["variant"] == card["default_variant"]
        assert client.post("/score", json=card["example"] | {"variant": "int8-nothing"}).status_code == 404
        for name in set(ALL) - names:
            assert client.post("/score", json=card["example"] | {"variant": name}).status_code == 404


def gained(ranks: list[int]) -> Outcome:
    return Outcome({"set": np.array(ranks)}, {}, None)


@pytest.mark.parametrize(
    ("worst", "bound"),
    [(0.0, 1e-5), (4e-6, 1e-5), (1.8e-5, 5e-5), (2.4e-5, 5e-5), (2.6e-5, 1e-4), (4e-4, 1e-3), (1e-3, 2e-3)],
)
def test_bound_is_twice_the_largest_difference_rounded_up(worst: float, bound: float) -> None:
    assert round_bound({"padding": worst, "permutation": worst / 3, "int8_history_state": 0.5}) == bound


def test_gate_requires_99_percent_of_the_ndcg_of_fp32() -> None:
    exact = gained([0] * 100)
    assert within_gate("set", gained([0] * 99 + [50]), exact) and not within_gate(
        "set", gained([0] * 98 + [50, 50]), exact
    )
    assert GATE == 0.99 and within_gate("dot", gained([50]), exact), "an exit without measurements passes"


def test_variant_below_gate_or_above_bound_is_not_published(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "within_gate", lambda *_: False)
    folder = compress(source, tmp_path, ["int8-tables8"], Options(checkpoints=tmp_path / "first"))
    assert (
        list(load_bundle(folder).engines) == ["fp32"]
        and not (folder / "variants/int8-tables8").exists()
        and not (folder / "items8.npy").exists()
    )
    row = json.loads((folder / "report.json").read_text())["variants"]["int8-tables8"]
    assert row["published"] is False and "99%" in row["reason"], "the report lists the variant that was tried"
    assert "no: keeps less than 99%" in (folder / "variants.md").read_text()
    forced = read_manifest(compress(source, tmp_path, ["int8"], Options(checkpoints=tmp_path / "second"), ["int8"]))
    assert forced.variants["int8"].within_gate is False and forced.default_variant == "fp32", (
        "published because forced, and marked as below the gate"
    )
    found = iter([0.0, 1.0])  # of fp32, then of int8
    monkeypatch.setattr(
        "slatewise_train.evaluation.parity.measure_parity",
        lambda *_: {"padding": next(found), "onnx_against_torch": 0.0},
    )
    with pytest.raises(ValueError, match="int8 is above half of its bound"):
        compress(source, tmp_path, ["int8"], Options(checkpoints=tmp_path / "third"))
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir() if not path.name.startswith(".")) == ["2", "3"]


def variant(ms: float, size: int, ndcg: float, gate: bool | None = True) -> Variant:
    rows = {"rows": [{"history": 200, "candidates": 200, "encode_p50": ms / 2, "score_p50": ms / 2}]}
    quality = {"set": {"slates": {"ndcg10": [ndcg, ndcg, ndcg]}}}
    return Variant(
        bytes=size, bound=1e-5, invariance={}, quality=quality, latency_ms=rows, within_gate=gate, golden_scores=[]
    )


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (variant(2, 100, 0.5), "student-int8"),
        (variant(2.05, 104, 0.5), "student-int8"),  # of about the same cost
        (variant(2.2, 100, 0.5), None),
        (variant(2, 110, 0.5), None),
        (variant(2, 100, 0.49), None),
    ],
)
def test_low_rank_is_dominated_by_a_student_of_similar_cost(other: Variant, found: str | None) -> None:
    variants = {"fp32": variant(4, 400, 0.6), "lowrank-int8": variant(2, 100, 0.5), "student-int8": other}
    assert dominated("lowrank-int8", variants, "set") == found


def test_variant_on_the_pareto_front_is_not_dominated() -> None:
    variants = {
        "fp32": variant(4, 400, 0.6),
        "int8": variant(3, 200, 0.59),
        "int8-tables8": variant(3.1, 150, 0.59),
        "student": variant(3.2, 300, 0.58),
    }
    assert [dominated(name, variants, "set") for name in variants] == [None, None, None, "int8"]
    unknown = {name: row.model_copy(update={"quality": {}}) for name, row in variants.items()}
    assert not any(dominated(name, unknown, "set") for name in unknown), "without quality no variant dominates"


@pytest.mark.usefixtures("source")  # for its small limits
def test_variant_without_data_has_the_calibrations_of_fp32(tiny: Tiny, tmp_path: Path) -> None:
    source = Source(tiny.folder, None)
    base = make_bases(source, ["lowrank"], Options(distill=DistillConfig(), checkpoints=tmp_path))["lowrank"]
    graphs, calibrations = draft(source, Recipe.named("lowrank-int8"), base, source.items, tmp_path / "draft")
    assert (
        calibrations is source.calibrations
        and source.outcome is None
        and set(graphs) == {"encode", "dot", "point", "set"}
    )
    assert not list(tmp_path.rglob("*.pt"))
    assert agreement(source, source.fp32) == {
        "kendall_tau": 1.0,
        "top10_overlap": 1.0,
        "largest_score_difference": 0.0,
    }


def test_low_rank_meets_a_time_budget_and_stores_its_ranks(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def microseconds(weights: list[torch.Tensor], rows: int) -> float:
        return 10.0 + sum(weight.numel() for weight in weights)

    monkeypatch.setattr("slatewise_train.compression.low_rank.microseconds", microseconds)
    options = Options(budget="time", shares=(0.7,), checkpoints=tmp_path)
    ranks = make_bases(source, ["lowrank"], options)["lowrank"].ranks
    layers = {name: layer.weight for name, layer in families.dense_layers(source.model).items()}
    cost = {
        name: 10.0 + (weight.numel() if ranks[name] is None else ranks[name] * sum(weight.shape))
        for name, weight in layers.items()
    }
    assert any(ranks.values()) and sum(cost.values()) <= 0.7 * sum(10.0 + weight.numel() for weight in layers.values())
    monkeypatch.setattr("slatewise_train.compression.low_rank.microseconds", lambda weights, rows: 1.0)
    assert make_bases(source, ["lowrank"], options)["lowrank"].ranks == ranks, (
        "a stopped compression resumes with its ranks"
    )


def test_low_rank_that_saves_nothing_is_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would save nothing"):
        make_bases(source, ["lowrank"], Options(shares=(1.0,), checkpoints=tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "fp32",
        "int4",
        "int8-lowrank",
        "lowrank-student",
        "int8-int8",
        "fp32-int8",
        "tables8-int8",
        "student-",
        "lowrank-tables4",
        "student-int8-tables4",
        "tables8-tables4",
    ],
)
def test_invalid_name_of_a_variant_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no variant|fp32 is not made"):
        Recipe.named(name)


def test_name_of_a_variant_states_its_kind() -> None:
    names = ("int8", "lowrank-int8-tables8", "lowrank-25-int8", "student", "tables8", "int8-tables4")
    assert [Recipe.named(name) for name in names] == [
        Recipe("fp32", True, "items.npy"),
        Recipe("lowrank", True, "items8.npy"),
        Recipe("lowrank-25", True, "items.npy"),
        Recipe("student", False, "items.npy"),
        Recipe("fp32", False, "items8.npy"),
        Recipe("tables4", True, "items4.npy"),
    ]


def test_read_shape_parses_sizes() -> None:
    assert read_shape("blocks=1,key_size=16") == {"blocks": 1, "key_size": 16} and read_shape("") == {}
    with pytest.raises(ValueError, match="is no shape"):
        read_shape("blocks:1")


def test_compress_publishes_nothing_if_a_name_is_wrong(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "quantize", lambda graph, *_: graph)
    with pytest.raises(ValueError, match="named int8, and"):
        compress(source, tmp_path, ["int8"], Options(checkpoints=tmp_path / "checkpoints"), ["int8"])
    assert not (tmp_path / "tiny/2").exists()
