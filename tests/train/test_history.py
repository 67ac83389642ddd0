"""Rows that were only shown make no history, or the table is refused with the setting that is missing."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from slatewise_train.config import DataConfig, Head, TablesConfig
from slatewise_train.data import load_data

HEADS = (Head("next", "next", 1.0), Head("buy", "label", 1.0))
NEXT = HEADS[:1]
ITEMS = list("abcdef")
BOUGHT = [1, 0, 0, 1, 0, 1]


def write(folder: Path, **columns: list) -> str:
    path = folder / "e.parquet"
    pl.DataFrame({"user_id": ["u"] * 6, "item_id": ITEMS, "timestamp": range(6)} | columns).write_parquet(path)
    return str(path)


def history(events: str, *actions: str, heads: tuple[Head, ...] = NEXT) -> str:
    """The items of the user's history, in order."""
    data = load_data(DataConfig("shop", heads), TablesConfig(events, history_actions=actions))
    return "".join(data.catalogue.vocabulary.items[row - 2] for row in data.sequences.items)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"label_buy": BOUGHT},
            r'label_buy = 0 and there is no column action.*history_actions in \[data\].*\["label:buy"\]',
        ),
        ({"action": ["buy", "shown"] * 3}, r'the action shown says that an item was only shown; set .*\["buy"\]'),
        ({"action": ["buy", "Impression"] * 3}, r"the action Impression says"),
        ({"action": ["buy", "view"] * 3, "slate_id": ["s"] * 6}, r"the events have a slate_id"),
        ({"label_buy": [1] * 6, "slate_id": [1] * 6}, r"the events have a slate_id"),
    ],
)
def test_table_with_shown_rows_names_the_missing_setting(tmp_path: Path, columns: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        history(write(tmp_path, **columns))
    assert history(write(tmp_path, **columns), "*") == "abcdef", "every row, if the TOML says so"


@pytest.mark.parametrize(
    "columns",
    [
        {"label_buy": BOUGHT, "action": ["view"] * 6},
        {"label_buy": [1] * 6},
        {"label_buy": [1, None] * 3},
        {"slate_id": [None] * 6},
        {},
    ],
)
def test_table_without_doubt_needs_no_setting(tmp_path: Path, columns: dict) -> None:
    assert history(write(tmp_path, **columns)) == "abcdef"


def test_stated_actions_and_labels_make_history(tmp_path: Path) -> None:
    events = write(tmp_path, action=["buy", "shown", "view", None, "buy", "shown"], label_buy=[0, 1, 0, None, 0, 0])
    assert history(events, "buy") == "ae"
    assert history(events, "buy", "view") == "ace"
    assert history(events, "buy", "label:buy") == "abe"
    assert history(write(tmp_path, label_buy=BOUGHT), "label:buy", heads=HEADS) == "adf"


def test_shown_rows_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history(write(tmp_path, label_buy=BOUGHT), "label:buy")
    assert "3 of 6 rows were only shown, and are no history" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (
            "buyy",
            r"history_actions in \[data\] names buyy, which no event has; did you mean buy\? known: buy, view",
        ),
        ("label:like", r"names label:like: no column label_like"),
        ("label:buy", r"leaves no event"),
    ],
)
def test_action_that_no_event_has_is_refused(tmp_path: Path, stated: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        history(write(tmp_path, action=["buy", "view"] * 3, label_buy=[0] * 6), stated)


def test_nothing_stated_chooses_the_split_but_not_the_slates(tmp_path: Path) -> None:
    """An empty set of stated keys is not None: the keys are chosen, and shown slates still hold out one event each."""
    rows = [
        (f"u{u}", f"i{(u + 3 * k + j) % 17}", 1_000 * k, f"s{k}", "buy" if j == k % 3 else "shown", int(j == k % 3))
        for u in range(12)
        for k in range(20)
        for j in range(3)
    ]
    names = ["user_id", "item_id", "timestamp", "slate_id", "action", "label_buy"]
    pl.DataFrame(rows, names, orient="row").write_parquet(tmp_path / "e.parquet")
    tables = TablesConfig(str(tmp_path / "e.parquet"), history_actions=("buy",))
    config = load_data(DataConfig("shop", HEADS), tables, frozenset()).config
    assert config.slate_size == 1 and config.validation_users > 0, "chosen, but for the size"
    assert load_data(DataConfig("shop", HEADS), tables, None).config.validation_users == 0, "no key is chosen"
