"""The simulation of exploration: the head against a slow optimum, equal worlds for all policies, and its table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loadtest.training import exploration
from loadtest.training.exploration import AVERAGE, POLICIES, WORLDS, Head, main, share, sigmoid, simulate


def test_head_finds_the_mode_of_the_posterior() -> None:
    """Gradient steps reach the same mean; a second update has the first posterior as its prior."""
    rng = np.random.default_rng(0)
    head = Head(3)
    for _ in range(2):
        before, prior = head.mean.copy(), head.precision.copy()
        shown = rng.integers(0, 3, 40)
        clicks = (rng.random(40) < 0.3).astype(float)
        head.learn(shown, clicks)
        x = np.concatenate([np.eye(3)[shown], np.ones((40, 1))], axis=1)
        slow = before.copy()
        for _ in range(20_000):
            slow += 0.02 * (x.T @ (clicks - sigmoid(x @ slow)) + prior @ (before - slow))
        np.testing.assert_allclose(head.mean, slow, atol=1e-4)
        p = sigmoid(x @ slow)
        np.testing.assert_allclose(head.precision, prior + (x * (p * (1 - p))[:, None]).T @ x, atol=1e-3)


def test_unseen_items_keep_their_prior() -> None:
    head = Head(2)
    head.learn(np.zeros(30, np.int64), np.ones(30))
    assert head.mean[0] > 0 and head.mean[1] == 0 and head.mean[2] > AVERAGE and head.precision[1, 1] == 1


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_simulation_is_repeatable(policy: exploration.Policy) -> None:
    first, second = (simulate(WORLDS[0], policy, 3, 250) for _ in range(2))
    assert (first == second).all() and first.shape == (250,) and (first >= 0).all() and (first < 1).all()


def test_share_is_that_of_the_sums_with_an_interval() -> None:
    greedy = np.array([100.0, 200.0, 300.0])
    assert share(greedy / 2, greedy) == (0.5, 0.5, 0.5)
    mean, low, high = share(np.array([90.0, 90.0, 90.0]), greedy)
    assert mean == 0.45 and low < mean < high


def test_command_prints_a_table_and_draws_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exploration, "ROUNDS", 200)
    monkeypatch.setattr(exploration, "BAR", 0.0)
    assert main(["--seeds", "2", "--out", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 + len(WORLDS) * len(POLICIES)
    assert "Thompson, scale 1 has at most 0% of greedy's regret" in text
    assert (tmp_path / "exploration.png").read_bytes().startswith(b"\x89PNG")
