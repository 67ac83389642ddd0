"""The dashboards: queries use existing metrics, panels describe themselves, and the JSON files match the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Histogram

from deploy.grafana import dashboards, objectives
from slatewise.metrics import BUCKETS
from tests.test_metrics import METRICS, name_of

FOLDER = Path(dashboards.__file__).parent
RULES = FOLDER.parent / "prometheus" / "rules.yml"
COMMON = {"job", "instance"}
FOREIGN = {  # from Prometheus itself, and from its client library
    "up": COMMON,
    "ALERTS": {*COMMON, "alertname", "alertstate"},
    "process_cpu_seconds_total": COMMON,
    "process_resident_memory_bytes": COMMON,
    "process_open_fds": COMMON,
    "process_max_fds": COMMON,
    "process_start_time_seconds": COMMON,
}
UNITS = {"none", "s", "reqps", "ops", "bytes", "percentunit"}


def labels_by_sample() -> dict[str, set[str]]:
    """Name of each metric that can be queried -> its labels."""
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
def test_json_files_equal_generated_text(name: str) -> None:
    assert (FOLDER / "dashboards" / f"{name}.json").read_text() == dashboards.text(name), (
        "run: python -m deploy.grafana.dashboards"
    )


def test_folder_has_exactly_four_dashboards() -> None:
    assert (
        {path.stem for path in (FOLDER / "dashboards").iterdir()}
        == set(dashboards.DASHBOARDS)
        == {"overview", "latency", "state", "models"}
    )


@pytest.mark.parametrize("panel", panels(), ids=title)
def test_panel_has_unit_description_and_queries(panel: tuple[str, dict[str, Any]]) -> None:
    _, content = panel
    assert content["fieldConfig"]["defaults"]["unit"] in UNITS
    assert content["description"].endswith((".", "?"))
    assert len(content["description"]) > 15
    assert content["targets"]


@pytest.mark.parametrize("panel", panels(), ids=title)
def test_panel_queries_use_existing_metrics_and_labels(panel: tuple[str, dict[str, Any]]) -> None:
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
def test_panel_queries_aggregate_rates_over_replicas(panel: tuple[str, dict[str, Any]]) -> None:
    """Sums of rates, quantiles of summed buckets, windows that follow the zoom, only the selected replicas."""
    for target in panel[1]["targets"]:
        expr = target["expr"]
        assert set(re.findall(r"\[([^\]]*)\]", expr)) <= {"$__rate_interval"}
        assert not re.search(r"\b(?:rate|increase)\s*\(\s*sum", expr)
        for argument in re.findall(r"histogram_quantile\([\d.]+, (.*)", expr):
            assert re.match(r"sum by \(le\b[^)]*\) \(rate\(", argument)
        for name in re.findall(r"\b(slatewise_\w+_(?:total|bucket|count|sum))\{", expr):
            assert re.search(rf"\b(?:rate|increase)\({name}\{{", expr), "show a counter as a rate"
        for matchers in re.findall(r"\b(?:slatewise|process)_\w+\{([^}]*)\}", expr):
            assert matchers.startswith('instance=~"$instance"')


def test_panels_do_not_overlap_and_fit_the_width() -> None:
    for name in dashboards.DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(dashboards.text(name))["panels"]:
            at = panel["gridPos"]
            cells = {(at.get("x", 0) + dx, at.get("y", 0) + dy) for dx in range(at["w"]) for dy in range(at["h"])}
            assert max(x for x, _ in cells) < 24
            assert not cells & taken, panel["title"]
            taken |= cells


def test_dashboard_objectives_equal_alert_rules() -> None:
    rules = RULES.read_text()
    assert objectives.OBJECTIVE_SECONDS in BUCKETS and f'le="{objectives.OBJECTIVE_SECONDS}"' in rules
    assert f"14.4 * {objectives.FAILED_OBJECTIVE}" in rules and f"14.4 * {objectives.SLOW_OBJECTIVE}" in rules


def test_grafana_provisioning_matches_dashboards_and_compose() -> None:
    """Provisioning, dashboards and docker-compose.yml agree on names and paths."""
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
    assert source["jsonData"]["timeInterval"] == scrape, "$__rate_interval is derived from it"


def test_dashboards_report_is_current_and_clean() -> None:
    report = (FOLDER.parent.parent / "docs" / "dashboards" / "report.md").read_text()
    queries = sum(len(panel["targets"]) for _, panel in panels())
    assert f"**{len(panels())} panels with {queries} queries, 0 without data; 0 failed checks.**" in report, (
        "run: make dashboards-check"
    )
