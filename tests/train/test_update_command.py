"""`slatewise update`: new events in, the next version out, or nothing."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
import torch

from slatewise.bundle.loader import load_bundle
from slatewise.bundle.manifest import read_manifest, versions
from slatewise.cli import main as run_command
from slatewise.events.tap import write_parquet
from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train import checkpoint
from slatewise_train.config import TablesConfig
from slatewise_train.export import ExportOptions, export
from slatewise_train.incremental.stability import top_lists
from slatewise_train.tables.new_events import read_new_events
from tests.http.support import ask
from tests.support.versions import done, example_of, serving, state_of, wait_until

if TYPE_CHECKING:
    from tests.conftest import Tiny

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def toml(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TOML of the tiny ranker, with the paths of its tables."""
    folder = tmp_path_factory.mktemp("update")
    text = (HERE / "tiny.toml").read_text()
    for name in ("events", "items"):
        text = text.replace(f'"{name}.parquet"', json.dumps(str(Path(getattr(tiny.config.tables, name)))))
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def events(tiny: Tiny, toml: Path) -> Path:
    """A folder as a server writes it: a day of events of old users, a new user, a new item and a new action.

    The users take what the ranker recommends, so version 1 is good at these events.
    """
    data = tiny.trainer.data
    s = data.sequences
    users = np.arange(40)
    best = top_lists(tiny.trainer.model, data, users, np.diff(s.offsets)[users], 0)[:, ::-1] - FIRST_ITEM
    newest = float(np.nanmax(s.timestamps))
    ids = tiny.trainer.data.catalogue.vocabulary.items
    rows: list[tuple[str, str, str, float]] = []
    for user, items in zip([*s.users[:40], "newcomer"], [*best.tolist(), best[0].tolist()], strict=True):
        for k, row in enumerate(items[-6:]):
            item = "brand-new" if k == 2 else ids[row]
            rows.append((user, item, "share" if k == 3 else "view", newest + 60 * (len(rows) + 1)))
    user_id, item_id, action, timestamp = zip(*rows, strict=True)
    columns: dict[str, list[Any]] = {"user_id": list(user_id), "item_id": list(item_id), "action": list(action)}
    folder = toml.parent / "events"
    folder.mkdir()
    write_parquet(
        columns | {"timestamp": list(timestamp), "request_id": ["r"] * len(rows)}, folder / "events-1.parquet"
    )
    return folder


@pytest.fixture
def root(tiny: Tiny, tmp_path: Path) -> Path:
    shutil.copytree(tiny.folder, tmp_path / "tiny" / "1")
    return tmp_path


def update(root: Path, toml: Path, *arguments: object) -> int:
    return run_command(["update", str(toml), "--from", str(root / "tiny"), "--threads", "1", *map(str, arguments)])


@pytest.fixture(scope="module")
def updated(tiny: Tiny, toml: Path, events: Path) -> Path:
    """A root with version 1, and version 2 that learned from the events."""
    root = toml.parent / "bundles"
    shutil.copytree(tiny.folder, root / "tiny" / "1")
    assert update(root, toml, "--events", events, "--force") == 0
    return root


def test_update_publishes_the_next_version(updated: Path) -> None:
    manifest = read_manifest(updated / "tiny" / "2")
    assert not load_bundle(updated / "tiny" / "2").refused
    assert manifest.update is not None
    assert manifest.update.parent == 1
    assert 0 < manifest.update.events <= 41 * 7
    assert manifest.update.overlap10 is not None
    assert 0 < manifest.update.overlap10 <= 1
    report = json.loads((updated / "tiny" / "2" / "report.json").read_text())
    assert report["update"]["users"] == 41, "each user's last event is new"
    assert report["update"]["line"] in (updated / "tiny" / "2" / "report.md").read_text()
    assert set(report["update"]["overlap10"]) == {"dot", "point", "set"}
    assert report["trained_until"] == manifest.update.trained_until


def test_update_adds_new_names_after_the_old_ones(updated: Path) -> None:
    old, new = (read_manifest(updated / "tiny" / version) for version in "12")
    before, after = (json.loads((updated / "tiny" / version / "ids.json").read_text()) for version in "12")
    assert after == [*before, "brand-new"]
    assert new.actions[: len(old.actions)] == old.actions
    assert set(new.actions) == {*old.actions, "share", "view"}


def test_update_keeps_the_space_and_so_the_vectors(updated: Path) -> None:
    old, new = (read_manifest(updated / "tiny" / version) for version in "12")
    assert new.space == old.space == "tiny-1"
    defaults = [np.load(updated / "tiny" / version / "default_meta.npy") for version in "12"]
    np.testing.assert_array_equal(*defaults)


