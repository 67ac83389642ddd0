"""`slatewise batch`: both forms of a table, and a run that is killed and continued."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import slatewise
from slatewise.client.errors import Invalid, NotFound
from slatewise.client.libraries import MissingLibrary
from slatewise.commands import batch
from slatewise.commands.batch import BatchError, main

AT = 1.2e9
BUNDLE = ("--bundle", "movielens", "--variant", "int8", "--workers", "1", "--request-time", str(AT))
LONG = pl.DataFrame({"user": [*"abacb"], "item_id": [595, 589, 1, 2028, 1], "popularity": [1.0, None, 2.0, 3.0, 1.0]})
EVENTS = pl.DataFrame({"user": [*"aab"], "item_id": [318, 500, 337], "action": ["love", "like", "like"]})
WIDE = pl.DataFrame(
    {
        "user": ["a", None, "a"],
        "item_ids": [["595", "589", "1"], ["1"], ["2", "3"]],
        "history_item_ids": [["318", "500"], None, []],
        "history_actions": [["love", None], None, []],
        "history_timestamps": [[datetime.datetime(2001, 1, 1), datetime.datetime(2002, 1, 1)], None, []],
        "features.popularity": [[1.0, None, 2.0], None, [1.0, 1.0]],
        "note": ["kept", "kept", "kept"],
    }
)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    LONG.write_parquet(tmp_path / "long.parquet")
    EVENTS.write_parquet(tmp_path / "events.parquet")
    WIDE.write_parquet(tmp_path / "wide.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_long_form_is_rank_many(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["long.parquet", "out.parquet", "--histories", "events.parquet", "--part", "2", *BUNDLE])
    assert capsys.readouterr().out == "ranked 3 requests: out.parquet\n"
    with slatewise.load("movielens", "int8", threads=1) as ranker:
        expected = ranker.rank_many(LONG, histories=EVENTS, request_time=AT)
    assert pl.read_parquet("out.parquet").equals(expected)
    assert not Path("out.parquet.parts").exists()


def test_wide_form_is_a_request_per_row(files: Path, demo_url: str) -> None:
    main(["wide.parquet", "out.parquet", "--url", demo_url, "--request-time", str(AT), "--part", "1"])
    found = pl.read_parquet("out.parquet")
    assert found.drop("ranked_item_ids", "ranked_scores", "ranked_index").equals(WIDE)
    history = [("318", "love", 978307200.0), ("500", None, 1009843200.0)]
    candidates = {"item_ids": ["595", "589", "1"], "features": {"popularity": [1.0, None, 2.0]}}
    with slatewise.Client(demo_url, timeout=30) as client:
        first = client.rerank(user="a", history=history, candidates=candidates, request_time=AT)
    row = found.row(0, named=True)
    assert (row["ranked_item_ids"], row["ranked_scores"], row["ranked_index"]) == (
        first.item_ids,
        first.scores,
        first.index,
    )
    assert found["ranked_item_ids"].list.len().to_list() == [3, 1, 2]


@pytest.mark.parametrize("table", [LONG[:0], WIDE[:0]], ids=["long", "wide"])
def test_empty_table_gets_its_columns(files: Path, demo_url: str, table: pl.DataFrame) -> None:
    table.write_parquet("in.parquet")
    main(["in.parquet", "out.parquet", "--url", demo_url])
    found = pl.read_parquet("out.parquet")
    assert len(found) == 0 and len(found.columns) > len(table.columns)


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (pl.DataFrame({"a": [1]}), "needs the columns user and item_id"),
        (pl.DataFrame(), "needs the columns"),
        (LONG.with_columns(score=1.0), "has the column score already"),
        (LONG.with_columns(user=pl.lit(None, pl.String)), "a missing value is no id"),
    ],
)
def test_wrong_tables_are_refused(files: Path, table: pl.DataFrame, text: str) -> None:
    table.write_parquet("in.parquet")
    with pytest.raises(Invalid, match=text):
        main(["in.parquet", "out.parquet", *BUNDLE])
    assert not Path("out.parquet").exists() and not Path("out.parquet.parts").exists()


def test_wrong_requests_end_the_run_with_the_servers_reason(files: Path, demo_url: str) -> None:
    with pytest.raises(NotFound):
        main(["long.parquet", "out.parquet", "--url", demo_url, "--ranker", "other"])
    LONG.rename({"popularity": "unheard"}).write_parquet("in.parquet")
    with pytest.raises(Invalid, match="unheard"):
        main(["in.parquet", "other.parquet", *BUNDLE])


@pytest.mark.parametrize("arguments", [("--part", "0"), ("--workers", "0")])
def test_wrong_numbers_are_wrong_usage(files: Path, arguments: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["long.parquet", "out.parquet", *arguments])
    assert caught.value.code == 2


def test_output_may_not_be_the_input(files: Path) -> None:
    with pytest.raises(SystemExit):
        main(["long.parquet", "long.parquet", *BUNDLE])
    assert pl.read_parquet("long.parquet").equals(LONG)


def test_another_input_or_option_is_refused(files: Path, demo_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(batch, "ranked", fail)
        with pytest.raises(KeyboardInterrupt):
            main(["wide.parquet", "out.parquet", "--url", demo_url])
        with pytest.raises(KeyboardInterrupt):  # no part was finished, so another input begins anew
            main(["long.parquet", "out.parquet", "--url", demo_url, "--part", "2"])
        (files / "out.parquet.parts" / "000001.parquet").touch()
    for change in (["wide.parquet", "out.parquet"], ["long.parquet", "out.parquet", "--part", "7"]):
        change += [] if "--part" in change else ["--part", "2"]
        with pytest.raises(BatchError, match=r"out\.parquet\.parts holds a run with another value of (input|part)"):
            main([*change, "--url", demo_url])
    with pytest.raises(BatchError, match="url"):
        main(["long.parquet", "out.parquet", "--url", "http://127.0.0.1:1", "--part", "2"])
    (files / "out.parquet.parts" / "000001.parquet").unlink()
    main(["long.parquet", "out.parquet", "--url", demo_url])
    assert len(pl.read_parquet("out.parquet")) == len(LONG)


def test_csv_is_told_from_parquet(files: Path) -> None:
    LONG.write_csv("long.csv")
    Path("empty.parquet").touch()
    for arguments, text in (
        (["long.csv", "out.parquet"], r"long\.csv is CSV; batch reads Parquet"),
        (["long.parquet", "out.parquet", "--histories", "long.csv"], r"long\.csv is CSV; batch reads Parquet"),
        (["empty.parquet", "out.parquet"], r"empty\.parquet is no Parquet"),
    ):
        with pytest.raises(ValueError, match=text):
            main([*arguments, *BUNDLE])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"timestamp": ["2026-01-31", None, None]}, "column timestamp, user 'a': unix seconds or a type of time"),
        (
            {"timestamp": [1e9, 1e9, 1.7e12]},
            "column timestamp, user 'b': unix seconds are wanted, from 0 to 99999999999",
        ),
        ({"timestamp": [1.0, float("nan"), 1.0]}, "column timestamp, user 'a': .*found 'nan'"),
        ({"item_id": [318, 500, None]}, "column item_id, user 'b': an id is missing"),
        ({"user": [None, "a", "b"]}, "column user, user None: an id is missing"),
    ],
)
def test_wrong_histories_name_file_column_and_user(files: Path, change: dict[str, Any], text: str) -> None:
    columns = EVENTS.to_dict(as_series=False) | change
    pl.DataFrame(columns, strict=False).write_parquet("events.parquet")
    with pytest.raises(ValueError, match=rf"events\.parquet: {text}"):
        main(["long.parquet", "out.parquet", "--histories", "events.parquet", *BUNDLE])
    EVENTS.drop("user").write_parquet("events.parquet")
    with pytest.raises(ValueError, match=r"events\.parquet lacks the column user"):
        main(["long.parquet", "out.parquet", "--histories", "events.parquet", *BUNDLE])


def test_times_of_histories_are_taken(files: Path) -> None:
    for k, times in enumerate(([1e9, None, 1e9], [datetime.datetime(2001, 1, 1)] * 3)):
        EVENTS.with_columns(timestamp=pl.Series(times)).write_parquet("events.parquet")
        main(["long.parquet", f"out{k}.parquet", "--histories", "events.parquet", *BUNDLE])


def test_two_runs_do_not_share_a_folder(files: Path) -> None:
    import fcntl

    folder = files / "out.parquet.parts"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BatchError, match="in use by another run"):
            main(["long.parquet", "out.parquet", *BUNDLE])


def test_missing_polars_names_the_remedy(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(
        MissingLibrary, match="`slatewise batch` needs polars; run: pip install 'slatewise\\[parquet\\]'"
    ):
        main(["long.parquet", "out.parquet", *BUNDLE])


def test_killed_run_is_continued(files: Path) -> None:
    """Killed with its workers between two parts. The continued run ranks only the rest, with the time of the begin."""
    table = pl.DataFrame({"user": [f"u{k // 2}" for k in range(240)], "item_id": [*range(1, 241)]})
    table.write_parquet("in.parquet")
    arguments = ["in.parquet", "out.parquet", "--bundle", "movielens", "--variant", "int8", "--part", "3"]
    command = [sys.executable, "-m", "slatewise", "batch", *arguments, "--workers", "1"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    folder = files / "out.parquet.parts"
    give_up = time.monotonic() + 60
    while len([*folder.glob("0*.parquet")]) < 3:
        assert time.monotonic() < give_up and process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("0*.parquet")}
    assert 3 <= len(kept) < 40 and not (files / "out.parquet").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"continuing: {3 * len(kept)} of 120 requests")
    assert "120 of 120 requests" in done.stderr
    found = pl.read_parquet("out.parquet")
    assert found.select("user", "item_id").equals(table) and set(found["rank"]) == {1, 2}
    assert not folder.exists()


def test_killed_worker_is_a_clear_error(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "rank_in_process", kill_itself)
    with pytest.raises(BatchError, match="a worker process was killed"):
        main(["long.parquet", "out.parquet", *BUNDLE])


def kill_itself(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
