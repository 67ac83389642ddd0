"""The sequential test and the stop rule: how often they are wrong, and how soon they are right."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slatewise.ranking.rollout import Answered, StopRule, place_of
from slatewise.ranking.sequential import RATES, Evidence
from slatewise.version_schemas import StopBounds


def alarms(bound: float, false_alarm: float, streams: np.ndarray) -> float:
    """Share of the streams, one a row, that raise an alarm at any time."""
    raised = 0
    for stream in streams:
        evidence = Evidence(bound, false_alarm, -1)
        raised += any(evidence.add(float(number)) for number in stream)
    return raised / len(streams)


@pytest.mark.parametrize("bound", [0.01, 0.5])
def test_false_alarms_are_as_rare_as_stated(bound: float) -> None:
    """At the bound itself, the worst case. 400 streams: 0.1 is passed by chance once in 10,000 times."""
    streams = np.random.default_rng(1).random((400, 1000)) < bound
    assert alarms(bound, 0.05, streams) <= 0.1


def test_false_alarms_of_differences_are_rare() -> None:
    """Both versions fail in 20 % of the answers, and drift together."""
    rng = np.random.default_rng(2)
    rates = 0.2 + 0.2 * np.sin(np.arange(1000) / 50)
    served, new = (rng.random((2, 300, 1000)) < rates).astype(float)
    assert alarms(0.01, 0.05, new - served) <= 0.1


@pytest.mark.parametrize(("rate", "most"), [(1.0, 15), (0.5, 40), (0.2, 150), (0.1, 400)])
def test_a_clear_fault_is_found_soon(rate: float, most: int) -> None:
    streams = np.random.default_rng(3).random((50, most)) < rate
    assert alarms(0.01, 0.001, streams) >= 0.9


def test_wealth_equals_the_slow_reference() -> None:
    numbers = np.random.default_rng(4).uniform(-1, 1, 60)
    evidence = Evidence(0.2, 1e-9, -1)
    for number in numbers:
        evidence.add(float(number))
    wealth = [math.prod(1 + rate * (number - 0.2) / 1.2 for number in numbers) for rate in RATES]
    assert math.exp(evidence.log_wealth) == pytest.approx(sum(wealth) / len(wealth))


def test_places_are_uniform_and_differ_by_salt() -> None:
    first, second = (np.array([place_of(salt, f"u{k}") for k in range(4000)]) for salt in ("tiny/2", "tiny/3"))
    for places in (first, second):
        assert places.min() >= 0 and places.max() < 1
        assert np.abs(np.histogram(places, 10, (0, 1))[0] - 400).max() < 100
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06
    assert place_of("tiny/2", "u1") == first[1]


def run(rule: StopRule, served: list[Answered], new: list[Answered]) -> tuple[str | None, int]:
    for k, (before, after) in enumerate(zip(served, new, strict=True), 1):
        rule.served_answer(before)
        if kind := rule.candidate_answer(after):
            return kind, k
    return None, len(new)


def answers(rng: np.random.Generator, failed: float, degraded: float, seconds: float) -> list[Answered]:
    """A thousand answers, with times that vary by request as much as in practice: a factor of 2 each way."""
    return [
        Answered(
            bool(f), bool(d), "miss" if k % 3 else "hit", None if f or d else seconds * float(s) * (1 + 3 * (k % 3 > 0))
        )
        for k, (f, d, s) in enumerate(
            zip(rng.random(1000) < failed, rng.random(1000) < degraded, rng.lognormal(0, 0.7, 1000), strict=True)
        )
    ]


@pytest.mark.parametrize(
    ("failed", "degraded", "slower", "kind"),
    [(0.0, 0.0, 1.0, None), (0.2, 0.0, 1.0, "failed"), (0.0, 0.3, 1.0, "degraded"), (0.0, 0.0, 3.0, "latency")],
)
def test_rule_stops_what_is_worse_and_nothing_else(
    failed: float, degraded: float, slower: float, kind: str | None
) -> None:
    rng = np.random.default_rng(5)
    served = answers(rng, 0.0, 0.01, 0.004)
    found = [
        run(StopRule(StopBounds()), served, answers(rng, failed, 0.01 + degraded, 0.004 * slower)) for _ in range(20)
    ]
    assert {name for name, _ in found} == {kind}
    assert kind is None or max(count for _, count in found) <= 250


def test_fault_of_both_versions_stops_nothing() -> None:
    rng = np.random.default_rng(6)
    both = [(answers(rng, 0.3, 0.3, 0.004), answers(rng, 0.3, 0.3, 0.004)) for _ in range(20)]
    assert [run(StopRule(StopBounds()), *one)[0] for one in both] == [None] * 20


def test_disagreement_is_an_alarm() -> None:
    rule = StopRule(StopBounds(overlap=0.5))
    assert [rule.agreement(0.6) for _ in range(1000)] == [None] * 1000
    rule = StopRule(StopBounds(overlap=0.5))
    assert "agreement" in [rule.agreement(0.1) for _ in range(40)]
    assert "below 0.5" in rule.reason("agreement")


@pytest.mark.parametrize("code", [429, 499, 503])
def test_answers_that_say_nothing_about_a_version_do_not_count(code: int) -> None:
    assert Answered.of(code, False, "none", 1.0) is None
    assert Answered.of(500, False, "none", 1.0) == Answered(True, False, "none", None)
    assert Answered.of(200, True, "hit", 1.0) == Answered(False, True, "hit", None)
