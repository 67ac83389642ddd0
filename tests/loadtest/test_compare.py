"""The comparison of two servers: its requests cover the format, and it finds differences."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest.compare import speed
from loadtest.compare.__main__ import main, read_card, server
from loadtest.compare.equality import Comparison, differing_members, read_answer
from loadtest.compare.requests import Card, CaseWriter
from loadtest.compare.speed import Load, Measurement
from loadtest.server_process import RunningServer
from loadtest.workload import Shape, Workload
from slatewise.schemas import RankRequest
from slatewise.settings import Settings
from tests.conftest import HERE, Tiny
from tests.support.application import serve


def port_of(client: httpx.Client) -> int:
    return client.base_url.port or 0


@pytest.fixture
def card(client: httpx.Client) -> Card:
    server = RunningServer(port_of(client))
    return read_card(server, server, "tiny")


@pytest.fixture
def writer(tiny: Tiny, card: Card) -> CaseWriter:
    return CaseWriter(Workload(tiny.root), card, seed=1)


def test_cases_cover_the_request_format(writer: CaseWriter) -> None:
    requests = [RankRequest.model_validate_json(writer.case("fp32", "point").cold) for _ in range(300)]
    events = [len(request.history.item_ids) for request in requests]
    candidates = [len(request.candidates.item_ids) for request in requests]
    known = set(writer.known_users)
    assert min(events) == 0 and max(events) > writer.card.history_used
    assert min(candidates) == 1 and max(candidates) > 200
    assert {request.user in known for request in requests if request.user} == {True, False}
    assert {(request.variant, request.exit) for request in requests} == {("fp32", "point")}
    for present in (
        lambda request: request.user,
        lambda request: request.head_weights,
        lambda request: request.history.offset,
        lambda request: request.history.actions,
        lambda request: request.history.timestamps,
        lambda request: request.candidates.fields or not writer.card.fields,
        lambda request: any(None in column for column in request.candidates.features.values()),
        lambda request: any(name.startswith("unknown-") for name in request.candidates.item_ids),
    ):
        assert sum(bool(present(request)) for request in requests) > 0


def test_cases_with_same_seed_are_equal(tiny: Tiny, card: Card) -> None:
    one, two = (CaseWriter(Workload(tiny.root), card, seed=3) for _ in range(2))
    assert [one.case("fp32", "set") for _ in range(5)] == [two.case("fp32", "set") for _ in range(5)]


def test_extended_case_appends_events_only(writer: CaseWriter) -> None:
    for _ in range(50):
        case = writer.case("fp32", "set")
        first = json.loads(case.cold)
        extended = json.loads(case.extended)
        before = first.pop("history")
        after = extended.pop("history")
        assert first == extended
        assert len(after["item_ids"]) > len(before["item_ids"])
        for name, column in before.items():
            assert after[name] == column if name == "offset" else after[name][: len(column)] == column


def test_equal_servers_have_no_differences(tiny: Tiny, client: httpx.Client, writer: CaseWriter) -> None:
    with serve(Settings(bundles=tiny.root, max_candidates=2000, max_history=1000)) as second:
        comparison = Comparison((port_of(client), port_of(second)))
        comparison.run(writer, 4)
    assert comparison.answers == 4 * 3 * len(writer.card.variants) * len(writer.card.exits)
    assert comparison.different == 0
    caches = {key for tally in comparison.tallies.values() for key in tally.caches}
    assert {("cold", "miss"), ("kept", "hit"), ("extended", "extended")} <= caches
    assert not {("cold", "hit"), ("cold", "extended"), ("kept", "miss")} & caches
    assert comparison.report().endswith("answers, 0 different")


def test_servers_with_other_cache_state_are_different(tiny: Tiny, client: httpx.Client, card: Card) -> None:
    """One server twice: its second answer to a cold request comes from the cache."""
    comparison = Comparison((port_of(client), port_of(client)))
    comparison.run(CaseWriter(Workload(tiny.root, seed=2), card, seed=2), 4)
    assert comparison.different > 0
    assert set(comparison.members) == {"history"}
    assert f"{comparison.different} different" in comparison.report()


def answer(**members: Any) -> dict[str, Any]:
    content = {
        "id": "a",
        "version": 1,
        "timings_ms": {"total": 1.0},
        "results": {"scores": [0.1], "heads": {"x": [0.2]}},
    }
    return read_answer(json.dumps(content | members).encode())


@pytest.mark.parametrize(
    ("members", "different"),
    [
        ({"id": "b", "version": 2, "timings_ms": {}}, []),
        ({"results": {"scores": [0.10000000000000002], "heads": {"x": [0.2]}}}, ["results.scores"]),
        ({"results": {"scores": [0.1], "heads": {"x": [0.3]}}}, ["results.heads"]),
        ({"results": {"scores": None, "heads": {"x": [0.2]}}}, ["results.scores"]),
        ({"exit": "dot"}, ["exit"]),
        ({"meta_embedding": {"status": "hit"}}, ["meta_embedding"]),
    ],
)
def test_differing_members_name_each_difference(members: dict[str, Any], different: list[str]) -> None:
    assert differing_members(answer(), answer(**members)) == different


def test_number_with_other_text_is_different() -> None:
    one = read_answer(b'{"results": {"scores": [0.1]}}')
    two = read_answer(b'{"results": {"scores": [0.10]}}')
    assert differing_members(one, two) == ["results.scores"]


def test_refused_request_raises(client: httpx.Client, writer: CaseWriter) -> None:
    with pytest.raises(ValueError, match="status 422"):
        Comparison((port_of(client), port_of(client))).run(WrongWriter(writer), 1)


class WrongWriter(CaseWriter):
    def __init__(self, writer: CaseWriter) -> None:
        super().__init__(writer.workload, writer.card, 0)

    def history(self, events: int) -> dict[str, Any]:
        return {"item_ids": [None] * events}


def test_server_does_not_inherit_slatewise_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLATEWISE_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    found = server("env python -m slatewise serve", tmp_path, ["PYTHONPATH=app:models"])
    assert found.environment["PYTHONPATH"] == "app:models"
    assert "SLATEWISE_THREADS" not in found.environment
    assert found.environment["SLATEWISE_PORT"] == str(found.port)
    assert found.folder == tmp_path


def options(tiny: Tiny) -> list[str]:
    found = ["--bundles", str(tiny.root)]
    for side in ("a", "b"):
        found += [f"--{side}", f"{sys.executable} -m slatewise serve", f"--{side}-folder", str(HERE.parent)]
        found += [f"--{side}-env", "PYTHONPATH=app:models", f"--{side}-env", f"SLATEWISE_BUNDLES={tiny.root}"]
    return found


def test_command_compares_two_server_processes(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    main([*options(tiny), "--requests", "1"])
    assert capsys.readouterr().out.endswith("answers, 0 different\n")


def test_speed_command_prints_ratios(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    main([*options(tiny), "--speed", "--requests", "6", "--rounds", "2", "--history", "8", "--candidates", "5"])
    assert "| CPU a request, ms |" in capsys.readouterr().out


@pytest.mark.parametrize("users", speed.USERS)
def test_speed_load_draws_its_users(tiny: Tiny, users: str) -> None:
    load = Load(Shape(8, 5), 90, 1, users)
    first, measured = load.draw(Workload(tiny.root))
    before, during = (
        [json.loads(request.partition(b"\r\n\r\n")[2])["user"] for request in requests]
        for requests in (first, measured)
    )
    assert len(during) == 90
    known = {"mixed": 45, "distinct": 90, "returning": speed.KNOWN_USERS}[users]
    assert len(set(during)) == known
    assert set(before) == (set(during) if users == "returning" else set())


def test_speed_report_has_ratio_of_each_round() -> None:
    rng = random.Random(0)
    same = (1.0, 1.0, 1.0)
    found = [
        (Measurement(a, 1.0, *same), Measurement(2 * a, 1.5, *same)) for a in (rng.uniform(1, 9) for _ in range(5))
    ]
    text = speed.report(Load(Shape(200, 200), 10, 1), found)
    assert "2.000 (2.000 to 2.000) |" in text and "1.500 (1.500 to 1.500) |" in text
    text = speed.report(Load(Shape(200, 200), 10, 1), [(Measurement(1, 0.0, *same), Measurement(1, 0.1, *same))])
    assert "nan" in text
