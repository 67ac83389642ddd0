"""The metrics in the registry: equal to docs/metrics.md, and well formed."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from slatewise import metrics
from slatewise.metrics import STAGES

DOCUMENT = Path(__file__).parent.parent / "docs" / "metrics.md"
LABELS = {
    "endpoint",
    "ranker",
    "version",
    "variant",
    "code",
    "stage",
    "reason",
    "outcome",
    "exit",
    "result",
    "command",
    "kind",
    "size",
    "field",
    "key",
}  # no ids
METRICS = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]
KINDS: dict[type, str] = {Counter: "counter", Gauge: "gauge", Histogram: "histogram"}


def name_of(metric: MetricWrapperBase) -> str:
    """The name as scraped: counters end in _total."""
    return metric._name + ("_total" if isinstance(metric, Counter) else "")


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without its header."""
    section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert section, heading
    table = [line.strip().strip("|") for line in section[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")] for line in table[2:]]


def test_document_and_registry_list_the_same_metrics() -> None:
    documented = [row[0].strip("`") for row in rows("Metrics")]
    assert len(documented) == len(set(documented))
    assert set(documented) == {name_of(metric) for metric in METRICS}


@pytest.mark.parametrize("metric", METRICS, ids=name_of)
def test_document_gives_type_labels_and_meaning(metric: MetricWrapperBase) -> None:
    row = next(row for row in rows("Metrics") if row[0].strip("`") == name_of(metric))
    assert row[1] == KINDS[type(metric)]
    assert re.findall(r"`(\w+)`", row[2]) == list(metric._labelnames)
    assert row[3].endswith(".")


def test_document_lists_the_stages_in_order() -> None:
    assert tuple(row[0].strip("`") for row in rows("Stages")) == STAGES


def test_all_metrics_are_declared_in_one_module() -> None:
    ours = {family.name for family in REGISTRY.collect() if family.name.startswith("slatewise")}
    assert ours == {metric._name for metric in METRICS}


@pytest.mark.parametrize("metric", METRICS, ids=name_of)
def test_metric_name_labels_and_help_follow_the_rules(metric: MetricWrapperBase) -> None:
    assert re.fullmatch(r"slatewise_[a-z_]+", name_of(metric))
    assert not re.search(r"_(ms|milliseconds|kb|mb|percent)(_|$)", name_of(metric)), "base units"
    assert set(metric._labelnames) <= LABELS
    assert metric._documentation.endswith(".")


@pytest.mark.parametrize("metric", [metric for metric in METRICS if isinstance(metric, Histogram)], ids=name_of)
def test_histogram_buckets_ascend_to_infinity(metric: Histogram) -> None:
    assert all(low < high for low, high in pairwise(metric._upper_bounds))
    assert metric._upper_bounds[-1] == float("inf")


def test_objective_of_50_ms_is_a_bucket_edge() -> None:
    assert 0.05 in metrics.DURATION._upper_bounds
    assert metrics.DURATION._upper_bounds == metrics.STAGE._upper_bounds


@pytest.mark.parametrize(
    ("name", "label", "values"),
    [
        ("slatewise_stage_duration_seconds_count", "stage", STAGES),
        ("slatewise_ranking_duration_seconds_count", "size", ("up to 100", "101 to 500", "501 to 2000", "over 2000")),
        ("slatewise_degraded_total", "reason", ("deadline", "overload", "exit", "store_error")),
        (
            "slatewise_rejected_total",
            "reason",
            ("key", "key_tries", "key_in_flight", "key_rate", "in_flight", "event_loop", "queue"),
        ),
        ("slatewise_history_cache_total", "result", ("hit", "extended", "miss", "none")),
        (
            "slatewise_embedding_lookups_total",
            "result",
            ("hit_local", "hit_redis", "miss", "miss_local", "stale", "mismatched", "corrupt", "error"),
        ),
    ],
)
def test_series_of_closed_label_lists_exist_at_start(name: str, label: str, values: tuple[str, ...]) -> None:
    """rate() does not see the first increase of a new series."""
    assert all(REGISTRY.get_sample_value(name, {label: value}) is not None for value in values)


def test_no_metric_has_a_created_series() -> None:
    text = generate_latest().decode()
    assert "slatewise_requests_total" in text
    assert not re.search(r"^slatewise_\w+_created", text, re.MULTILINE)
