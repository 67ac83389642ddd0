"""The comparison with other servers: the choice of set-ups, kept cells, the report, the allocator, wrk's script."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtest.client import post
from loadtest.peers import allocator, cross_check
from loadtest.peers.__main__ import another_round_fits, arguments, names
from loadtest.peers.choice import best_cells, best_setup
from loadtest.peers.contenders import PEERS, Contender, peer_server
from loadtest.peers.environments import ROOT
from loadtest.peers.kept import Kept
from loadtest.peers.measurements import EXACT, Cell, Entry
from loadtest.peers.report import Cells, choices, cross_checked, ratios, side_by_side
from tests.conftest import HERE
from tests.support.network import free_port

TEXTBOOK = Entry("fastapi", "rank")
OTHER = Entry("mlserver", "rank")


def cell(entry: Entry, per_second: float, **values: Any) -> Cell:
    default = Cell(
        phase="measurement",
        round=0,
        name=entry.name,
        graph=entry.graph,
        setup=None if entry == EXACT else "2 x 1",
        users="distinct",
        connections=4,
        requests=300,
        per_second=per_second,
        p50_ms=1e3 / per_second,
        p99_ms=2e3 / per_second,
        cpu_ms=1.5e3 / per_second,
        resident_mb=100.0,
    )
    return replace(default, **values)


def chosen_from(**runs: list[float]) -> list[Cell]:
    return [
        cell(TEXTBOOK, value, phase="choice", round=turn, setup=setup.replace("_", " "), connections=connections)
        for setup, values in runs.items()
        for connections in (4, 1)
        for turn, value in enumerate(values)
    ]


def test_each_peer_has_one_thread_and_two_workers_among_its_setups() -> None:
    for peer in PEERS.values():
        assert {"1 x 1", "1 x 2", "2 x 1", "2 x 2"} <= {str(setup) for setup in peer.setups()}


def test_the_best_run_of_a_setup_counts() -> None:
    cells = chosen_from(**{"1_x_2": [90.0, 91.0], "2_x_1": [60.0, 100.0]})
    assert best_setup(cells, TEXTBOOK, 4) == "2 x 1"
    assert {setup: found.per_second for setup, found in best_cells(cells, TEXTBOOK, 4).items()} == {
        "1 x 2": 91.0,
        "2 x 1": 100.0,
    }


def test_one_connection_is_chosen_by_p50() -> None:
    cells = [
        cell(TEXTBOOK, 50.0, phase="choice", connections=1, setup="1 x 1", p50_ms=8.0),
        cell(TEXTBOOK, 40.0, phase="choice", connections=1, setup="1 x 2", p50_ms=7.0),
    ]
    assert best_setup(cells, TEXTBOOK, 1) == "1 x 2"


def test_the_choice_ignores_other_peers_and_the_measurement() -> None:
    cells = [
        *chosen_from(**{"1_x_1": [50.0]}),
        cell(OTHER, 99.0, phase="choice", setup="1 x 2"),
        cell(Entry("fastapi", "straightforward"), 98.0, phase="choice", setup="2 x 2"),
        cell(TEXTBOOK, 97.0),
    ]
    assert best_cells(cells, TEXTBOOK, 4).keys() == {"1 x 1"}


def test_a_stopped_run_continues_with_its_cells(tmp_path: Path) -> None:
    labels = {"commit": "abc", "requests": 300}
    first = Kept(tmp_path, labels)
    first.add([cell(TEXTBOOK, 50.0, phase="choice", setup="1 x 1")])
    again = Kept(tmp_path, labels)
    assert again.cells == first.cells
    assert again.date == first.date
    assert again.has(phase="choice", name="fastapi", setup="1 x 1")
    assert not again.has(phase="measurement", round=0)


def test_cells_that_a_killed_run_was_writing_are_not_read(tmp_path: Path) -> None:
    kept = Kept(tmp_path, {"commit": "abc"})
    kept.add([cell(TEXTBOOK, 50.0)])
    (tmp_path / "cells.part").write_text((tmp_path / "cells.jsonl").read_text() + '{"phase": "mea')
    again = Kept(tmp_path, {"commit": "abc"})
    assert again.cells == kept.cells
    again.add([cell(TEXTBOOK, 60.0)])
    assert len(Kept(tmp_path, {"commit": "abc"}).cells) == 2


@pytest.mark.parametrize("commits", [("abc", "abd"), ("abc+", "abc+")])
def test_another_or_a_changed_commit_begins_anew(tmp_path: Path, commits: tuple[str, str]) -> None:
    Kept(tmp_path, {"commit": commits[0]}).add([cell(TEXTBOOK, 50.0)])
    assert Kept(tmp_path, {"commit": commits[1]}).cells == []
    assert not (tmp_path / "cells.jsonl").exists()


def measured() -> Cells:
    rows = []
    for turn, speed in enumerate((1.0, 2.0, 4.0)):  # the machine gets faster; the ratios stay
        rows += [
            cell(EXACT, 80 * speed, round=turn),
            cell(EXACT, 80 * speed, round=turn, connections=1),
            cell(EXACT, 160 * speed, round=turn, users="returning"),
            cell(EXACT, 120 * speed, round=turn, users="growing"),
            cell(TEXTBOOK, 100 * speed, round=turn),
            cell(TEXTBOOK, 100 * speed, round=turn, connections=1),
            cell(OTHER, 90 * speed, round=turn, cpu_ms=10 / speed),
            cell(OTHER, 90 * speed, round=turn, connections=1),
        ]
    return Cells(rows, [EXACT], [TEXTBOOK, OTHER])


def test_side_by_side_shows_cpu_beside_requests_a_second() -> None:
    lines = side_by_side(measured()).splitlines()
    assert lines[0].split(" | ")[3:5] == ["req/s", "CPU ms a request"]
    cells = ("FastAPI, rank", "distinct", "2 x 1", "200.0 (100.0 to 400.0)", "7.5 (3.8 to 15.0)", "5.0", "10.0", "100")
    assert lines[3] == f"| {' | '.join((*cells, '2 x 1', '5.0 (2.5 to 10.0)'))} |"
    assert [line.split(" | ")[1] for line in lines[5:]] == ["returning", "growing"]


def test_ratios_compare_with_the_best_peer_of_each_value() -> None:
    text = ratios(measured())
    assert "| fp32 | req/s at 4 connections, the peer on rank | FastAPI | 0.80 | 0.80 to 0.80 |" in text
    assert "| fp32 | CPU a request at 4 connections, the peer on rank | MLServer | 1.88 | 1.88 to 1.88 |" in text
    assert "our users returning, the peer on rank | FastAPI | 1.60 |" in text


def test_choices_show_every_setup() -> None:
    text = choices(chosen_from(**{"1_x_1": [50.0, 40.0], "2_x_1": [80.0, 100.0]}), [TEXTBOOK])
    assert text.splitlines()[2:] == [
        "| FastAPI, rank | 1 x 1 | 50.0 | 30.0 | 20.0 |",
        "| FastAPI, rank | 2 x 1 | 100.0 | 15.0 | 10.0 |",
    ]


def test_cross_check_prints_both_and_their_ratio() -> None:
    cells = [cell(EXACT, 100.0, phase="closed loop", round=turn) for turn in range(3)]
    assert cross_checked(cells) == "Cross-check with wrk: left out, because the machine has no wrk."
    cells += [cell(EXACT, 104.0 + turn, phase="wrk", round=turn) for turn in range(3)]
    text = cross_checked(cells)
    assert "| closed loop | 100.0 (100.0 to 100.0) |" in text
    assert "| wrk | 105.0 (104.0 to 106.0) |" in text
    assert "| wrk / closed loop | 1.050 |" in text


def test_a_round_begins_only_if_it_ends_in_time() -> None:
    assert another_round_fits(590.0, [], 600.0)
    assert another_round_fits(480.0, [90.0, 120.0], 600.0)
    assert not another_round_fits(481.0, [90.0, 120.0], 600.0)


def test_peers_and_graphs_are_named() -> None:
    options = arguments(["--only", "fastapi"])
    assert (options.only, options.graphs, options.variants) == (["fastapi"], ["rank"], ["fp32", "int8", "student"])
    with pytest.raises(argparse.ArgumentTypeError, match="unknown: nginx; known: fastapi, bentoml"):
        names(tuple(PEERS), "fastapi,nginx")


def test_every_contender_preloads_the_same_library(tmp_path: Path) -> None:
    found = {
        peer_server(peer, "rank", setup, tmp_path / "log").environment["LD_PRELOAD"]
        for peer in PEERS.values()
        for setup in peer.setups()
    }
    assert found == {allocator.preloaded()}


def test_contenders_have_the_setting_of_the_image() -> None:
    setting = allocator.environment()["MALLOC_CONF"]
    assert f" MALLOC_CONF={setting} " in (ROOT / "Dockerfile").read_text()


@pytest.fixture
def answering(tmp_path: Path) -> Contender:
    port = free_port()
    command = (sys.executable, "-m", "loadtest.server.null_server", str(port), "16")
    return Contender(command, {"PYTHONPATH": os.pathsep.join([str(HERE.parent)])}, port, "/", tmp_path / "log")


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_a_process_with_another_allocator_is_found(answering: Contender, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering:
        processes = [process.pid for process in answering.processes()]
        allocator.check(processes)
        other = "" if allocator.preloaded() else allocator.JEMALLOC
        monkeypatch.setattr(allocator, "preloaded", lambda: other)
        with pytest.raises(RuntimeError, match="does not use"):
            allocator.check(processes)


@pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk")
def test_wrk_sends_the_requests_of_the_file(
    answering: Contender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_check, "SECONDS", 1)
    requests = [post("/", b"x" * size) for size in range(100)] * 2_000
    labels = {name: getattr(cell(EXACT, 1.0), name) for name in ("phase", "round", "name", "graph", "setup", "users")}
    with answering:
        found = cross_check.measure_with_wrk(answering, requests, tmp_path / "requests", **labels)
        assert 0 < found.requests < len(requests)
        assert found.per_second > 0
        assert 0 < found.p50_ms <= found.p99_ms
        with pytest.raises(RuntimeError, match="of 5 requests"):
            cross_check.measure_with_wrk(answering, requests[:5], tmp_path / "requests", **labels)
    assert not (tmp_path / "requests").exists()
