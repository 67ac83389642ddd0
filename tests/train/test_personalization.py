"""The personalization experiment: held-out users, the arms that it compares, and its statistics."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from slatewise_train.batches import epoch_windows
from slatewise_train.data import Data, split_sequences, training_events
from slatewise_train.evaluation.report import ARM_METRICS, personalization_table, plot_personalization
from slatewise_train.meta import personalization
from slatewise_train.meta.limaml import MetaTrainer
from slatewise_train.meta.personalization import (
    LENGTHS,
    Comparison,
    NextEvents,
    cases_of,
    compare_lengths,
    fit_vectors,
    next_gains,
    sign_flip,
)
from tests.conftest import Tiny


@pytest.fixture(scope="module")
def data(tiny: Tiny) -> Data:
    """The tiny data with held-out users. The tiny ranker was trained on them, which does not matter in these tests."""
    whole = tiny.trainer.data
    config = dataclasses.replace(whole.config, held_out_users=12, slate_users=5, validation_users=5)
    return dataclasses.replace(whole, config=config, split=split_sequences(whole.sequences, config))


@pytest.fixture(scope="module")
def comparison(tiny: Tiny, data: Data) -> Comparison:
    return Comparison(data, tiny.trainer.model.eval().requires_grad_(True), tiny.learner)


def test_held_out_users_are_not_in_training(tiny: Tiny, data: Data) -> None:
    split = data.split
    held = set(split.held_out_users.tolist())
    assert len(held) == 12 and not held & {*split.slate_users.tolist(), *split.validation_users.tolist()}
    assert not held & set(training_events(data.sequences, split)[0].tolist())
    windows = epoch_windows(split.train_lengths, 128, 1024, np.random.default_rng(0))
    assert not held & {user for batch in windows for user, _, _ in batch}
    trainer = MetaTrainer(tiny.trainer.model, data, tiny.learner.config)
    assert not held & {user for batch in trainer.cases(np.random.default_rng(0)) for user, _ in batch}


def test_cases_have_the_stated_length_and_a_query(data: Data) -> None:
    lengths = np.diff(data.sequences.offsets)
    users = np.arange(len(lengths))
    for length in LENGTHS:
        cases = cases_of(data, users, length, 4).cases
        assert {user for user, _ in cases} == set(np.flatnonzero(lengths >= length + 4).tolist())
        assert all(now == (length if length < LENGTHS[-1] else lengths[user] - 4) for user, now in cases)


def test_comparison_changes_only_the_vector(comparison: Comparison, data: Data) -> None:
    cases = cases_of(data, data.split.held_out_users, 5, comparison.config.query)
    found = comparison.run(cases, (0.1, 10))
    assert set(found) == {"adapted", "default", "own vector", "nothing", "adapted, float16", "adapted, int8"}
    for metrics in found.values():
        assert {len(values) for values in metrics.values()} == {len(cases.cases)}
    batch = cases.batches()[0]
    torch.manual_seed(1)
    _, query = comparison.tasks(batch)
    nothing = torch.zeros(len(batch), comparison.ranker.config.meta_size)
    np.testing.assert_allclose(
        found["nothing"]["query_loss"][: len(batch)], comparison.query_losses(query, nothing), rtol=1e-5
    )
    assert np.abs(found["adapted, float16"]["query_loss"] - found["adapted"]["query_loss"]).max() < 1e-3
    assert np.abs(found["adapted"]["query_loss"] - found["default"]["query_loss"]).max() > 1e-5
    assert all(
        0 <= value <= 1
        for name in ("next_ndcg10", "like_ndcg10")
        for value in found["adapted"][name]
        if not np.isnan(value)
    )


def test_fit_vectors_lowers_the_fitted_loss(comparison: Comparison, data: Data) -> None:
    torch.manual_seed(0)
    support, _ = comparison.tasks(cases_of(data, data.split.held_out_users, 10, 4).batches()[0])
    fitted = fit_vectors(comparison.ranker, comparison.kinds, support, 0.05, 20, comparison.config.support)
    start = comparison.ranker.default_meta.detach().expand_as(fitted)
    assert (comparison.query_losses(support, fitted) < comparison.query_losses(support, start)).all()


def test_sign_flip_p_is_large_for_noise_small_for_a_shift() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=300)
    noise -= noise.mean()
    assert sign_flip(noise + 1e-9) > 0.9
    assert sign_flip(noise + 0.5) < 0.001
    assert sign_flip(np.array([1.0, 1.0, 1.0, 1.0])) == pytest.approx(2 / 16, abs=0.02)


def test_report_has_every_arm_and_a_plot(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arms = {name: {metric: rng.random(40) for metric in ARM_METRICS} for name in ("default", "adapted", "own vector")}
    arms["adapted"]["query_loss"] = arms["default"]["query_loss"] - 0.25
    report = {"lengths": compare_lengths({5: arms, 50: arms})}
    assert report["lengths"]["5"]["arms"]["adapted"]["query_loss"]["minus_default"] == [-0.25, -0.25, -0.25]
    table = personalization_table(report)
    assert table.count("\n") == 2 * 3 + 1 and "| 50+ | 40 | adapted |" in table and "-0.25000" in table
    plot_personalization(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 5_000


def test_scores_that_are_not_numbers_have_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(personalization, "point_with", lambda *_: torch.full((2, 1, 5, 1), torch.nan))
    seen = [np.array([1]), np.array([3])]
    events = NextEvents(torch.zeros(2, 5, 3), torch.zeros(2, 5, 1), torch.tensor([0, 3]), seen)
    assert next_gains(None, 0, events, torch.zeros(2, 4)).tolist() == [0, 0]  # type: ignore[arg-type]