def test_update_keeps_the_weights_of_users(tiny: Tiny, tmp_path: Path, toml: Path, events: Path) -> None:
    learner = copy.deepcopy(tiny.learner)
    learner.precision = torch.full((1, tiny.trainer.model.hidden_size + 1), 0.1)
    export(tiny.trainer, learner, tiny.config, tmp_path, 1, ExportOptions(most_users=20, force=True))
    assert update(tmp_path, toml, "--events", events, "--force") == 0
    old, new = (read_manifest(tmp_path / "tiny" / version) for version in "12")
    assert new.space == old.space and new.meta_size == old.meta_size == tiny.trainer.model.hidden_size + 1
    vectors = [load_bundle(tmp_path / "tiny" / version).embedded_meta for version in "12"]
    users = min(map(len, vectors))
    assert vectors[1][:users].any(), "the update has weights of its own demo users"


def test_update_again_finds_nothing_new(
    updated: Path, toml: Path, events: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert update(updated, toml, "--events", events) == 0
    assert "no new events" in capsys.readouterr().out
    assert not (updated / "tiny" / "3").exists()


def test_update_that_is_worse_is_not_published(
    root: Path, toml: Path, events: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate without measure forgets everything."""
    arguments = ("--events", events, "--penalty", 0, "--learning-rate", 3.0, "--passes", 8)
    assert update(root, toml, *arguments) == 1
    assert "slatewise update: error: " in capsys.readouterr().err
    assert not (root / "tiny" / "2").exists()


def test_bundle_without_a_time_needs_one(root: Path, toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "tiny" / "1" / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trained_until": None}))
    assert update(root, toml) == 1
    assert "--since" in capsys.readouterr().err


def test_killed_update_publishes_nothing(root: Path, toml: Path, events: Path) -> None:
    """It dies while the bundle is written. A server, and the next update, find the folder as it was."""
    command = [sys.executable, "-m", "slatewise", "update", str(toml), "--from", str(root / "tiny")]
    command += ["--events", str(events), "--threads", "1", "--force"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    stage = root / "tiny" / ".staging-2"
    give_up = time.monotonic() + 120
    while not (stage / "items.npy").exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < give_up
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert versions(root / "tiny") == [1]
    with serving(root, reload="poll", reload_s=0.05) as client:
        assert state_of(client)["version"] == 1


def test_watching_server_takes_an_update_as_canary(tiny: Tiny, updated: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny.folder, tmp_path / "tiny" / "1")
    body = example_of(tiny.folder)
    settings = {"reload": "poll", "reload_s": 0.05, "reload_canary": 0.5, "reload_canary_s": 0.0}
    with serving(tmp_path, **settings) as client:
        shutil.copytree(updated / "tiny" / "2", tmp_path / ".2")
        (tmp_path / ".2").rename(tmp_path / "tiny" / "2")
        candidate = wait_until(lambda: state_of(client)["candidate"], "a candidate")
        assert (candidate["version"], candidate["canary"]) == (2, 0.5)
        assert state_of(client)["version"] == 1
        answered = {ask(client, body | {"user": f"u{k}"}, "/rerank")["version"] for k in range(40)}
        assert answered == {1, 2}
        time.sleep(0.3)  # some polls
        assert state_of(client)["version"] == 1, "0 seconds: it is never promoted by itself"
        done(client, "promote", version=2)
        assert state_of(client)["version"] == 2


def test_canary_of_a_poll_is_promoted_after_its_time(tiny: Tiny, updated: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny.folder, tmp_path / "tiny" / "1")
    settings = {"reload": "poll", "reload_s": 0.05, "reload_canary": 0.1, "reload_canary_s": 0.5}
    with serving(tmp_path, **settings) as client:
        shutil.copytree(updated / "tiny" / "2", tmp_path / ".2")
        (tmp_path / ".2").rename(tmp_path / "tiny" / "2")
        wait_until(lambda: state_of(client)["candidate"], "a candidate")
        wait_until(lambda: state_of(client)["version"] == 2, "the promotion")
        assert state_of(client)["candidate"] is None


def test_two_updates_at_a_time_are_refused(
    root: Path, toml: Path, events: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(checkpoint.alone(root / "tiny"))
        assert update(root, toml, "--events", events) == 1
    assert "another process" in capsys.readouterr().err


def test_files_of_servers_and_of_the_toml_are_read_together(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"user_id": ["1"], "item_id": ["a"], "action": ["view"]}
    write_parquet(columns | {"timestamp": [1e9], "request_id": [None]}, tmp_path / "served.parquet")
    own = pl.DataFrame({"who": ["2"], "what": ["b"], "when": [1_000_000_001_000]})
    own.write_parquet(tmp_path / "own.parquet")
    names = {"user_id": "who", "item_id": "what", "timestamp": "when"}
    tables = TablesConfig("unused", time_unit="ms", columns=names)
    found = read_new_events([str(tmp_path)], tables)
    assert found.select("user_id", "item_id", "timestamp").rows() == [("1", "a", 1e9), ("2", "b", 1e9 + 1)]
