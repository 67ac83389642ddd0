"""The deletion test of explanations, with two users and the demo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.server.explain import rank_of, report, without

ROOT = Path(__file__).parents[2]


def test_events_are_removed_from_every_column() -> None:
    body = {"user": "u", "history": {"item_ids": ["a", "b", "c"], "timestamps": [1, 2, 3]}}
    assert without(body, [0, 2]) == {"user": "u", "history": {"item_ids": ["b"], "timestamps": [2]}}
    assert without(body, []) == body


def test_rank_is_the_place_of_the_candidate() -> None:
    assert rank_of({"results": {"index": [4, 0, 2]}}, 2) == 2


def test_report_counts_equal_losses_as_failures(capsys: pytest.CaptureFixture[str]) -> None:
    report("first", [(3, [0] * 10), (1, [1] * 10), (0, [2] * 10), (5, [4] * 10)])
    row = json.loads(capsys.readouterr().out)
    assert (row["named_lower_more"], row["equal"], row["users"]) == (0.5, 0.25, 4)
    assert (row["places_lost_named"], row["places_lost_random"]) == (2.25, 1.75)


def test_deletion_test_runs_on_the_demo() -> None:
    source = ROOT / "tests" / "data" / "ml-latest-small"
    command = [sys.executable, "-m", "loadtest.server.explain", str(source), "--users", "2", "--candidates", "30"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    rows = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    assert [row["cost"] for row in rows if "cost" in row] == ["history encoded", "history cached"]
    assert [row["users"] for row in rows if "result" in row] == [2, 2]
