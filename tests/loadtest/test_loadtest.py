"""The load generator: what it sends, what it counts, and the arithmetic of its reports."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest import cells, report, soak
from loadtest.client import Outcome, ask, closed_loop, connect, lasting, open_loop, post
from loadtest.server import Running
from loadtest.traffic import visits
from loadtest.workload import Shape, Workload
from slatewise.schemas import RankRequest
from tests.conftest import Tiny

SMALL = Shape(6, 4)


def answer(body: bytes = b"{}", status: int = 200) -> bytes:
    return f"HTTP/1.1 {status} OK\r\nserver: test\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def listening(reply: Callable[[socket.socket, bytes], bool]) -> Iterator[int]:
    """A server that calls `reply` with each request's body until it says False; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def talk(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            while line := stream.readline():
                length = 0
                while line.strip():
                    if line.lower().startswith(b"content-length:"):
                        length = int(line[15:])
                    line = stream.readline()
                if not reply(connection, stream.read(length)):
                    return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def echo(connection: socket.socket, body: bytes) -> bool:
    connection.sendall(answer(body))
    return True


def test_an_answer_may_come_in_any_pieces() -> None:
    def in_pieces(connection: socket.socket, body: bytes) -> bool:
        data = answer(body)
        for k in range(0, len(data), 7):  # within the head, the blank line and the body
            connection.sendall(data[k : k + 7])
            time.sleep(0.001)
        return True

    with listening(in_pieces) as port, connect(port) as connection:
        for body in (b"", b"x", b'{"a": "' + b"y" * 60 + b'"}'):
            assert ask(connection, post("/rerank", body)) == (200, body)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort"])
def test_a_closed_connection_raises(sent: bytes) -> None:
    def hang_up(connection: socket.socket, _: bytes) -> bool:
        connection.sendall(sent)
        return False

    with listening(hang_up) as port:
        with connect(port) as connection, pytest.raises(OSError, match="closed the connection"):
            ask(connection, post("/rerank", b"{}"))
        with pytest.raises(OSError, match="closed the connection"):  # out of the threads, to the caller
            closed_loop(port, [post("/rerank", b"{}")] * 3, 2)


def test_an_answer_without_a_length_raises() -> None:
    def endless(connection: socket.socket, _: bytes) -> bool:
        connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")
        return True

    with (
        listening(endless) as port,
        connect(port) as connection,
        pytest.raises(OSError, match="without Content-Length"),
    ):
        ask(connection, post("/rerank", b"{}"))


def test_a_closed_loop_asks_everything_once_and_counts_by_status() -> None:
    seen: list[bytes] = []

    def some_fail(connection: socket.socket, body: bytes) -> bool:
        seen.append(body)
        connection.sendall(answer(body, 503 if body == b"3" else 200))
        return True

    bodies = [str(k).encode() for k in range(20)]
    with listening(some_fail) as port:
        outcome = closed_loop(port, [post("/rerank", body) for body in bodies], 4, keep_bodies=True)
        assert sorted(seen) == sorted(bodies)
        assert dict(outcome.statuses) == {200: 19, 503: 1}
        assert sorted(outcome.bodies) == sorted(set(bodies) - {b"3"})
        assert len(outcome.latencies) == 20
        assert closed_loop(port, (post("/rerank", body) for body in bodies), 4).bodies == []  # a generator is as good


def test_open_loop_latency_counts_from_the_due_time() -> None:
    pause = 0.05

    def slow(connection: socket.socket, body: bytes) -> bool:
        time.sleep(pause)
        return echo(connection, body)

    with listening(slow) as port:
        outcome = open_loop(
            port, [post("/rerank", b"{}")] * 5, per_second=1e6, connections=1
        )  # all due at once, one connection
    for k, latency in enumerate(outcome.latencies):
        assert latency >= (k + 1) * pause - 1e-3


def test_an_open_loop_keeps_its_arrivals() -> None:
    with listening(echo) as port:
        outcome = open_loop(port, [post("/rerank", b"{}")] * 10, per_second=100, connections=2)
    assert outcome.seconds >= 0.03  # the tenth falls due then at the earliest, with this seed
    assert len(outcome.latencies) == 10


def test_lasting_ends() -> None:
    taken = []
    for request in lasting(0.05, itertools.repeat(b"")):
        taken.append(request)
        time.sleep(0.02)
    assert 1 <= len(taken) <= 3
    assert list(lasting(60, [b"a", b"b"])) == [b"a", b"b"]


