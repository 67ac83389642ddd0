"""`slatewise init` writes a TOML that training reads, and says why."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from slatewise.cli import main
from slatewise_train import new_toml
from slatewise_train.config import Head, read_config
from slatewise_train.data import load_data

SMALL = Path(__file__).parents[1] / "data" / "ml-latest-small"
N = 60


def table(**columns: Any) -> pl.DataFrame:
    return pl.DataFrame(
        {"user_id": [f"u{k % 5}" for k in range(N)], "item_id": [f"i{k % 40}" for k in range(N)]} | columns
    )


def write(folder: Path, events: pl.DataFrame, items: pl.DataFrame | None = None) -> tuple[int, Path]:
    """Run the command; return its exit code and the TOML."""
    events.write_parquet(folder / "events.parquet")
    arguments = ["init", str(folder / "events.parquet"), "--out", str(folder / "my.toml"), "--name", "shop"]
    if items is not None:
        items.write_parquet(folder / "items.parquet")
        arguments.insert(2, str(folder / "items.parquet"))
    return main(arguments), folder / "my.toml"


def test_init_recognises_common_names_and_units(tmp_path: Path) -> None:
    events = pl.DataFrame(
        {
            "visitorId": [k % 5 for k in range(N)],
            "Product ID": [f"i{k % 40}" for k in range(N)],
            "event_time": [1_700_000_000_000 + 1000 * k for k in range(N)],
            "event": [("view", "buy", "impression")[k % 3] for k in range(N)],
            "impression_id": [f"s{k // 3}" for k in range(N)],
            "rank": [k % 3 + 1 for k in range(N)],
            "liked": [k % 2 for k in range(N)],
            "rating": [k % 5 + 1 for k in range(N)],
        }
    )
    items = pl.DataFrame(
        {
            "Product ID": [f"i{k}" for k in range(40)],
            "name": [f"Thing {k}" for k in range(40)],
            "genres": [["a", "b"] if k % 2 else ["c"] for k in range(40)],
            "tags": ["x|y" if k % 2 else "z" for k in range(40)],
            "price": [k + 0.5 for k in range(40)],
            "year": [2000 + k % 3 for k in range(40)],
            "story": [
                "a very long text about this thing, longer than a name would ever be " + str(k) for k in range(40)
            ],
            "code": [f"code{k}" for k in range(40)],
            "added": [datetime(2026, 1, 1)] * 40,
        }
    )
    code, path = write(tmp_path, events, items)
    assert code == 0
    text = path.read_text(encoding="utf-8")
    config = read_config(path)
    assert config.tables.columns == {
        "user_id": "visitorId",
        "item_id": "Product ID",
        "timestamp": "event_time",
        "action": "event",
        "slate_id": "impression_id",
        "position": "rank",
        "label_liked": "liked",
    }
    assert config.tables.time_unit == "ms" and sorted(config.tables.history_actions) == ["buy", "view"]
    assert config.data.heads == (Head("next", "next", 1.0), Head("liked", "label", 0.5))
    assert config.data.title == "name"
    assert config.data.categorical == ("genres", "tags", "year") and config.data.numeric == ("popularity", "price")
    assert "# rating is not read" in text and "# story: left out, since it has long text" in text
    assert "# code: left out, since it has 40 different values among 40" in text
    data = load_data(config.data, config.tables)
    assert len(data.sequences.items) == 40 and data.catalogue.vocabulary.fields["tags"] == ["x", "y", "z"]


def test_init_of_movielens_is_trainable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", str(SMALL / "ratings.csv"), str(SMALL / "movies.csv")]) == 0
    config = read_config(Path("ratings.toml"))
    assert config.data.name == "ratings" and config.data.categorical == ("genres",)
    data = load_data(config.data, config.tables)
    assert len(data.sequences) == 60 and "Drama" in data.catalogue.vocabulary.fields["genres"]


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"date": ["2026-01-31"] * N}, "# date has ISO 8601 times such as 2026-01-31"),
        ({"timestamp": [datetime(2026, 1, 1)] * N}, "# timestamp has the type Datetime"),
        ({"timestamp": [1_700_000_000] * N}, "# timestamp has unix seconds such as 1700000000"),
        ({"ts": [20260131] * N}, "# ts has dates such as 20260131: write them as 2026-01-31 before you train"),
        ({"ts": ["31.01.2026"] * N}, "# ts has values such as 31.01.2026, which training does not read as times"),
        ({}, 'time_unit = "row"  # no column of times was found'),
        (
            {"time": [5] * N, "label_buy": [0, 1] * (N // 2)},
            'history_actions = ["label:buy"]  # rows with label_buy = 1',
        ),
        ({"time": [5] * N, "slate_id": [1] * N}, '# history_actions = ["*"]  # the rows have slates'),
        ({"time": [5] * N, "action": ["view\n\u0001"] * N}, "# actions: view   100 %"),
    ],
)
def test_init_gives_the_reason_of_a_choice(tmp_path: Path, columns: dict[str, Any], line: str) -> None:
    code, path = write(tmp_path, table(**columns))
    assert code == 0 and line in path.read_text(encoding="utf-8")
    read_config(path)


def test_init_keeps_a_file_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write(tmp_path, table())[0] == 0
    assert write(tmp_path, table())[0] == 1
    assert "my.toml exists; remove it, or give another name with --out" in capsys.readouterr().err


def test_init_that_fails_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, path = write(tmp_path, table(item_id=[["a"]] * N))
    assert code == 1 and not path.exists(), "training would refuse the type"
    assert "column item_id has the type List(String)" in capsys.readouterr().err
    assert write(tmp_path, table().clear())[0] == 1 and not path.exists()
    assert "events.parquet: the table has no rows" in capsys.readouterr().err
    monkeypatch.setattr(new_toml, "toml_of", lambda *_: 'name = "shop"\n[data]\nevents = 3\n')
    assert write(tmp_path, table())[0] == 1 and not path.exists(), "the TOML is checked before it is written"
    assert "[data] events = 3: must be text in quotes" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["events.parquet"]


def test_init_does_not_replace_a_file_of_the_meantime(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        new_toml.write_new(path, b"other")
    assert path.read_text() == "mine"


def test_init_reads_the_actions_of_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An action that the first rows lack is an event of the user as well."""
    monkeypatch.setattr(new_toml, "SAMPLE", 10)
    actions = ["impression", "view"] * (N // 2 - 1) + ["impression", "buy"]
    code, path = write(tmp_path, table(time=[5] * N, action=actions))
    assert code == 0 and sorted(read_config(path).tables.history_actions) == ["buy", "view"]


@pytest.mark.parametrize(
    "values",
    [["2026-01-31"] * N, [datetime(2026, 1, 31)] * N, [1_700_000_000 + k for k in range(N)], ["1700000000000"] * N],
)
def test_init_finds_times_under_another_name(tmp_path: Path, values: list[Any]) -> None:
    code, path = write(tmp_path, table(price=[1.5] * N, units=[3] * N, t_dat=values))
    assert code == 0 and read_config(path).tables.columns == {"timestamp": "t_dat"}


@pytest.mark.parametrize("values", [["red", "blue"] * (N // 2), [None] * N, ["1700000000"] * (N - 1) + ["soon"]])
def test_init_takes_no_other_column_as_times(tmp_path: Path, values: list[Any]) -> None:
    code, path = write(tmp_path, table(colour=values))
    assert code == 0 and read_config(path).tables.columns == {}
    assert 'time_unit = "row"' in path.read_text()


def test_init_names_the_columns_that_it_cannot_find(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write(tmp_path, pl.DataFrame({"a": [1], "b": [2]}))[0] == 1
    assert "no column user_id, item_id; found: 'a', 'b'" in capsys.readouterr().err
    assert write(tmp_path, table(), pl.DataFrame({"sku": ["i1"]}))[0] == 1
    assert "the ids stand in the column sku; name it item_id, as in the events" in capsys.readouterr().err


def test_init_warns_of_dates_that_it_cannot_read(tmp_path: Path) -> None:
    code, toml = write(tmp_path, table(OrderDate=[f"{k % 28 + 1:02}.05.2025" for k in range(N)]))
    assert code == 0
    assert "# WARNING: OrderDate has dates such as 01.05.2025, which are not read." in toml.read_text()


def test_unused_columns_are_told_with_the_action(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events.csv").write_text(
        "customer,sku,when,what,price,page\n"
        + "".join(f"c{k % 5},s{k % 9},{1_700_000_000 + k},{('view', 'buy')[k % 2]},{k % 4}.5,p{k}\n" for k in range(N))
    )
    toml = tmp_path / "my.toml"
    assert main(["init", str(tmp_path / "events.csv"), "--out", str(toml)]) == 0
    remedy = 'If it is the action, add under [columns]: action = "what"'
    text = toml.read_text(encoding="utf-8")
    assert f"# what: text with 2 values (view, buy), not read. {remedy}\n" in text
    assert "# price: numbers with 4 values (0.5, 1.5, 2.5, ...), not read\n" in text
    assert f"# page: text with {N} values (p0, p1, p2, ...), not read\n" in text
    capsys.readouterr()
    assert main(["validate", str(toml)]) == 0
    out = capsys.readouterr().out
    assert f"note: what: text with 2 values (view, buy), not read. {remedy}\n" in out and "notes: 1\n" in out
    toml.write_text(text.replace("\n[columns]", '\n[columns]\naction = "what"\n#'), encoding="utf-8")
    assert main(["validate", str(toml)]) == 0
    out = capsys.readouterr().out
    assert "buy 50 %" in out and "notes: 0\n" in out
