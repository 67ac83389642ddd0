"""Requests that a server captured, and rows that it logged as JSON lines, train as they are."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest

from slatewise.http.capture import Capture, appending, capture_line
from slatewise.http.line_writer import LineWriter
from slatewise.inference.arrays import FIRST_ITEM
from slatewise.schemas import RankRequest
from slatewise_train.config import DataConfig, Head, TablesConfig
from slatewise_train.data import Data, load_data
from slatewise_train.meta.changed_users import Events
from slatewise_train.tables import files
from slatewise_train.tables.capture import capture_events

NEXT = (Head("next", "next", 1.0),)


def captured(user: str | None, time: float, history: list[tuple], candidates: str) -> str:
    """The line of a request. history: (item, time) or (item, time, action)."""
    columns = list(zip(*history, strict=True)) or [(), ()]
    request = {
        "user": user,
        "request_time": time,
        "history": dict(zip(("item_ids", "timestamps", "actions"), map(list, columns), strict=False)),
        "candidates": {"item_ids": list(candidates), "features": {"price": [1.5] * len(candidates)}},
    }
    return capture_line(RankRequest.model_validate(request), time, b"key")


def load(path: Path, *history: str) -> Data:
    return load_data(DataConfig("shop", NEXT), TablesConfig(str(path), history_actions=history))


def slates_of(data: Data) -> list[tuple[int, str, list[float]]]:
    e = data.exposures
    assert e is not None
    names = data.catalogue.vocabulary.items
    return [
        (
            int(e.history[s]),
            "".join(names[row - FIRST_ITEM] for row in e.items[e.offsets[s] : e.offsets[s + 1]]),
            e.labels[e.offsets[s] : e.offsets[s + 1], 0].tolist(),
        )
        for s in range(len(e))
    ]


def test_captured_requests_become_events_and_slates(tmp_path: Path) -> None:
    lines = [
        captured("u", 1_000, [("a", 900, "view")], "bcd"),
        captured("u", 2_000, [("a", 900, "view"), ("c", 1_100, "buy")], "bde"),
        captured("u", 400_000, [("c", 1_100, "buy"), ("b", 2_000, "view"), ("d", 300_000, "view")], "fg"),
        captured(None, 500, [], "ab"),
        captured("w", 600, [], "ab"),
    ]
    path = tmp_path / "capture.jsonl"
    path.write_text("\n".join(lines) + "\n")
    data = load(path, "view", "buy")
    assert len(data.sequences.users) == 1, "a request without a user is no event"
    assert "".join(data.catalogue.vocabulary.items[r - FIRST_ITEM] for r in data.sequences.items) == "acbd"
    assert data.sequences.timestamps.tolist() == [900, 1_100, 2_000, 300_000]
    assert slates_of(data) == [
        (1, "bcd", [1, 1, 0]),
        (2, "bde", [0, 0, 0]),
        (4, "fg", [0, 0]),
    ], "c and b came from the first slate; d came days after the second one"


def server_capture(path: Path, lines: list[tuple], most_bytes: int = 10**6) -> None:
    """Write requests with the server's own writer. lines: user, time, history, candidates."""
    writer = LineWriter("capture", appending(path, most_bytes))
    capture = Capture(writer, 1.0, b"key")
    for user, time, history, candidates in lines:
        items, times = zip(*history) if history else ((), ())
        request = {
            "user": user,
            "request_time": time,
            "history": {"item_ids": list(items), "timestamps": list(times)},
            "candidates": {"item_ids": list(candidates)},
        }
        capture.record(RankRequest.model_validate(request))
    writer.close()


REQUESTS = [
    ("u", 1_000, [], "abc"),
    ("u", 2_000, [("a", 1_100)], "bde"),
    ("w", 2_500, [("x", 2_400)], "ya"),
    ("u", 3_000, [("a", 1_100), ("d", 2_100)], "gh"),
    ("w", 4_000, [("x", 2_400), ("y", 2_600)], "zb"),
]


@pytest.mark.parametrize("pattern", ["logs", "logs/*", "logs/**/*.jsonl*"])
@pytest.mark.parametrize("compressed", [False, True])
def test_files_of_a_capture_are_read_as_one(tmp_path: Path, pattern: str, compressed: bool) -> None:
    """Servers and days have files of their own; each repeats the history, and its line numbers start again."""
    server_capture(tmp_path / "one.jsonl", REQUESTS)
    (tmp_path / "logs").mkdir()
    for k in range(3):
        path = tmp_path / f"logs/server-{k}.jsonl"
        server_capture(path, REQUESTS[k::3])
        if compressed:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    single, split = load(tmp_path / "one.jsonl", "taken"), load(tmp_path / pattern, "taken")
    assert slates_of(split) == slates_of(single)
    assert sorted(slates_of(single)) == [
        (0, "abc", [1, 0, 0]),
        (1, "bde", [0, 1, 0]),
        (1, "ya", [1, 0]),
        (2, "gh", [0, 0]),
        (2, "zb", [0, 0]),
    ]
    assert len(split.sequences.items) == 4, "an event of several histories is one event"