def test_a_summary_holds_rate_and_quantiles() -> None:
    outcome = Outcome([k / 1e3 for k in range(100, 0, -1)], seconds=2.0)
    outcome.statuses[200] = 100
    assert outcome.summary() == {
        "requests": 100,
        "statuses": {200: 100},
        "per_second": 50.0,
        "p50_ms": 51.0,
        "p95_ms": 96.0,
        "p99_ms": 100.0,
    }


@pytest.fixture
def workload(tiny: Tiny) -> Workload:
    return Workload(tiny.root, seed=1)


def parsed(bodies: list[bytes]) -> list[dict[str, Any]]:
    for body in bodies:
        RankRequest.model_validate_json(body)
    return [json.loads(body) for body in bodies]


def test_distinct_users_are_distinct(workload: Workload) -> None:
    requests = parsed(workload.distinct(SMALL, 5, top_n=2) + workload.distinct(Shape(0, 1), 5))
    assert len({request["user"] for request in requests}) == 10
    assert {len(request["history"]["item_ids"]) for request in requests[:5]} == {6}
    assert {len(request["candidates"]["item_ids"]) for request in requests[:5]} == {4}
    assert {request.get("top_n") for request in requests} == {2, None}


def test_the_seed_decides_all(tiny: Tiny) -> None:
    assert Workload(tiny.root, seed=3).distinct(SMALL, 2) == Workload(tiny.root, "tiny", seed=3).distinct(SMALL, 2)


def test_returning_users_send_the_same_history(workload: Workload) -> None:
    first, rest = map(parsed, workload.returning(SMALL, users=3, rounds=2))
    assert len(first) == 3 and len(rest) == 6
    known = {request["user"]: request for request in first}
    for request in rest:
        assert request["history"] == known[request["user"]]["history"]
        assert request["candidates"] != known[request["user"]]["candidates"]


def test_growing_users_send_one_event_more_each_time(workload: Workload) -> None:
    first, rest = map(parsed, workload.growing(SMALL, users=2, rounds=3))
    histories = {request["user"]: request["history"] for request in first}
    for k, request in enumerate(rest):
        before = histories[request["user"]]
        now = request["history"]
        assert len(now["item_ids"]) == SMALL.history + k // 2 + 1
        assert all(now[column][:-1] == before[column] for column in now)
        histories[request["user"]] = now


@pytest.mark.parametrize("offset", [True, False])
def test_sliding_windows_overlap_in_all_but_one_event(workload: Workload, offset: bool) -> None:
    first, rest = map(parsed, workload.sliding(SMALL, users=2, rounds=3, offset=offset))
    histories = {request["user"]: request["history"] for request in first}
    for request in rest:
        before = histories[request["user"]]
        now = request["history"]
        for column in ("item_ids", "actions", "timestamps"):
            assert len(now[column]) == SMALL.history
            assert now[column][:-1] == before[column][1:]
        assert ("offset" in now) == offset
        if offset:
            assert now["offset"] == before["offset"] + 1
        histories[request["user"]] = now


def test_endless_requests_keep_to_their_limits_and_users_return(workload: Workload) -> None:
    requests = parsed(list(itertools.islice(workload.endless(8, 5), 300)))
    events = {len(request["history"]["item_ids"]) for request in requests}
    candidates = {len(request["candidates"]["item_ids"]) for request in requests}
    assert (min(events), max(events)) == (0, 8)
    assert (min(candidates), max(candidates)) == (1, 5)
    assert 100 < len({request["user"] for request in requests}) < 200


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


def test_durations_of_metrics() -> None:
    assert cells.durations(METRICS) == {"parse": 1.0, "score": 2.0, "sum": 4.5, "count": 4.0}


def test_a_breakdown_is_of_the_difference() -> None:
    after = {"parse": 1.2, "score": 2.5, "encode": 0.1, "sum": 5.5, "count": 6.0}
    result = cells.breakdown(cells.durations(METRICS), after)
    assert result == {
        "stage_means_ms": {"parse": 100.0, "score": 250.0, "encode": 50.0, "request": 500.0},
        "stages_share": 0.8,
    }


def test_what_answers_say_is_counted() -> None:
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
    assert cells.of_answers(bodies) == {
        "degraded_share": 0.25,
        "exits": {"set": 3, "dot": 1},
        "cache": {"miss": 4},
        "stage_medians_ms": {"parse": 2.5, "total": 9.0},
    }
    assert cells.of_answers([]) == {}


