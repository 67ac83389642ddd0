"""Requests that a server captured, and rows that it logged as JSON lines, train as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slatewise.http.capture import capture_line
from slatewise.inference.arrays import FIRST_ITEM
from slatewise.schemas import RankRequest
from slatewise_train.config import DataConfig, Head, TablesConfig
from slatewise_train.data import Data, load_data

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
        ('{"candidates": 3}\n', r"events\.jsonl: cannot be read as JSON lines: .*; give a column one type"),
        ('\xff"candidates"', r"events\.jsonl: line 1 is no JSON object"),
        ('{"user_id": "u"}\n', r"no column item_id"),
    ],
)
def test_json_lines_that_cannot_be_meant_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as raised:
        load(path, "*")
    assert "\n" not in str(raised.value)


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
