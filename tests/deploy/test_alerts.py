"""Alerts, their promtool tests, their runbook paragraphs and their metrics are consistent."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.dashboards import DASHBOARDS
from tests.deploy.test_dashboards import labels_by_sample, labels_in, names_in

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
HEADINGS = re.findall(r"^### (\w+)$", RUNBOOK, re.MULTILINE)


def alert_name(rule: dict[str, Any]) -> str:
    return str(rule["alert"])


def rule_name(rule: dict[str, Any]) -> str:
    return str(rule.get("alert") or rule.get("record"))


def test_runbook_paragraphs_equal_alerts() -> None:
    assert sorted(HEADINGS) == sorted(map(alert_name, ALERTS))


@pytest.mark.parametrize("rule", ALERTS, ids=alert_name)
def test_alert_has_runbook_link_severity_and_summary(rule: dict[str, Any]) -> None:
    assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"].endswith(".")


@pytest.mark.parametrize("name", HEADINGS)
def test_runbook_paragraph_has_means_confirm_and_do(name: str) -> None:
    paragraph = re.search(rf"^### {name}$(.*?)(?=^##|\Z)", RUNBOOK, re.DOTALL | re.MULTILINE)
    assert paragraph
    assert all(word in paragraph[1] for word in ("**Means.**", "**Confirm.**", "**Do.**"))


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_rule_uses_existing_metrics_and_labels(rule: dict[str, Any]) -> None:
    known = labels_by_sample()
    named = names_in(rule["expr"])
    assert named and named <= known.keys()
    assert labels_in(rule["expr"]) <= set.union(*(known[name] for name in named))


def test_runbook_names_existing_metrics_and_panels() -> None:
    known = labels_by_sample()
    assert set(re.findall(r"\bslatewise_[a-z_]+[a-z]", RUNBOOK)) <= known.keys()
    named = {tuple(text.split(" > ")) for text in re.findall(r"(?<!\*)\*(\w+ > [^*]+)\*", " ".join(RUNBOOK.split()))}
    shown = {
        (board.title.removeprefix("Slatewise: "), panel.title)
        for board in DASHBOARDS.values()
        for panel in board.panels
    }
    assert named and named <= shown
    assert not re.search(r"(?<![*`])(?:Overview|Latency|State|Models) > ", RUNBOOK), "write a panel as *Board > Panel*"


def test_every_alert_is_tested_quiet_firing_and_cleared() -> None:
    tests = [test for path in sorted(FOLDER.glob("*_test.yml")) for test in yaml.safe_load(path.read_text())["tests"]]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for name in map(alert_name, ALERTS):
        fires = [bool(case["exp_alerts"]) for case in cases if case["alertname"] == name]
        assert True in fires, f"no test shows {name} firing"
        assert False in fires[: fires.index(True)] and False in fires[fires.index(True) :], (
            f"no test shows {name} quiet before and after"
        )


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (apt-get install prometheus)")
@pytest.mark.parametrize(
    "command",
    ["check config prometheus.yml", "check rules rules.yml", "test rules rules_test.yml", "test rules burn_test.yml"],
)
def test_promtool_command_succeeds(command: str) -> None:
    found = subprocess.run(["promtool", *command.split()], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout + found.stderr
