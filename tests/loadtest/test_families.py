"""The comparison of residual DCN with other rankers: equal sizes, AUC, groups, features of trees, and a tiny run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from loadtest.training.families import runs
from loadtest.training.families.report import (
    Rated,
    auc_in_slates,
    auc_interval,
    calibration_table,
    quality_table,
    read_runs,
    weighted_auc,
)
from loadtest.training.families.runs import (
    BY_FEATURES,
    PLAIN,
    RESIDUAL,
    Scores,
    held_out,
    known_labels,
    parameters,
    run,
    shapes,
)
from loadtest.training.families.trees import Features, training_slates
from slatewise_train.config import Config, Head
from slatewise_train.data import Data, load_data
from slatewise_train.evaluation.metrics import auc
from tests.conftest import Tiny

torch.set_num_threads(1)

BASE = {"width": 8, "cross_layers": 2, "cross_rank": 4, "units": 16, "meta_size": 4, "dropout": 0.1}


@pytest.fixture(scope="module")
def config(tiny: Tiny) -> Config:
    split = replace(tiny.config.data, heads=(Head("like", "label"),), slate_users=30, validation_users=10)
    short = replace(tiny.config.train, epochs=1, cascade_epochs=1, cascade_negatives=1)
    return replace(tiny.config, data=split, train=short)


@pytest.fixture(scope="module")
def data(config: Config) -> Data:
    return load_data(config.data, config.tables)


def test_rankers_have_the_parameters_of_residual_dcn(data: Data) -> None:
    sizes = {name: parameters(data, shape) for name, shape in shapes(data, BASE).items()}
    assert sizes[PLAIN] == sizes[RESIDUAL]
    assert sizes.pop(BY_FEATURES) == sizes[RESIDUAL] + BASE["width"] * (16 + 1)  # a slope of each bucket, and a bias
    assert max(sizes.values()) - min(sizes.values()) < 0.03 * sizes[RESIDUAL]


@pytest.mark.parametrize("ties", [False, True])
def test_auc_of_equal_weights_is_that_of_the_metrics(ties: bool) -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 9, 500) if ties else rng.normal(size=500)
    labels = (rng.random(500) < 0.4).astype(float)
    assert weighted_auc(scores, labels, np.ones(500)) == pytest.approx(auc(scores, labels))
    weights = rng.integers(0, 4, 500)
    repeated = np.repeat(np.arange(500), weights)
    assert weighted_auc(scores, labels, weights.astype(float)) == pytest.approx(auc(scores[repeated], labels[repeated]))


def drawn(noise: float, seed: int, labels: np.ndarray) -> Scores:
    raw = 1 / (1 + np.exp(-(labels - 0.5 + np.random.default_rng(seed).normal(0, noise, len(labels)))))
    return Scores(raw, raw, 1.0, 0.0)


def test_intervals_tell_a_better_ranker_from_a_worse_one() -> None:
    labels = (np.random.default_rng(9).random(4_000) < 0.5).astype(float)
    rated = Rated(labels, np.repeat(np.arange(400), 10), np.zeros(4_000, int))
    good, bad = ([drawn(noise, seed, labels) for seed in (1, 2)] for noise in (1.0, 2.0))
    mean, low, high = auc_interval(rated, good, bad)
    assert 0.05 < low < mean < high < 0.25
    assert auc_interval(rated, good, good) == [0.0, 0.0, 0.0]
    assert 0.6 < auc_in_slates(rated, good[0].raw) < 0.9
    text = quality_table(rated, {RESIDUAL: good, PLAIN: bad}, {RESIDUAL: 1_234})
    assert f"| {RESIDUAL} | 1,234 | 2 |" in text and f"| {PLAIN} |  | 2 |" in text


def test_groups_show_observed_over_expected(data: Data) -> None:
    labels, users, items = known_labels(held_out(data))
    half = np.full(len(labels), labels.mean() / 0.9)
    rated = Rated(np.tile(labels, 5), np.tile(users, 5), np.tile(items, 5))
    text = calibration_table(data, rated, {"too high": [np.tile(half, 5)]})
    assert "| groups within .98 to 1.02 |  | " in text and " (" in text.splitlines()[-1]
    assert "| all | 1,500 |" in text and "| 0.900 |" in text and "| groups within .98 to 1.02 |" in text


def test_features_of_a_training_slate_do_not_depend_on_its_labels(data: Data) -> None:
    slates = training_slates(data, np.random.default_rng(0))[:20]
    before = [Features(data).slate(*slate, trained=True)[0] for slate in slates]
    for slate, expected in zip(slates, before, strict=True):
        user, first, last = slate
        labels = data.sequences.labels.copy()
        start = int(data.sequences.offsets[user])
        labels[start + first : start + last] = 1 - labels[start + first : start + last]
        other = replace(data, sequences=replace(data.sequences, labels=labels))
        changed = Features(other)
        changed.mean = Features(data).mean  # the prior alone sees all labels
        np.testing.assert_allclose(changed.slate(*slate, trained=True)[0], expected)


def test_run_is_scored_by_its_graphs_and_done_once(
    data: Data, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(data, config, BASE, 0, tmp_path / f"{RESIDUAL}, seed 0")
    monkeypatch.setattr(runs, "train", None)
    run(data, config, BASE, 0, tmp_path / f"{RESIDUAL}, seed 0")
    (scores,) = read_runs(tmp_path, [RESIDUAL, PLAIN], 3)[RESIDUAL]
    labels, users, items = known_labels(held_out(data))
    assert len(scores.raw) == len(scores.fitted) == len(labels) == len(users) == len(items) == 300
    assert 0 <= scores.parity <= 1e-5
    assert ((scores.raw > 0) & (scores.raw < 1)).all()
