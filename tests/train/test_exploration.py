"""The posterior of the last layer: against plain loops, in an export, and in the variants of a bundle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from slatewise.bundle.loader import load_bundle
from slatewise.bundle.manifest import EXPLORE_GRAPH, POSTERIOR
from slatewise.bundle.ranker import Ranker
from slatewise_train import bundle_writer
from slatewise_train.compress import compress
from slatewise_train.compression.bases import Base, Options
from slatewise_train.compression.source import Source
from slatewise_train.compression.variants import posterior_of
from slatewise_train.config import ExportConfig
from slatewise_train.evaluation.calibration import calibration_slates
from slatewise_train.evaluation.cases import candidates_of, state_of
from slatewise_train.evaluation.exploration import PRIOR, Examples, factor_of, training_examples
from slatewise_train.export import ExportOptions, export
from slatewise_train.rankers import families
from tests.conftest import Tiny
from tests.train.small_source import small_source


def slow_precision(tiny: Tiny, ranker: Ranker) -> np.ndarray:
    """One candidate after another: (heads, D, D)."""
    data, engine, model = tiny.trainer.data, ranker.engines["fp32"], tiny.trainer.model.eval()
    watch, like = np.zeros((33, 33)), np.zeros((33, 33))
    positives = labelled = 0
    for case, among in calibration_slates(data, len(engine.items)):
        for rows, total, k in ((among, watch, 0), (case.upcoming, like, 1)):
            for row, label in zip(rows, case.labels[:, 1] if k else np.zeros(len(rows)), strict=True):
                if np.isnan(label):
                    continue
                candidates = candidates_of(engine, data, np.array([row]), case.time)
                point = engine.point(candidates, ranker.default_meta, state_of(engine, case))
                with torch.no_grad():
                    x = np.append(families.features(model, torch.from_numpy(point.hidden))[0].double().numpy(), 1.0)
                p = float(point.probabilities[0, k])
                total += p * (1 - p) * np.outer(x, x)
                positives += k == 0 and row in case.upcoming
                labelled += k
    known = [0, 0]
    for user, length in enumerate(data.split.train_lengths):
        labels = data.sequences.of(user, 0, int(length))[3]
        known = [known[k] + int((~np.isnan(labels[:, k])).sum()) for k in (0, 1)]
    assert training_examples(data).tolist() == known
    return PRIOR * np.eye(33) + np.stack([watch * known[0] / positives, like * known[1] / labelled])


def test_posterior_equals_that_of_plain_loops(tiny: Tiny, ranker: Ranker) -> None:
    examples = Examples(ranker.engines["fp32"], tiny.trainer.data, tiny.trainer.model.eval(), ranker.default_meta)
    found = examples.posterior()
    assert found.dtype == np.float32 and found.shape == (2, 33, 33)
    covariance = np.linalg.inv(slow_precision(tiny, ranker))
    for k in (0, 1):
        difference = np.abs(found[k].astype(float) @ found[k].T - covariance[k]).max()
        assert difference <= 1e-3 * np.abs(covariance[k]).max()
    spread = examples.spread(found)
    assert list(spread) == ["watch", "like"] and 0 < spread["watch"] < spread["like"] < 1


def test_factor_times_itself_is_the_covariance() -> None:
    root = np.random.default_rng(0).standard_normal((3, 5, 9))
    precision = root @ root.swapaxes(1, 2)
    factor = factor_of(precision)
    np.testing.assert_allclose(factor @ factor.swapaxes(1, 2), np.linalg.inv(precision), atol=1e-10)


def test_posterior_needs_validation_users(tiny: Tiny, ranker: Ranker) -> None:
    data = tiny.trainer.data
    split = dataclasses.replace(data.split, validation_users=np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="there are no validation users"):
        Examples(ranker.engines["fp32"], dataclasses.replace(data, split=split), tiny.trainer.model, np.zeros(8))


@pytest.fixture(scope="module")
def exported(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_writer, "measure_latency", lambda engines, _: {name: {} for name in engines})
        config = dataclasses.replace(tiny.config, export=ExportConfig(default_exit="set", explore=True))
        root = tmp_path_factory.mktemp("exploring")
        return export(tiny.trainer, tiny.learner, config, root, 1, ExportOptions(most_users=4, force=True))


def test_export_adds_two_files_and_changes_no_graph(exported: Path, tiny: Tiny) -> None:
    """The manifest has no new member, so an older server reads it."""
    plain, found = (json.loads((folder / "manifest.json").read_text()) for folder in (tiny.folder, exported))
    assert plain.keys() == found.keys() and plain["variants"]["fp32"].keys() == found["variants"]["fp32"].keys()
    added = {f"variants/fp32/{name}" for name in (EXPLORE_GRAPH, POSTERIOR)}
    assert found["files"].keys() - plain["files"].keys() == added
    graphs = [name for name in plain["files"] if name.endswith((".onnx", ".npy"))]
    assert [found["files"][name] for name in graphs] == [plain["files"][name] for name in graphs]
    report = json.loads((exported / "report.json").read_text())
    assert set(report["exploration"]) == {"watch", "like"}
    assert "A draw of scale 1 moves a logit by a standard deviation of 0." in (exported / "report.md").read_text()
    assert "exploration" not in json.loads((tiny.folder / "report.json").read_text())
    assert load_bundle(exported).explores and not load_bundle(tiny.folder).explores


def test_variants_of_an_exploring_bundle_explore(exported: Path, tiny: Tiny, tmp_path: Path) -> None:
    with small_source(tiny, integer_side=8):
        source = Source(exported, tiny.trainer.data, tiny.config.train, most_users=20)
        options = Options(checkpoints=tmp_path / "checkpoints")
        folder = compress(source, tmp_path, ["int8", "student"], options, forced=["int8", "student"])
        without = Source(exported, None)
        assert posterior_of(without, Base(without.model), without.fp32) is without.posterior
    ranker = load_bundle(folder)
    assert ranker.explores and set(ranker.engines) == {"fp32", "int8", "student"}
    posteriors = {name: engine.posterior for name, engine in ranker.engines.items()}
    assert (posteriors["fp32"] == source.posterior).all() and (posteriors["student"] != source.posterior).any()
