"""The tests to the point of failure: their report and limits, and short runs of those that `make test` has time for."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest.chaos import __main__ as chaos
from loadtest.chaos import fast, outputs, soak, worst_shape
from loadtest.chaos.bundle import small_bundles
from loadtest.chaos.report import Row, as_table, conclude, numbers_in, rows_in
from tests.conftest import HERE

ROWS = [Row("R5", "a | b", "3 ms", True), Row("R27", "none fails", "{200: 3}", False)]


def test_rows_are_read_back_from_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert conclude(ROWS[:1]) == 0 and conclude(ROWS) == 1 and conclude([]) == 1
    assert rows_in(f"Words.\n\n{as_table(ROWS[1:])}\n") == ROWS[1:]
    assert rows_in("| R6 deep JSON | < 100 ms | 3 | 4 ms | passed |\n| x | y | z | fail |") == [
        Row("R6", "< 100 ms", "3; 4 ms", True)
    ]


def result(name: str, markdown: str, code: int) -> dict[str, Any]:
    about = {"commit": "c", "date": "2026-01-01", "machine": "m", "seconds": 1, "about": ""}
    return {"name": name, "markdown": markdown, "code": code} | about


def test_report_has_the_rows_of_all_modules_in_order() -> None:
    results = {"b": result("b", as_table(ROWS[1:]), 1), "a": result("a", as_table([Row("R5", "x", "y", True)]), 0)}
    text, passes = chaos.report(results)
    assert not passes and [row.test for row in rows_in(text.split("## ")[0])] == ["R5", "R27"]
    assert "2 criteria, 1 of them failed" in text and "## a" in text and "exit code 1" in text
    assert chaos.report({"a": results["a"]})[1]


def test_items_below_a_heading_are_rows() -> None:
    text = "## R15: a switch\n\n- pass: none failed\n- FAIL: none mixed\n\n## More\n\n- pass: no row\n"
    assert rows_in(text) == [Row("R15", "none failed", "", True), Row("R15", "none mixed", "", False)]


def test_numbers_of_tests_in_words() -> None:
    assert numbers_in("R5 to R7, R9-R10 and R9; not R, XR3 or R3a") == ["R5", "R6", "R7", "R9", "R10"]


def test_a_module_without_rows_has_one_for_each_number() -> None:
    for code in (0, 1):
        rows = chaos.rows_of(result("a", "| attack | p99 |", code) | {"about": "R5, R6. Sizes."})
        assert [(row.test, row.passed) for row in rows] == [("R5", code == 0), ("R6", code == 0)]
    assert chaos.rows_of(result("a", "", 1))[0].passed is False


@pytest.mark.parametrize(("rows", "code"), [(ROWS[:1], 1), (ROWS, 0)])
def test_rows_that_contradict_the_exit_code_fail(rows: list[Row], code: int) -> None:
    assert not chaos.report({"a": result("a", as_table(rows), code)})[1]
    assert chaos.rows_of(result("a", as_table(rows), code))[-1].test == "-"


def test_results_are_kept_for_a_stopped_run(tmp_path: Path) -> None:
    assert chaos.kept_results(["a"], tmp_path) == {}
    (tmp_path / "a.json").write_text(json.dumps(result("a", "", 0)))
    assert chaos.kept_results(["a", "b"], tmp_path) == {"a": result("a", "", 0)}


def test_every_module_with_a_main_is_run() -> None:
    names = chaos.module_names()
    assert {"fast", "invariance", "outputs", "schema", "soak", "store", "worst_shape"} <= set(names)
    assert not {"bundle", "report", "traffic", "watched_server", "__main__"} & set(names)


def test_every_test_of_the_list_exists() -> None:
    for covered in fast.COVERED:
        for name in covered.tests:
            file, _, function = name.partition("::")
            assert re.search(rf"^(async )?def {function or 'test_'}", (HERE.parent / file).read_text(), re.MULTILINE), (
                name
            )


def test_a_missing_or_failed_test_fails_its_row() -> None:
    covered = fast.Covered("R4", "c", ("tests/a.py", "tests/b.py::test_b"))
    good: dict[str, bool | None] = {"tests/a.py::test_a": True, "tests/a.py::test_c": None, "tests/b.py::test_b": True}
    assert fast.row(covered, good).passed
    assert not fast.row(covered, good | {"tests/b.py::test_b": False}).passed
    assert not fast.row(covered, {"tests/a.py::test_a": True}).passed


def samples(mb: Any) -> list[soak.Sample]:
    return [soak.Sample(k * 1_000, mb(k), 20, 3, 6) for k in range(1, 201)]


def test_slope_and_growth_are_those_of_the_second_half() -> None:
    flat = samples(lambda k: 100 + min(k, 60) + k % 3)
    assert abs(soak.slope(flat)) < 0.1 and abs(soak.growth(flat)) < 0.01
    growing = samples(lambda k: 100 + 0.02 * k)
    assert soak.slope(growing) == pytest.approx(2.0) and soak.growth(growing) == pytest.approx(0.0157, abs=1e-3)


def test_a_short_soak_answers_all_and_a_leak_fails_it() -> None:
    found = soak.run(1_500, leaks=True)
    assert not found.traffic.wrong and not found.flat
    assert found.after.threads == found.before.threads and found.after.tasks <= found.before.tasks + 8
    assert found.after.descriptors <= found.before.descriptors + soak.MORE_DESCRIPTORS


@pytest.mark.skipif(sys.platform != "linux", reason="the record of the kernel is that of Linux")
def test_a_short_peak_of_memory_is_seen_until_it_is_forgotten() -> None:
    before = worst_shape.peak_mb(os.getpid())
    _short = b"x" * (200 << 20)
    del _short
    peak = worst_shape.peak_mb(os.getpid())
    worst_shape.forget_peak(os.getpid())
    assert peak >= before and worst_shape.peak_mb(os.getpid()) < peak - 100


@pytest.mark.parametrize("script", outputs.STREAMS.values(), ids=list(outputs.STREAMS))
def test_a_failing_output_costs_no_answer(script: str) -> None:
    assert outputs.serve_with(small_bundles(), script, outputs.LINES) == ({200, 202, 400}, 0)
