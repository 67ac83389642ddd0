"""The cells and the soak test of a server: arithmetic and reports."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from loadtest.server import cells, report, soak
from loadtest.server_process import RunningServer
from loadtest.workload import Shape, Workload
from tests.conftest import Tiny


@pytest.fixture
def workload(tiny: Tiny) -> Workload:
    return Workload(tiny.root, seed=1)


METRICS = """# TYPE slatewise_stage_duration_seconds histogram
slatewise_stage_duration_seconds_bucket{le="0.5",stage="parse"} 7.0
slatewise_stage_duration_seconds_count{stage="parse"} 7.0
slatewise_stage_duration_seconds_sum{stage="parse"} 1.0
slatewise_stage_duration_seconds_sum{stage="score"} 2e0
slatewise_request_duration_seconds_count{endpoint="/rerank",ranker="r",variant="fp32"} 3.0
slatewise_request_duration_seconds_sum{endpoint="/rerank",ranker="r",variant="fp32"} 4.0
slatewise_request_duration_seconds_count{endpoint="/rerank",ranker="r",variant=""} 1.0
slatewise_request_duration_seconds_sum{endpoint="/rerank",ranker="r",variant=""} 0.5
slatewise_request_duration_seconds_created{endpoint="/rerank",ranker="r",variant=""} 1.7e9
"""


def test_durations_sum_stages_and_requests() -> None:
    assert cells.durations(METRICS) == {"parse": 1.0, "score": 2.0, "sum": 4.5, "count": 4.0}


def test_breakdown_uses_the_difference_of_two_scrapes() -> None:
    after = {"parse": 1.2, "score": 2.5, "encode": 0.1, "sum": 5.5, "count": 6.0}
    result = cells.breakdown(cells.durations(METRICS), after)
    assert result == {
        "stage_means_ms": {"parse": 100.0, "score": 250.0, "encode": 50.0, "request": 500.0},
        "stages_share": 0.8,
    }


def test_describe_answers_counts_exits_and_cache_results() -> None:
    bodies = [
        json.dumps(
            {
                "exit": exit,
                "degraded": degraded,
                "history": {"cache": "miss"},
                "timings_ms": {"parse": parse, "total": 9.0},
            }
        ).encode()
        for exit, degraded, parse in (
            ("set", [], 1.0),
            ("set", [], 2.0),
            ("dot", ["exit", "overload"], 9.0),
            ("set", [], 3.0),
        )
    ]
    assert cells.describe_answers(bodies) == {
        "degraded_share": 0.25,
        "exits": {"set": 3, "dot": 1},
        "cache": {"miss": 4},
        "stage_medians_ms": {"parse": 2.5, "total": 9.0},
    }
    assert cells.describe_answers([]) == {}


def test_soak_slope_ignores_the_first_third() -> None:
    samples = [(0.0, 100.0), (600.0, 300.0), (1_200.0, 400.0), (2_400.0, 401.0), (3_600.0, 402.0)]
    assert soak.after_first_third(samples) == samples[2:]
    assert soak.slope(soak.after_first_third(samples)) == pytest.approx(3.0)
    assert soak.slope([(1.0, 5.0)]) == 0.0


def test_expensive_cells_have_fewer_requests(workload: Workload) -> None:
    bench = cells.Bench(RunningServer(0), workload, 500)
    assert bench.count(Shape(50, 20)) == bench.count(cells.W) == 500
    assert bench.count(Shape(2_048, 200)) == 101
    assert bench.count(Shape(256, 4_096)) == 52
    assert cells.Bench(RunningServer(0), workload, 4).count(Shape(256, 4_096)) == 4


def test_table_has_one_row_for_each_cell() -> None:
    columns = {"a": report.key("a"), "deep": report.key("b", "c")}
    rows = [{"a": 1, "b": {"c": {200: 3}}}, {"a": None}]
    assert report.table_of(columns, rows) == "| a | deep |\n| --- | --- |\n| 1 | 200: 3 |\n|  |  |"


def test_every_group_of_cells_is_measured_and_reported(
    client: httpx.Client, workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tiny ranker, a real server and small shapes. No assertion depends on speed."""
    monkeypatch.setattr(cells, "HISTORIES", (50, 300))
    monkeypatch.setattr(cells, "CANDIDATES", (20,))
    monkeypatch.setattr(cells, "EXPENSIVE", Shape(10, 1_500))
    bench = cells.Bench(RunningServer(client.base_url.port or 0), workload, 8)
    rows = [row for group in cells.GROUPS.values() for row in group(bench)]
    assert {row["group"] for row in rows} == set(cells.GROUPS)
    assert all(set(row["statuses"]) == {200} and row["per_second"] > 0 for row in rows)
    assert all("cpu_ms" not in row and "resident_mb" not in row for row in rows)  # not a child process
    kept = {row["users"]: set(row["cache"]) for row in rows if row["connections"] == 1 and row["loop"] == "closed"}
    assert kept["new"] == {"miss"}
    assert kept["returning"] == {"hit"}
    # The tiny ranker reads fewer events than W has, so its window moves and some requests are misses.
    assert "extended" in kept["growing"]
    for row in rows:
        if "stages_share" in row:
            assert 0 < row["stages_share"] <= 1.001  # stages are parts of a request and do not overlap
        json.dumps(row)
    concurrent = [row for row in rows if row.get("concurrent")]
    assert [row["candidates"] for row in concurrent] == [20, 1_500, 20, 1_500]
    report.write(tmp_path, ["a machine"], rows)
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.md",
        "sizes.png",
        "users.png",
        "open.png",
        "mixed.png",
        "stages.png",
    }
    assert (tmp_path / "report.md").read_text().count("\n| returning |") == 2 * 8  # in two tables


def test_soak_plot_is_written(tmp_path: Path) -> None:
    report.plot_soak(
        {"requests": 9, "largest_mb": 20.0}, [(0.0, 10.0), (1.0, 15.0), (2.0, 20.0)], tmp_path / "soak.png"
    )
    assert (tmp_path / "soak.png").stat().st_size > 1_000