def test_capture_that_the_server_rotated_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "requests.jsonl"
    path.parent.mkdir()
    server_capture(path, REQUESTS, most_bytes=1_300)
    assert sorted(file.name for file in path.parent.iterdir()) == ["requests.jsonl", "requests.jsonl.1"]
    assert len(slates_of(load(path.parent, "taken"))) == len(REQUESTS)


def test_refresh_reads_a_capture_as_training_does(tmp_path: Path) -> None:
    paths = [tmp_path / f"{k}.jsonl" for k in range(3)]
    for k, path in enumerate(paths):
        server_capture(path, REQUESTS[k::3])
    events = Events(paths, ["taken"])
    assert events.newest() == 2_600, "candidates that were shown are no events"
    assert events.table.collect().filter(action="taken").height == 4
    with pytest.raises(ValueError, match=r"the action impression says .* bundle does not say which rows make history"):
        Events(paths).check()


def test_captured_events_without_actions_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "capture.jsonl"
    path.write_text(captured("u", 100, [("a", 50)], "bc") + "\n" + captured("u", 200, [("a", 50), ("b", 150)], "de"))
    assert slates_of(load(path, "taken")) == [(1, "bc", [1, 0]), (2, "de", [0, 0])]
    with pytest.raises(ValueError, match="the action impression says that an item was only shown"):
        load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"user_id": "u", "item_id": "a", "timestamp": 1}\n{"user_id"', r"events\.jsonl: line 2 is no JSON object"),
        ("[1, 2]\n", r"events\.jsonl: line 1 is no JSON object; every line is one row"),
        (
            '{"candidates": {"item_ids": 3}}\n',
            r"events\.jsonl: cannot be read as JSON lines: .*; give a column one type",
        ),
        ('{"candidates": 3}\n', r"events\.jsonl: no column user_id"),
        ('\xff"candidates"', r"events\.jsonl: line 1 is no JSON object"),
        ('{"user_id": "u"}\n', r"no column item_id"),
        ("", r"events\.jsonl: the file is empty"),
        ('{"user_id": "u", "item_id": "a", "timestamp": NaN}\n', r"events\.jsonl: line 1 is no JSON object"),
    ],
)
def test_json_lines_that_cannot_be_meant_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as raised:
        load(path, "*")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("candidates", [3, ["a", "b"], {"count": 3}])
def test_rows_with_a_column_candidates_are_a_table(tmp_path: Path, candidates: object) -> None:
    rows = [
        {"user_id": f"u{k % 5}", "item_id": f"i{k % 7}", "timestamp": k, "candidates": candidates} for k in range(60)
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(load(tmp_path / "events.jsonl").sequences.items) == 60


def test_capture_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []

    def count(paths: Sequence[Path]) -> pl.DataFrame:
        parsed.append(paths)
        return capture_events(paths)

    monkeypatch.setattr(files, "capture_events", count)
    server_capture(tmp_path / "c.jsonl", REQUESTS)
    load(tmp_path / "c.jsonl", "taken")
    assert len(parsed) == 1
    events = Events([tmp_path / "c.jsonl"], ["taken"])
    events.check()
    assert events.newest() and events.users(None) and len(parsed) == 2


def test_rows_of_json_lines_are_a_table(tmp_path: Path) -> None:
    rows = [
        {"user": "u", "item": "a", "timestamp": 100, "action": "impression", "slate_id": "r1", "position": 1},
        {"user": "u", "item": "b", "timestamp": 100, "action": "impression", "slate_id": "r1", "position": 2},
        {"user": "u", "item": "b", "timestamp": 130, "action": "click", "slate_id": "r1", "position": 2},
        {"user": "u", "item": "c", "timestamp": 140, "action": "click"},
    ]
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    tables = TablesConfig(str(path), history_actions=("click",), columns={"user_id": "user", "item_id": "item"})
    data = load_data(DataConfig("shop", NEXT), tables)
    assert slates_of(data) == [(0, "ab", [0, 1])]
    assert data.exposures is not None and data.exposures.positions.tolist() == [1, 2]