def test_the_slope_is_of_the_time_after_the_first_third() -> None:
    samples = [(0.0, 100.0), (600.0, 300.0), (1_200.0, 400.0), (2_400.0, 401.0), (3_600.0, 402.0)]
    assert soak.late(samples) == samples[2:]
    assert soak.slope(soak.late(samples)) == pytest.approx(3.0)
    assert soak.slope([(1.0, 5.0)]) == 0.0


def test_expensive_cells_have_fewer_requests(workload: Workload) -> None:
    bench = cells.Bench(Running(0), workload, 500)
    assert bench.count(Shape(50, 20)) == bench.count(cells.W) == 500
    assert bench.count(Shape(2_048, 200)) == 101
    assert bench.count(Shape(256, 4_096)) == 52
    assert cells.Bench(Running(0), workload, 4).count(Shape(256, 4_096)) == 4


def test_a_table_has_a_row_a_cell() -> None:
    columns = {"a": report.key("a"), "deep": report.key("b", "c")}
    rows = [{"a": 1, "b": {"c": {200: 3}}}, {"a": None}]
    assert report.table(columns, rows) == "| a | deep |\n| --- | --- |\n| 1 | 200: 3 |\n|  |  |"


def test_every_group_is_measured_and_reported(
    client: httpx.Client, workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tiny ranker behind a real server, with small shapes; nothing is asserted about time."""
    monkeypatch.setattr(cells, "HISTORIES", (50, 300))
    monkeypatch.setattr(cells, "CANDIDATES", (20,))
    monkeypatch.setattr(cells, "EXPENSIVE", Shape(10, 1_500))
    bench = cells.Bench(Running(client.base_url.port or 0), workload, 8)
    rows = [row for group in cells.GROUPS.values() for row in group(bench)]
    assert {row["group"] for row in rows} == set(cells.GROUPS)
    assert all(set(row["statuses"]) == {200} and row["per_second"] > 0 for row in rows)
    assert all("cpu_ms" not in row and "resident_mb" not in row for row in rows)  # somebody else's server
    kept = {row["users"]: set(row["cache"]) for row in rows if row["connections"] == 1 and row["loop"] == "closed"}
    assert kept["new"] == {"miss"}
    assert kept["returning"] == {"hit"}
    assert (
        "extended" in kept["growing"]
    )  # and now and then missed: the tiny ranker reads fewer events than W has, so its window moves on
    for row in rows:
        if "stages_share" in row:
            assert 0 < row["stages_share"] <= 1.001  # stages lie within requests, one after another
        json.dumps(row)
    beside = [row for row in rows if row.get("beside")]
    assert [row["candidates"] for row in beside] == [20, 1_500, 20, 1_500]
    report.write(tmp_path, ["a machine"], rows)
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.md",
        "sizes.png",
        "users.png",
        "open.png",
        "mixed.png",
        "stages.png",
    }
    assert (tmp_path / "report.md").read_text().count("\n| returning |") == 2 * 8  # in both tables


def test_a_soak_is_plotted(tmp_path: Path) -> None:
    report.plot_soak(
        {"requests": 9, "largest_mb": 20.0}, [(0.0, 10.0), (1.0, 15.0), (2.0, 20.0)], tmp_path / "soak.png"
    )
    assert (tmp_path / "soak.png").stat().st_size > 1_000


def test_a_light_load_is_of_new_users_and_of_known_ones_whose_history_grows(tiny: Tiny) -> None:
    longest: dict[str, list[str]] = {}
    grown = 0
    for request in itertools.islice(visits(Workload(tiny.root), deadline_ms=50), 600):
        head, _, body = request.partition(b"\r\n\r\n")
        parsed = RankRequest.model_validate_json(body)
        assert f"X-User-ID: {parsed.user}".encode() in head
        assert parsed.deadline_ms == 50 and parsed.user is not None
        before = longest.get(parsed.user, [])
        now = parsed.history.item_ids
        grown += 0 < len(before) < len(now) and now[: len(before)] == before
        longest[parsed.user] = now
    assert 0.3 * 600 < len(longest) < 0.9 * 600
    assert grown > 50
    assert any(user in tiny_users(tiny) for user in longest), "some have a meta-embedding"


def tiny_users(tiny: Tiny) -> set[str]:
    return set(json.loads((tiny.folder / "users.json").read_text()))
