"""`slatewise store ...`: each command's output, exit codes, and an environment without the training packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from slatewise import cli
from slatewise.store.admin import COMMANDS
from slatewise.store.codec import user_key
from slatewise.store.generations import Generations
from slatewise.store.push import push
from tests.conftest import Tiny
from tests.store.conftest import url

UNREACHABLE = "redis://127.0.0.1:1/0"


@pytest.fixture
def store(client: redis.Redis) -> Generations:
    """Ranker "r", space "s", with two full generations of two users."""
    store = Generations(client, "r", "s")
    for value in (1.0, 2.0):
        push(store, ["a", "b"], np.full((2, 4), value, np.float32))
    return store


@pytest.fixture
def run(redis_port: int, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(command: str, *arguments: str, ranker: str = "r", space: str = "s") -> Any:
        """The JSON that the command prints, for a ranker and its space."""
        assert (
            cli.main(
                ["store", command, *arguments, "--ranker", ranker, "--space", space, "--redis-url", url(redis_port)]
            )
            == 0
        )
        return json.loads(capsys.readouterr().out)

    return run


def test_status_prints_the_live_generations(store: Generations, run: Any) -> None:
    status = run("status")
    assert (status["ranker"], status["space"], status["live"]) == ("r", "s", [2, 1])
    assert [g["kind"] for g in status["generations"]] == ["full", "full"] and status["writing"] is None


def test_roll_back_prints_the_list_and_then_fails(
    store: Generations, run: Any, redis_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("roll-back") == {"live": [1]}
    assert cli.main(["store", "roll-back", "--ranker", "r", "--space", "s", "--redis-url", url(redis_port)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "slatewise store: error: nothing to roll back to: one generation is live\n"


@pytest.mark.parametrize("user", ["a", "user 1", "\N{SNOWMAN}"])
def test_delete_user_removes_all_vectors(store: Generations, client: redis.Redis, run: Any, user: str) -> None:
    push(store, [user], np.zeros((1, 4), np.float32))
    assert run("delete-user", user) == {"deleted": True}
    assert not client.exists(user_key("r", "s", user))
    assert run("delete-user", user) == {"deleted": False}
    assert run("status")["deleted_users"] == 2


def test_merge_and_sweep_leave_one_full_generation_more(store: Generations, run: Any) -> None:
    assert run("merge") == {"live": [3, 2, 1]}
    assert run("roll-back") == {"live": [2, 1]}
    assert run("sweep") == {"fields_removed": 2}
    assert run("sweep") == {"fields_removed": 0}


def test_a_bundle_or_its_ranker_names_the_space(
    tiny: Tiny,
    client: redis.Redis,
    redis_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLATEWISE_REDIS_URL", url(redis_port))
    manifest = json.loads((tiny.folder / "manifest.json").read_text())
    for folder in (tiny.folder, tiny.folder.parent):
        assert cli.main(["store", "status", str(folder)]) == 0
        status = json.loads(capsys.readouterr().out)
        assert (status["ranker"], status["space"], status["live"]) == (manifest["ranker"], manifest["space"], [])


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unreachable_redis_is_one_line_and_exit_code_1(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    user = ["u"] if command == "delete-user" else []
    assert cli.main(["store", command, *user, "--ranker", "r", "--space", "s", "--redis-url", UNREACHABLE]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("slatewise store: error: ") and printed.err.count("\n") == 1


@pytest.mark.parametrize("content", [None, "", "{}", '{"format": 1}', "[" * 10])
def test_an_unreadable_bundle_is_one_line_and_exit_code_1(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    assert cli.main(["store", "status", str(tmp_path), "--redis-url", UNREACHABLE]) == 1
    printed = capsys.readouterr()
    assert str(tmp_path) in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["status"],
        ["status", "--ranker", "r"],
        ["status", "--space", "s"],
        ["status", "folder", "--ranker", "r", "--space", "s"],
        ["delete-user"],
        ["delete-user", "folder-or-user"],
        ["delete-user", "--ranker", "r", "--space", "s"],
        ["sweep", "folder", "one too many"],
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["store", *arguments])
    assert ended.value.code == 2
    assert "usage: slatewise store" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)], ids=lambda a: "".join(a) or "all")
def test_help_exits_with_0_and_shows_no_password(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLATEWISE_REDIS_URL", "redis://:secret@h")
    with pytest.raises(SystemExit) as ended:
        cli.main(["store", *arguments, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: {' '.join(['slatewise store', *arguments])}" in printed and "secret" not in printed


def test_the_commands_run_without_the_training_packages(store: Generations, redis_port: int, tmp_path: Path) -> None:
    """Each training package is shadowed by a module that cannot be imported."""
    for name in ("torch", "polars", "onnx", "slatewise_train"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not in the serving environment')\n")
    app = Path(__file__).parents[2] / "app"
    for command in COMMANDS:
        user = ["a"] if command == "delete-user" else []
        line = [sys.executable, "-m", "slatewise", "store", command, *user, "--ranker", "r", "--space", "s"]
        environment = os.environ | {
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{app}",
            "SLATEWISE_REDIS_URL": url(redis_port),
        }
        ended = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stderr) == (0, ""), command
        json.loads(ended.stdout)


def test_a_folder_of_versions_means_the_newest(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for version in ("2", "10"):
        shutil.copytree(tiny.folder, tmp_path / version, ignore=shutil.ignore_patterns("*.onnx", "*.npy"))
    (tmp_path / "10" / "manifest.json").write_text("{}")
    assert cli.main(["store", "status", str(tmp_path), "--redis-url", UNREACHABLE]) == 1
    assert str(tmp_path / "10") in capsys.readouterr().err
