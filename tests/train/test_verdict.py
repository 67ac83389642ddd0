"""The verdict: better, unclear or worse than the best baseline, and the signs of an unsuccessful training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from slatewise.bundle.manifest import parse_manifest, read_manifest
from slatewise.inference.engine import EngineError
from slatewise.model_schemas import Verdict
from slatewise.settings import Settings
from slatewise_train import bundle_writer
from slatewise_train.config import Config, DataConfig, DemoConfig, Head, TablesConfig, TrainConfig
from slatewise_train.evaluation import parity
from slatewise_train.evaluation.offline import Outcome, tabulate
from slatewise_train.evaluation.report import plot_quality, quality_table, report_text
from slatewise_train.evaluation.verdict import compare, compare_tables, judge, training_warnings
from slatewise_train.export import ExportOptions, export
from tests.conftest import DEMO, Tiny
from tests.support.application import serve

RNG = np.random.default_rng(0)


def outcome_of(ranker: list[int], knn: list[int], **slates: list[tuple[np.ndarray, np.ndarray]]) -> Outcome:
    """Ranks of the exit `point`, of item-kNN, and of a popularity that never hits."""
    ranks = {"point": np.array(ranker), "popularity": np.full(len(ranker), 99), "item-kNN": np.array(knn)}
    return Outcome(ranks, slates, "like" if slates else None, users=1_000)


@pytest.mark.parametrize(
    ("ranker", "knn", "grade", "beats", "line"),
    [
        ([0] * 50, [3] * 25 + [99] * 25, "better", True, "Beats its baselines: NDCG@10 1.0000 (exit point)"),
        ([99] * 50, [3] * 25 + [99] * 25, "worse", False, "DOES NOT BEAT its baselines: NDCG@10 0.0000"),
        ([0, 99] * 25, [99, 0] * 25, "unclear", False, "NOT CLEARLY BETTER than its baselines"),
        ([5] * 50, [5] * 50, "unclear", False, "NOT CLEARLY BETTER than its baselines"),
    ],
)
def test_verdict_follows_the_interval_of_the_difference(
    ranker: list[int], knn: list[int], grade: str, beats: bool, line: str
) -> None:
    verdict = judge(compare_tables(outcome_of(ranker, knn), "point"))
    assert (verdict.grade, verdict.beats_baselines, verdict.baseline) == (grade, beats, "item-kNN")
    assert verdict.line.startswith(line) and "next item of 50 of 1,000 users" in verdict.line
    assert verdict.exit == "point" and verdict.difference is not None and len(verdict.difference) == 3


def test_the_difference_is_paired_with_the_best_baseline() -> None:
    found = compare({"dot": np.array([1.0, 0.5]), "a": np.array([0.9, 0.4]), "b": np.array([0.0, 0.2])}, "dot", "t")
    assert found is not None and found.baseline == "a"
    assert found.difference == [0.1, 0.1, 0.1], "paired, equal differences have no spread"
    assert compare({"dot": np.zeros(0), "a": np.zeros(0)}, "dot", "t") is None
    assert compare({"dot": np.zeros(3)}, "dot", "t") is None and compare({"a": np.zeros(3)}, "dot", "t") is None


def test_the_worst_table_gives_the_verdict() -> None:
    slate = (np.array([0.9, 0.1]), np.array([0.0, 1.0]))
    right = (np.array([0.1, 0.9]), np.array([0.0, 1.0]))
    outcome = outcome_of([0] * 30, [9] * 30, point=[slate] * 30, popularity=[right] * 30, **{"item-kNN": [slate] * 30})
    verdict = judge(compare_tables(outcome, "point"))
    assert verdict.grade == "worse" and verdict.baseline == "popularity"
    assert "`like` in 30 held-out slates" in verdict.line


def test_without_cases_the_verdict_is_not_measured() -> None:
    verdict = judge(compare_tables(Outcome({}, {}, None), "dot"), ["WARNING: x"])
    assert (verdict.grade, verdict.beats_baselines) == ("unknown", None)
    assert verdict.line == "NOT MEASURED against baselines: no held-out case has a result; WARNING: x"
    because = judge([], ["WARNING: x"], ["the next item, because of y"]).line
    assert because == "NOT MEASURED against baselines: the next item, because of y; WARNING: x"


def test_slates_without_both_labels_are_not_measurable() -> None:
    """Labels that are all 0, a slate without any known label, and no slate at all."""
    alike = (np.array([0.5, 0.2]), np.zeros(2))
    unknown = (np.zeros(0), np.zeros(0))
    for slates in ([alike, unknown], [unknown], []):
        outcome = Outcome({}, {"dot": slates, "point": slates, "set": slates, "popularity": slates}, "like")
        report = tabulate(outcome)
        assert report["slates"] == {} and report["set_against_point"] == {}
        some = f"none of {len(slates)} held-out slates has both labels of `like`"
        assert report["not_measured"]["slates"] == (some if slates else "`like`, because no user has a held-out slate")
        assert judge(compare_tables(outcome, "set")).grade == "unknown"
        assert quality_table(report) == ""


def test_few_labels_have_a_table_without_calibration_error(tmp_path: Path) -> None:
    slate = (np.array([0.9, 0.1]), np.array([1.0, 0.0]))
    report = tabulate(Outcome({}, {"dot": [slate], "popularity": [slate]}, "like"))
    assert report["slates"]["dot"]["ndcg10"] == [1.0, 1.0, 1.0] and "calibration_error" not in report["slates"]["dot"]
    assert "| not measurable |" in quality_table(report)
    plot_quality(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").exists()


@pytest.fixture
def config() -> Config:
    train = TrainConfig(epochs=4, cascade_epochs=2)
    return Config(DataConfig("shop", (Head("next", "next", 1.0),)), TablesConfig("e.csv", "i.csv"), train=train)


def write_log(path: Path, losses: list[str], ndcg: list[str]) -> Path:
    lines = ["epoch,loss,dot_hr10,dot_ndcg10"]
    lines += [f"{k},{loss},{value},{value}" for k, (loss, value) in enumerate(zip(losses, ndcg, strict=True), 1)]
    path.write_text("\n".join(lines))
    return path


HEALTHY = ["3", "2", "5", "4"]


@pytest.mark.parametrize(
    ("losses", "ndcg", "warning"),
    [
        (HEALTHY, ["", ".30", "", ".31"], None),
        (["3", "2", "nan", "nan"], ["", ".3", "", ".3"], "loss is not a number"),
        (["3", "3.5", "5", "4"], ["", ".3", "", ".3"], "did not fall (3 to 3.5)"),
        (["3", "2", "4", "9"], ["", ".3", "", ".3"], "did not fall (4 to 9)"),
        (HEALTHY, ["", ".20", "", ".30"], "still rose at the end (0.2000 to 0.3000)"),
        (HEALTHY, [".4", ".20", "", ".30"], None),
        (HEALTHY, ["", "", "", ""], None),
    ],
)
def test_suspicious_logs_are_named(
    tmp_path: Path, config: Config, losses: list[str], ndcg: list[str], warning: str | None
) -> None:
    found = training_warnings(config, write_log(tmp_path / "log.csv", losses, ndcg), torch.nn.Linear(2, 2), 2)
    assert len(found) == (warning is not None) and all(warning in line for line in found if warning)


@pytest.mark.parametrize(
    ("losses", "joined", "warning"),
    [
        (["5", "4", "9", "8"], 2, None),  # patience ended the first phase after 2 of at most 40 epochs
        (["5", "4", "9", "8"], None, "did not fall (5 to 8)"),
        (["5", "6", "9", "8"], 2, "did not fall (5 to 6)"),
        (["9", "8", "4", "4.5"], 2, "did not fall (4 to 4.5)"),
    ],
)
def test_losses_are_compared_within_their_phase(
    tmp_path: Path, config: Config, losses: list[str], joined: int | None, warning: str | None
) -> None:
    long = dataclasses.replace(config, train=TrainConfig(epochs=40, cascade_epochs=2, patience=1))
    log = write_log(tmp_path / "log.csv", losses, ["", ".3", "", ".3"])
    found = training_warnings(long, log, torch.nn.Linear(2, 2), joined)
    assert len(found) == (warning is not None) and all(warning in line for line in found if warning)


def test_diverged_weights_are_named(tmp_path: Path, config: Config) -> None:
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    found = training_warnings(config, tmp_path / "no-log.csv", model, 2)
    assert len(found) == 1 and "diverged" in found[0]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_writer, "measure_latency", lambda engines, _: {name: {} for name in engines})
    monkeypatch.setattr(parity, "measure_parity", lambda *_: {"padding": 0.0})


def graded(monkeypatch: pytest.MonkeyPatch, grade: str) -> None:
    verdict = Verdict(beats_baselines=False, grade=grade, line=f"Graded {grade} than item-kNN")  # type: ignore[arg-type]
    monkeypatch.setattr("slatewise_train.export.judge", lambda *_: verdict)


def test_export_of_a_worse_ranker_needs_force(
    tiny: Tiny, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    graded(monkeypatch, "worse")
    few = ExportOptions(most_users=4, training=tiny.training)
    with pytest.raises(ValueError, match="Graded worse than item-kNN: `--force` exports it nevertheless"):
        export(tiny.trainer, None, tiny.config, tmp_path, 1, few)
    assert not (tmp_path / "tiny" / "1").exists()
    assert capsys.readouterr().out.splitlines()[0] == "Graded worse than item-kNN"
    forced = dataclasses.replace(few, force=True)
    folder = export(tiny.trainer, None, tiny.config, tmp_path, 1, forced)
    assert (folder / "report.md").read_text().splitlines()[0] == "Graded worse than item-kNN"
    report = json.loads((folder / "report.json").read_text())
    assert next(iter(report)) == "verdict" and report["verdict"]["beats_baselines"] is False
    assert report_text(report) == (folder / "report.md").read_text()
    assert (folder / "training.png").read_bytes() == (tiny.training / "log.png").read_bytes()
    with serve(Settings(bundles=tmp_path)) as client:
        listed = client.get("/models").json()["models"][0]["verdict"]
        assert listed == client.get("/models/tiny").json()["verdict"] == report["verdict"]
        assert listed["grade"] == "worse" and listed["line"] == "Graded worse than item-kNN"


def test_remarks_on_demo_tables_are_not_the_first_line(
    tiny: Tiny, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    graded(monkeypatch, "better")
    pl.read_parquet(tiny.config.tables.events).write_csv(tmp_path / "demo.csv", separator=";")
    demo = DemoConfig(str(tmp_path / "demo.csv"), tiny.config.tables.items)
    export(tiny.trainer, None, dataclasses.replace(tiny.config, demo=demo), tmp_path, 1, ExportOptions(most_users=4))
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == "Graded better than item-kNN"
    assert "demo.csv: columns are separated by semicolons" in captured.err


@pytest.mark.parametrize("grade", ["unclear", "better", "unknown"])
def test_export_of_another_ranker_needs_no_force(
    tiny: Tiny, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, grade: str
) -> None:
    graded(monkeypatch, grade)
    folder = export(tiny.trainer, None, tiny.config, tmp_path, 1, ExportOptions(most_users=4))
    verdict = read_manifest(folder).verdict
    assert verdict is not None and verdict.grade == grade


def test_export_of_diverged_weights_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    broken = dataclasses.replace(tiny).trainer
    bias = next(broken.model.parameters())
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.view(-1)[0] = torch.nan
    try:
        with pytest.raises(ValueError, match="weights are not finite"):
            export(broken, None, tiny.config, tmp_path, 1)
    finally:
        with torch.no_grad():
            bias.copy_(kept)


def test_export_of_scores_that_are_not_finite_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Outcome:
        raise EngineError("a score is not finite")

    monkeypatch.setattr("slatewise_train.export.run_cases", fail)
    with pytest.raises(ValueError, match="not finite: if the training diverged, train again with a smaller"):
        export(tiny.trainer, None, tiny.config, tmp_path, 1)
    assert not (tmp_path / "tiny" / "1").exists()


def test_bundle_without_verdict_still_loads() -> None:
    (demo,) = (DEMO / "movielens").glob("[0-9]*")
    manifest = json.loads((demo / "manifest.json").read_text())
    del manifest["verdict"]
    assert parse_manifest(json.dumps(manifest).encode(), demo).verdict is None
