"""The tap: whole Parquet files that training reads as they are, also after a kill."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from slatewise import settings as settings_module
from slatewise.events import tap as module
from slatewise.events.event import Event
from slatewise.events.histories import EmbeddedHistories
from slatewise.events.tap import COLUMNS, Tap
from slatewise.events.writer import EventWriter
from slatewise.main import serve
from slatewise.settings import Settings, SettingsError
from slatewise_train.check_data import main as validate
from slatewise_train.new_toml import main as init
from tests.events.support import NOW, event
from tests.support.network import free_port


def parquet(folder: Path) -> list[Path]:
    return sorted(folder.glob("events-*.parquet"))


def read(folder: Path) -> list[dict[str, Any]]:
    return [row for path in parquet(folder) for row in pl.read_parquet(path).to_dicts()]


async def submit(folder: Path, *batches: list[Event], file_seconds: float = 3_600.0, most_bytes: int = 10**9) -> None:
    async with (
        Tap(folder, file_seconds, most_bytes) as tap,
        EventWriter(EmbeddedHistories(100, 0.0, 10**6), tap, 10_000, None) as writer,
    ):
        for batch in batches:
            await writer.submit(batch)


def test_new_events_become_one_file_at_the_end(tmp_path: Path) -> None:
    first = Event("u", "a", "view", NOW + 0.25, "r-1", "")
    shown = Event("u", "s", "impression", NOW, "r-1", "", True)
    asyncio.run(submit(tmp_path / "made", [first, event("b", NOW + 1)], [first], [shown]))
    assert read(tmp_path / "made") == [
        dict(zip(COLUMNS, row, strict=True))
        for row in (
            ("u", "a", "view", NOW + 0.25, "r-1"),
            ("u", "b", None, NOW + 1, None),
            ("u", "s", "impression", NOW, "r-1"),
        )
    ]
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [parquet(tmp_path / "made")[0].name]


def test_no_events_make_no_file(tmp_path: Path) -> None:
    asyncio.run(submit(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_journal_becomes_a_file_with_its_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.02)

    async def main() -> None:
        async with Tap(tmp_path, 0.1, 10**9) as tap:
            await tap.append([event("a")])
            async with asyncio.timeout(10):
                while not parquet(tmp_path):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            await tap.append([event("b")])

    asyncio.run(main())
    assert [row["item_id"] for row in read(tmp_path)] == ["a", "b"]


def test_a_large_journal_becomes_a_file_and_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JOURNAL_BYTES", 1)
    batches = [[event(f"{k}-{n}", NOW + k) for n in range(50)] for k in range(12)]
    asyncio.run(submit(tmp_path, *batches, most_bytes=4_000))
    files = parquet(tmp_path)
    assert 1 <= len(files) < 12 and sum(path.stat().st_size for path in files) <= 4_000
    assert {row["item_id"] for row in read(tmp_path)} >= {f"11-{n}" for n in range(50)}, "the newest stay"
    asyncio.run(submit(tmp_path, [event("last")], most_bytes=1))
    assert [row["item_id"] for row in read(tmp_path)] == ["last"]


KILLED = """
    import asyncio, os, signal, sys
    from pathlib import Path
    from slatewise.events.event import Event
    from slatewise.events.tap import Tap

    async def main():
        async with Tap(Path(sys.argv[1]), 3600, 10**9) as tap:
            for k in range(20):
                await tap.append([Event("u", str(k), "view", 1.0 + k, "", "")])
            os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(main())
"""


def test_a_killed_process_loses_no_event_and_leaves_no_broken_file(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], timeout=60, check=False)
    assert result.returncode == -signal.SIGKILL
    assert parquet(tmp_path) == []
    (journal,) = tmp_path.glob(".journal-*.jsonl")
    with open(journal, "ab") as file:
        file.write(b'{"user_id": ["u"], "item_id": ["to')  # a line whose request was not answered
    (tmp_path / ".events-draft.parquet").write_bytes(b"PAR1 broken")
    asyncio.run(submit(tmp_path))
    assert [row["item_id"] for row in read(tmp_path)] == [str(k) for k in range(20)]
    assert not list(tmp_path.glob(".journal-*"))


def test_the_journal_of_a_process_that_lives_is_left_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with Tap(tmp_path, 3_600, 10**9) as tap:
            await tap.append([event("a")])
            await submit(tmp_path, [event("b")])
            assert [row["item_id"] for row in read(tmp_path)] == ["b"]
            await tap.append([event("c")])

    asyncio.run(main())
    assert sorted(row["item_id"] for row in read(tmp_path)) == ["a", "b", "c"]


def test_a_journal_without_its_lock_yet_loses_no_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process starts between the creation of a journal and its lock, and removes it."""
    flock = fcntl.flock
    starts = [Tap(tmp_path, 3_600, 10**9)]

    def late(file: Any, operation: int) -> None:
        if operation == fcntl.LOCK_EX and starts:
            starts.pop().convert_abandoned()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    asyncio.run(submit(tmp_path, [event("a")], [event("b")]))
    assert not starts
    assert [row["item_id"] for row in read(tmp_path)] == ["a", "b"]


@pytest.mark.skipif(os.geteuid() != 0 and not Path("/dev/full").exists(), reason="no full device")
def test_a_full_disk_costs_the_tap_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tap: Tap) -> Any:
        return open("/dev/full", "wb", buffering=0)

    monkeypatch.setattr(Tap, "new_journal", full)
    monkeypatch.setattr(Tap, "convert", lambda tap, journal: journal.close())

    async def main() -> None:
        async with (
            Tap(tmp_path, 3_600, 10**9) as tap,
            EventWriter(EmbeddedHistories(100, 0.0, 10**6), tap, 100, None) as writer,
        ):
            assert (await writer.submit([event("a")])).accepted == 1

    asyncio.run(main())


def test_training_reads_the_folder_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`slatewise init` and `slatewise validate`, while a server still writes."""
    folder = tmp_path / "events"

    def batch(first: int) -> list[Event]:
        return [
            Event(f"u{user}", f"i{(user * k) % 50}", "view" if k % 3 else "buy", NOW + first + 60 * k, "", "")
            for user in range(40)
            for k in range(first, first + 10)
        ]

    asyncio.run(submit(folder, batch(0)))
    asyncio.run(submit(folder, batch(10)))
    monkeypatch.chdir(tmp_path)

    async def main() -> None:
        async with Tap(folder, 3_600, 10**9) as tap:
            await tap.append([event("later")])
            await asyncio.to_thread(init, ["events"])
            await asyncio.to_thread(validate, ["events.toml"])

    asyncio.run(main())
    output = capsys.readouterr().out
    assert "800" in output.replace(",", ""), "all events of both files, and none of the journal"


@pytest.mark.parametrize("folder", ["/proc/self", "/proc/none"])
def test_a_folder_that_cannot_be_written_stops_the_start(tmp_path: Path, folder: str) -> None:
    with pytest.raises(SettingsError, match=f"SLATEWISE_EVENTS_DIR .*{folder}: "):
        serve(Settings(bundles=tmp_path, events_dir=folder, port=free_port()))


def test_the_setting_without_polars_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_spec = settings_module.importlib.util.find_spec
    monkeypatch.setattr(
        settings_module.importlib.util, "find_spec", lambda name: None if name == "polars" else find_spec(name)
    )
    with pytest.raises(ValidationError, match=r"pip install 'slatewise\[parquet\]'"):
        Settings(events_dir=str(tmp_path))
    assert Settings().events_dir == ""
