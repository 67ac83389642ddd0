"""`slatewise validate` describes tables, and refuses those that training would refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from slatewise.cli import main

EVENTS = [
    *(
        (f"u{u}", f"i{(u + k) % 12}", 1_700_000_000 + 3600 * k, "buy" if k % 3 else "view", k % 2)
        for u in range(10)
        for k in range(12)
    ),
    *(("one", "x", 1_700_000_000, "view", 0) for _ in range(2)),
    ("", "i1", 1_700_000_000, "view", 0),
]
NAMES = ["user_id", "item_id", "timestamp", "action", "label_buy"]


def run(folder: Path, toml: str = "", events: pl.DataFrame | None = None) -> int:
    table = pl.DataFrame(EVENTS, NAMES, orient="row") if events is None else events
    table.with_columns(device=pl.lit("phone")).write_csv(folder / "events.csv")
    items = {
        "item_id": [f"i{k}" for k in range(14)],
        "kind": ["a", "b"] * 7,
        "price": [*range(13), None],
        "colour": ["c"] * 14,
    }
    pl.DataFrame(items).write_csv(folder / "items.csv")
    text = f'name = "shop"\n[data]\nevents = "{folder}/events.csv"\nitems = "{folder}/items.csv"\n' + toml
    (folder / "my.toml").write_text(text)
    return main(["validate", str(folder / "my.toml")])


SETTINGS = (
    '[items]\ncategorical = ["kind"]\nnumeric = ["price"]\n[heads.next]\nkind = "next"\n[heads.buy]\nkind = "label"\n'
    "[split]\nslate_size = 4\nslate_users = 3\nvalidation_users = 50\nhistory_length = 10\n"
)


def test_validate_prints_what_training_would_find(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, SETTINGS) == 0
    out = capsys.readouterr().out
    for line in (
        f"events     123 rows in {tmp_path}/events.csv, 121 used",
        "missing user_id: 1 rows (0.813 %), left out",
        "duplicate row: 1 rows (0.813 %), left out",
        "times      2023-11-14 22:13 to 2023-11-15 09:13 UTC",
        "0 % of the events share user and time with another",
        "actions    buy 66.1 %, view 33.9 %",
        "labels     label_buy: 1 49.6 %, 0 50.4 %, unknown 0 %",
        "ignored    columns of the events: device",
        "ignored    columns of the items: colour",
        "users      11; events of a user: 1 to 12",
        "10 users have more than the 10 events that a request reads",
        "1 users (9.09 %) have fewer than 3 events",
        "items      15, 13 of them in events",
        "listed and in no event: 2; in events and not listed: 1",
        "density    84.6 % of user and item pairs",
        "field      kind: 2 values, at most 1 for an item, 93.3 % of the items have one",
        "number     price: 0 to 12, 86.7 % of the items have one",
        "split      leave-one-out: ",
        "slate_users: 3 of the 3 wanted",
        "warning: validation_users finds 7 users with a history before a slate of 4",
        "training would accept these tables; warnings: 1",
    ):
        assert line in out, line


def frame(**columns: Any) -> pl.DataFrame:
    n = 40
    return pl.DataFrame(
        {"user_id": ["u", "v"] * (n // 2), "item_id": [f"i{k % 12}" for k in range(n)], "timestamp": range(n)} | columns
    )


@pytest.mark.parametrize(
    ("columns", "toml", "warning"),
    [
        ({"timestamp": [86_400 * 365 * 10] * 40}, "", "most events have the time of another event"),
        ({}, "", "are in 1970; is time_unit right?"),
        ({"timestamp": [4_000_000_000 + k for k in range(40)]}, "", "are in the future"),
        (
            {"item_id": [f"x{k}" for k in range(40)]},
            "",
            "are of items that the item table lacks; are the ids written alike?",
        ),
        ({"item_id": ["i1"] * 40}, "", "of the events have the item of the event before"),
        ({"action": ["view"] * 40, "label_buy": [1] * 40}, "", "label_buy has one value alone"),
        ({}, "[split]\nvalidation_users = 0", "no validation users"),
        ({}, '[items]\nnumeric = ["colour"]', "no item has a number in colour"),
    ],
)
def test_validate_warns_of_doubtful_tables(
    tmp_path: Path, columns: dict[str, Any], toml: str, warning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, toml, frame(**columns)) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert any(warning in line for line in warnings), warnings


@pytest.mark.parametrize(
    ("columns", "toml", "message"),
    [
        ({"timestamp": ["x"] + [str(k) for k in range(39)]}, "", "line 2, column timestamp: 'x'"),
        ({"timestamp": [1_700_000_000_000] * 40}, "", 'set time_unit = "ms"'),
        ({"label_buy": [0, 1] * 20}, "", "history_actions"),
        ({}, '[heads.like]\nkind = "label"', "no column label_like"),
        ({}, '[items]\ncategorical = ["brand"]', "no column brand"),
        ({"user_id": [str(k) for k in range(40)]}, "", "no training events are left"),
        ({}, "[split]\nslate_size = 0", "[split] slate_size = 0: must be"),
    ],
)
def test_validate_refuses_what_training_refuses(
    tmp_path: Path, columns: dict[str, Any], toml: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, toml, frame(**columns)) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert main(["train", str(tmp_path / "my.toml"), "--folder", str(tmp_path / "train")]) == 1
    assert message in capsys.readouterr().err


def test_validate_warns_of_words_for_missing_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(f"u{k % 5}", ("NULL", "a", "b")[k % 3], 1_700_000_000 + k) for k in range(30)]
    assert run(tmp_path, events=pl.DataFrame(rows, NAMES[:3], orient="row")) == 0
    out = capsys.readouterr().out
    assert "warning: 10 events have the item_id 'NULL'; leave it empty if it means a missing value" in out


def test_rows_of_a_slate_are_no_events_of_equal_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        (f"u{u}", f"i{(u + 3 * k + j) % 17}", 1_700_000_000 + 900 * k, "buy" if j == k % 3 else "shown", f"s{k}")
        for u in range(12)
        for k in range(10)
        for j in range(3)
    ]
    table = pl.DataFrame(rows, [*NAMES[:4], "slate_id"], orient="row")
    assert run(tmp_path, 'history_actions = ["buy"]\n', events=table) == 0
    out = capsys.readouterr().out
    assert "0 % of the events share user and time with another" in out and "most events have the time" not in out
    assert "6 users have a slate that is held out to evaluate" in out and "slate_users: " not in out
