"""Calibration keeps the order without ties, and lowers the calibration error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slatewise.bundle.manifest import read_manifest
from slatewise_train import bundle_writer
from slatewise_train.config import DataConfig
from slatewise_train.evaluation import parity
from slatewise_train.evaluation.calibration import LEAST_SLOPE, fit_calibration
from slatewise_train.evaluation.metrics import calibration_error
from slatewise_train.export import ExportOptions, export
from slatewise_train.rankers.base import Calibration
from slatewise_train.rankers.ligr import Ligr, LigrConfig
from slatewise_train.rankers.ligr_onnx import LigrGraphs
from slatewise_train.rankers.onnx_builder import GraphBuilder
from tests.train.test_export import BUY, HELD_OUT, NEXT, train_shop

torch.set_num_threads(1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def draw(slope: float, shift: float, n: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels whose true logit is slope * logit + shift."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, n).astype(np.float32)
    return logits, (rng.random(n) < sigmoid(slope * logits + shift)).astype(np.float32)


# uninformative logits, inverted ones (the flattest map allowed), overconfident ones, and timid and shifted ones
FITTED = {
    (slope, shift): fit_calibration(*draw(slope, shift))
    for slope, shift in ((0.0, 0.0), (-1.0, 0.0), (0.3, -1.0), (1.7, 0.5))
}


@pytest.mark.parametrize("true", FITTED)
def test_calibration_outside_the_data_still_has_a_slope(
    true: tuple[float, float],
) -> None:
    calibration = FITTED[true]
    assert len(calibration.knots), "not the identity"
    x = np.concatenate([np.linspace(-1e4, -20, 2_000), np.linspace(-20, 20, 8_001)[1:-1], np.linspace(20, 1e4, 2_000)])
    slopes = np.diff(calibration(x)) / np.diff(x)
    assert slopes.min() >= LEAST_SLOPE * (1 - 1e-6)


@pytest.mark.parametrize("true", FITTED)
def test_calibration_is_linear_outside_the_knots(true: tuple[float, float]) -> None:
    calibration = FITTED[true]
    for x in (
        calibration.knots[0] - np.array([0.0, 1.0, 10.0, 1000.0]),
        calibration.knots[-1] + np.array([0.0, 1.0, 10.0, 1000.0]),
    ):
        slopes = np.diff(calibration(x)) / np.diff(x)
        np.testing.assert_allclose(slopes, slopes[0], rtol=1e-9)


@pytest.mark.parametrize("true", FITTED)
def test_calibration_keeps_neighbouring_float32_logits_distinct(true: tuple[float, float]) -> None:
    # below 1e-3, float32 is finer than the error of a sum of products, and than the sigmoid near one half
    x = np.random.default_rng(1).uniform(1e-3, 12, 20_000).astype(np.float32)
    x = np.concatenate([x, -x, [np.float32(1e-3), np.float32(12)]]).astype(np.float32)
    above = np.nextafter(x, np.float32(np.inf))
    assert (sigmoid(FITTED[true](above)) > sigmoid(FITTED[true](x))).all()


def test_calibration_of_separable_labels_keeps_logits_distinct() -> None:
    logits = np.concatenate([np.linspace(-3, -1, 60), np.linspace(1, 3, 60)])
    calibration = fit_calibration(logits, (logits > 0).astype(np.float32))
    x = np.linspace(-12, 12, 2_001).astype(np.float32)
    assert (np.diff(sigmoid(calibration(x))) > 0).all()


@pytest.mark.parametrize("true", [(0.3, -1.0), (1.7, 0.5)])
def test_calibration_lowers_error_on_fresh_examples(true: tuple[float, float]) -> None:
    logits, labels = draw(*true, n=20_000, seed=9)
    before = calibration_error(sigmoid(logits), labels)
    after = calibration_error(sigmoid(FITTED[true](logits)), labels)
    assert before > 0.08
    assert after < 0.03


@given(ones=st.integers(0, 49), zeros=st.integers(0, 200), swap=st.booleans())
@settings(max_examples=20, deadline=None)
def test_calibration_with_under_50_examples_is_the_identity(ones: int, zeros: int, swap: bool) -> None:
    labels = np.concatenate([np.ones(ones), np.zeros(zeros)])
    calibration = fit_calibration(np.linspace(-3, 3, len(labels)), 1 - labels if swap else labels)
    x = np.linspace(-50, 50, 101).astype(np.float32)
    np.testing.assert_array_equal(calibration(x), x.astype(np.float64))


def test_calibration_of_50_examples_or_equal_logits_is_valid() -> None:
    labels = np.arange(100) % 2
    assert len(fit_calibration(np.linspace(-3, 3, 100), labels).knots)
    flat = fit_calibration(np.full(100, 0.7, np.float32), labels)
    x = np.linspace(-5, 5, 101)
    assert np.isfinite(flat(x)).all() and (np.diff(flat(x)) > 0).all()


def test_calibration_in_graph_equals_numpy(tmp_path: Path) -> None:
    calibrations = [FITTED[1.7, 0.5], Calibration.identity(), FITTED[0.0, 0.0]]
    config = LigrConfig(items=4, actions=1, fields={}, numeric=0, heads=3, width=4, blocks=1, set_blocks=0)
    graphs = LigrGraphs(Ligr(config, {}, torch.zeros(0), torch.ones(0)), {"dot": calibrations}, 1)
    g = GraphBuilder("calibration")
    graphs.probabilities(g, g.input("logits", ["B", "N", 3]), "dot")
    (tmp_path / "graph.onnx").write_bytes(g.model().SerializeToString())
    session = ort.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    for n in (0, 1, 1000):
        logits = np.random.default_rng(n).normal(0, 6, (1, n, 3)).astype(np.float32)
        expected = np.stack([sigmoid(c(logits[0, :, k])) for k, c in enumerate(calibrations)], axis=1)
        np.testing.assert_allclose(session.run(None, {"logits": logits})[0][0], expected, rtol=0, atol=1e-13)


def test_head_with_few_labels_exports_as_not_measurable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels of the held-out slates are empty, and those of other events are not."""
    monkeypatch.setattr(bundle_writer, "measure_latency", lambda engines, _: {name: {} for name in engines})
    monkeypatch.setattr(parity, "measure_parity", lambda *_: {"padding": 0.0})
    trainer, config = train_shop(tmp_path, DataConfig("shop", (NEXT, BUY), **HELD_OUT), items=90)
    data = trainer.data
    for user in (*data.split.slate_users, *data.split.validation_users):
        last = data.sequences.offsets[user + 1]
        data.sequences.labels[last - 6 : last, 1] = np.nan
    folder = export(trainer, None, config, tmp_path, 1, ExportOptions(force=True))
    report = json.loads((folder / "report.json").read_text())
    assert report["slates"] == {}
    assert report["not_measured"]["slates"] == "none of 3 held-out slates has both labels of `buy`"
    assert report["not_measured"]["buy"].startswith("calibration of `buy`: fewer than 50 labels")
    text = (folder / "report.md").read_text()
    assert "Not measured: none of 3 held-out slates has both labels of `buy`." in text
    assert read_manifest(folder).variants["fp32"].quality["set"].keys() == {"leave_one_out"}
