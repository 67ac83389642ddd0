"""Fits of personal weights: limits, users with known weights, and the reading of a user's events."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from loadtest.training.incremental.weights import fitted, measure, ranker_tables
from loadtest.training.personal import synthetic
from loadtest.training.personal.fits import Examples, first_directions, largest, personal, ridge, shared_directions
from loadtest.training.personal.movielens import read_user
from loadtest.training.personal.served import measure_served, newest
from slatewise.bundle.manifest import read_manifest
from slatewise_train.export import ExportOptions, export
from slatewise_train.rankers.weights import load_model
from tests.conftest import Tiny


def test_the_largest_entries_are_kept() -> None:
    values = np.array([1.0, -3.0, 0.5, 2.0])
    assert largest(values, 2).tolist() == [0, -3, 0, 2]
    assert largest(values, 0).tolist() == [0, 0, 0, 0]
    assert largest(values, 4).tolist() == values.tolist()


def test_all_directions_and_no_sparse_part_are_ridge() -> None:
    rng = np.random.default_rng(0)
    user = Examples(rng.normal(size=(7, 5)), rng.normal(size=7))
    part, change = personal(user, np.eye(5), 0, 0.3)
    np.testing.assert_allclose(part, ridge(user.features, user.targets, 0.3))
    assert not change.any()


def test_shared_directions_are_found_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "USERS", 200)
    monkeypatch.setattr(synthetic, "SPARSE", 0)
    monkeypatch.setattr(synthetic, "NOISE", 0.0)
    users, truth = synthetic.draw(20, seed=1)
    found = shared_directions(users, synthetic.RANK, 0, 1e-6)
    left = truth - truth @ found @ found.T  # outside the directions
    start = first_directions(users, synthetic.RANK)
    assert np.linalg.norm(left) < 0.01 * np.linalg.norm(truth) < np.linalg.norm(truth - truth @ start @ start.T)


def test_low_rank_and_sparse_beats_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user has fewer examples than features."""
    monkeypatch.setattr(synthetic, "USERS", 120)
    monkeypatch.setattr(synthetic, "WEIGHTS", (0.1,))
    found = synthetic.errors(20)
    assert found["low rank + sparse"] < 0.7 * min(found["ridge"], found["low rank"], found["one for all"])


def test_each_event_is_read_after_those_before_it(tiny: Tiny) -> None:
    """The probability of an event is that of a slate which begins there."""
    model = load_model(tiny.folder, read_manifest(tiny.folder)).requires_grad_(False)
    data = tiny.trainer.data
    user = int(np.argmax(np.diff(data.sequences.offsets) > 30))
    many = read_user(model, data, user, 20, 1, 5)
    assert len(many.before.targets) == 5
    assert len(many.labels) == data.config.slate_size
    for k, start in enumerate(range(15, 20)):
        one = read_user(model, data, user, start, 1, 5)
        assert one.labels[0] - one.chance[0] == pytest.approx(many.before.targets[k], abs=1e-5)
        np.testing.assert_allclose(one.slate[0], many.before.features[k], atol=1e-5)


def test_served_weights_change_lists_and_the_default_nothing(tiny: Tiny, tmp_path: Path) -> None:
    learner = copy.deepcopy(tiny.learner)
    learner.precision = torch.full((1, tiny.trainer.model.hidden_size + 1), 0.1)
    folder = export(tiny.trainer, learner, tiny.config, tmp_path, 1, ExportOptions(most_users=20, force=True))
    rows = measure_served(folder, tiny.trainer.data)
    found = {(row.events, row.history, row.exit): row for row in rows}
    assert len(found) == 4 * 2 * 2, "events, history, exit"
    assert found["50", "none", "point"].gain[0] != 0
    default = {row.default for row in rows if (row.history, row.exit) == ("none", "point")}
    assert len(default) == 1, "without a history, events before the slate change nothing"


def test_cut_sequences_are_the_newest_events(tiny: Tiny) -> None:
    data = tiny.trainer.data
    s = data.sequences
    cut = newest(data, np.array([2, 5]), np.array([9, 4]), 6)
    assert cut.offsets.tolist() == [0, 6, 10]
    first = int(s.offsets[2])
    np.testing.assert_array_equal(cut.items[:6], s.items[first + 3 : first + 9])
    np.testing.assert_array_equal(cut.labels[6:], s.labels[s.offsets[5] : s.offsets[5] + 4])


def test_stored_weights_move_the_logits_of_an_update(tiny: Tiny) -> None:
    """No weights: the ranker's own metrics. A bias changes probabilities and no order, fitted weights change both."""
    data = tiny.trainer.data
    users = data.split.slate_users[:6]
    tables = ranker_tables(tiny.trainer.model, data, 1)
    size = tiny.trainer.model.hidden_size + 1
    own = fitted(tables, torch.full((1, size), 0.1), data, users, 20)
    assert own.shape == (len(users), size)
    none, bias = torch.zeros_like(own), torch.zeros_like(own)
    bias[:, -1] = 1.0
    found = measure(tables, data, users, 1, [none, bias, own])
    for k, user in enumerate(users.tolist()):
        read = read_user(tables.ranker, data, user, int(data.split.train_lengths[user]), 1, 0)
        chance = np.where(read.labels == 1, read.chance, 1 - read.chance)
        assert found[k, 0, 1] == pytest.approx(-np.log(chance).mean(), abs=1e-5)
    np.testing.assert_allclose(found[:, 1, 0], found[:, 0, 0])
    assert (found[:, 1, 1] != found[:, 0, 1]).all()
    assert (found[:, 2] != found[:, 0]).any(axis=0).all()
