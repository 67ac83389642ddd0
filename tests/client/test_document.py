"""Every snippet of docs/client.md runs as it stands, in order."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from slatewise.client import errors

TEXT = (Path(__file__).parents[2] / "docs" / "client.md").read_text()


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_python_snippets_run(demo_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {}
    found = snippets("python")
    assert len(found) == 7
    for snippet in found:
        exec(compile(snippet.replace("http://127.0.0.1:8000", demo_url), "docs/client.md", "exec"), namespace)
    namespace["client"].close()
    first, *_, faults = capsys.readouterr().out.splitlines()
    assert first.startswith("1 ") and "/top_n" in faults and "/exit" in faults
    assert asyncio.run(namespace["best"]("small:99", ["595", "589"])) in ("595", "589")
    assert [*namespace["ranked"].columns] == ["user", "item_id", "popularity", "score", "rank"]


def test_commands_run(demo_url: str, tmp_path: Path) -> None:
    pl.DataFrame({"user": ["a", "a"], "item_id": [595, 589]}).write_parquet(tmp_path / "slates.parquet")
    pl.DataFrame({"user": ["a"], "item_id": [318], "action": ["love"]}).write_parquet(tmp_path / "events.parquet")
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("SLATEWISE_")}
    (lines,) = snippets("sh")
    for line in lines.splitlines():
        _, *arguments = shlex.split(line)
        url = {} if "doctor" in arguments else {"SLATEWISE_URL": demo_url}
        command = [sys.executable, "-m", "slatewise", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=kept | url, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout, done.stderr
    assert pl.read_parquet(tmp_path / "ranked.parquet").columns == ["user", "item_id", "score", "rank"]


def test_error_table_names_every_class_of_the_common_ones() -> None:
    table = TEXT[TEXT.index("| error | status |") :]
    named = {*re.findall(r"`([A-Z]\w+)`", table[: table.index("\n\n")])}
    assert named - {"ValueError", "ConnectionError", "TimeoutError"} <= {*vars(errors)}
    assert {"Invalid", "Overloaded", "DeadlineExceeded", "TimedOut"} <= named
