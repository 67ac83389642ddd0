"""The dashboards: what their queries name exists, each panel says what it is, and the files that Grafana mounts are what the code makes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Histogram

from deploy.grafana import dashboards
from slatewise.metrics import BUCKETS
from tests.test_metrics import METRICS, name_of

FOLDER = Path(dashboards.__file__).parent
RULES = FOLDER.parent / "prometheus" / "rules.yml"
COMMON = {"job", "instance"}
FOREIGN = {  # of Prometheus itself, and of the client library
    "up": COMMON,
    "ALERTS": {*COMMON, "alertname", "alertstate"},
    "process_cpu_seconds_total": COMMON,
    "process_resident_memory_bytes": COMMON,
}
UNITS = {"none", "s", "reqps", "ops", "bytes", "percentunit"}


def labels_by_sample() -> dict[str, set[str]]:
    """Every name that can be queried -> its labels."""
    found = dict(FOREIGN)
    for metric in METRICS:
        labels = COMMON | set(metric._labelnames)
        if isinstance(metric, Histogram):
            found |= {
                f"{name_of(metric)}_{part}": labels | ({"le"} if part == "bucket" else set())
                for part in ("bucket", "sum", "count")
            }
        else:
            found[name_of(metric)] = labels
    rules = yaml.safe_load(RULES.read_text())
    return found | {rule["record"]: {"job"} for group in rules["groups"] for rule in group["rules"] if "record" in rule}


def names_in(expr: str) -> set[str]:
    return set(re.findall(r"\b(?:slatewise_\w+|process_\w+|ALERTS|up(?=\{)|job:\w+:\w+)", expr))


def labels_in(expr: str) -> set[str]:
    matched = [
        name
        for matchers in re.findall(r"\{([^}]*)\}", expr)
        for name in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)
    ]
    grouped = [
        name for names in re.findall(r"\b(?:by|ignoring|on)\s*\(([^)]*)\)", expr) for name in re.findall(r"\w+", names)
    ]
    return {*matched, *grouped}


def panels() -> list[tuple[str, dict[str, Any]]]:
    return [(name, panel) for name in dashboards.DASHBOARDS for panel in json.loads(dashboards.text(name))["panels"]]


def title(panel: tuple[str, dict[str, Any]]) -> str:
    return f"{panel[0]}: {panel[1]['title']}"


@pytest.mark.parametrize("name", dashboards.DASHBOARDS)
def test_the_files_are_what_the_code_makes(name: str) -> None:
    assert (FOLDER / "dashboards" / f"{name}.json").read_text() == dashboards.text(name), (
        "run: python -m deploy.grafana.dashboards"
    )


def test_there_are_four_and_no_other_file() -> None:
    assert (
        {path.stem for path in (FOLDER / "dashboards").iterdir()}
        == set(dashboards.DASHBOARDS)
        == {"overview", "latency", "state", "models"}
    )


@pytest.mark.parametrize("panel", panels(), ids=title)
def test_a_panel_has_a_unit_and_says_what_it_means(panel: tuple[str, dict[str, Any]]) -> None:
    _, content = panel
    assert content["fieldConfig"]["defaults"]["unit"] in UNITS
    assert content["description"].endswith((".", "?"))
    assert len(content["description"]) > 15
    assert content["targets"]


@pytest.mark.parametrize("panel", panels(), ids=title)
def test_what_its_queries_name_exists(panel: tuple[str, dict[str, Any]]) -> None:
    known = labels_by_sample()
    for target in panel[1]["targets"]:
        expr = target["expr"]
        assert names_in(expr), expr
        assert names_in(expr) <= known.keys()
        assert labels_in(expr) <= set.union(*(known[name] for name in names_in(expr))), expr
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= set.union(
            *(known[name] for name in names_in(expr))
        )


@pytest.mark.parametrize("panel", panels(), ids=title)
def test_its_queries_aggregate_over_replicas_and_windows(panel: tuple[str, dict[str, Any]]) -> None:
    """Rates before sums, quantiles of summed buckets, windows that follow the screen, and the dashboard's replicas only."""
    for target in panel[1]["targets"]:
        expr = target["expr"]
        assert set(re.findall(r"\[([^\]]*)\]", expr)) <= {"$__rate_interval"}
        assert not re.search(r"\b(?:rate|increase)\s*\(\s*sum", expr)
        for argument in re.findall(r"histogram_quantile\([\d.]+, (.*)", expr):
            assert re.match(r"sum by \(le\b[^)]*\) \(rate\(", argument)
        for name in re.findall(r"\b(slatewise_\w+_(?:total|bucket|count|sum))\{", expr):
            assert re.search(rf"\b(?:rate|increase)\({name}\{{", expr), "a counter is shown as a rate"
        for matchers in re.findall(r"\b(?:slatewise|process)_\w+\{([^}]*)\}", expr):
            assert matchers.startswith('instance=~"$instance"')


def test_no_two_panels_have_one_place_and_none_is_wider_than_the_screen() -> None:
    for name in dashboards.DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(dashboards.text(name))["panels"]:
            at = panel["gridPos"]
            cells = {(at.get("x", 0) + dx, at.get("y", 0) + dy) for dx in range(at["w"]) for dy in range(at["h"])}
            assert max(x for x, _ in cells) < 24
            assert not cells & taken, panel["title"]
            taken |= cells


def test_the_objectives_drawn_are_those_of_the_rules() -> None:
    rules = RULES.read_text()
    assert dashboards.OBJECTIVE_SECONDS in BUCKETS and f'le="{dashboards.OBJECTIVE_SECONDS}"' in rules
    assert f"14.4 * {dashboards.FAILED_OBJECTIVE}" in rules and f"14.4 * {dashboards.SLOW_OBJECTIVE}" in rules


def test_grafana_finds_source_and_dashboards() -> None:
    """The names that provisioning, dashboards and docker-compose.yml share."""
    provisioning = FOLDER / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    assert (source["uid"], source["type"]) == (dashboards.SOURCE.uid, dashboards.SOURCE.type_val)
    path = yaml.safe_load((provisioning / "dashboards" / "slatewise.yml").read_text())["providers"][0]["options"][
        "path"
    ]
    compose = yaml.safe_load((FOLDER.parent.parent / "docker-compose.yml").read_text())
    assert f"./deploy/grafana/dashboards:{path}:ro" in compose["services"]["grafana"]["volumes"]
    assert "./deploy/grafana/provisioning:/etc/grafana/provisioning:ro" in compose["services"]["grafana"]["volumes"]
    scrape = yaml.safe_load((FOLDER.parent / "prometheus" / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape, "$__rate_interval follows it"


def test_the_last_report_is_of_these_panels_and_found_nothing_wrong() -> None:
    report = (FOLDER.parent.parent / "docs" / "dashboards" / "report.md").read_text()
    queries = sum(len(panel["targets"]) for _, panel in panels())
    assert (
        f"**{len(panels())} panels with {queries} queries, 0 without data; 0 things not as they should be.**" in report
    ), "run: make dashboards-check"
