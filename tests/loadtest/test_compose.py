"""The private copy of the checkout that compose-check builds from, and the training of its update."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from loadtest.compose import docker, more_steps, steps
from slatewise.bundle.manifest import read_manifest
from slatewise_train.config import read_config
from slatewise_train.data import load_data
from slatewise_train.incremental.grow import check_columns


def test_copy_has_the_certificates_that_git_ignores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, copy = tmp_path / "checkout", tmp_path / "copy"
    (root / "deploy" / "certificates").mkdir(parents=True)
    shutil.copy(docker.ROOT / ".gitignore", root)
    for name in ("app.py", "app.part", "deploy/certificates/proxy.crt"):
        (root / name).write_text(name)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    monkeypatch.setattr(docker, "ROOT", root)
    monkeypatch.setattr(docker, "FOLDER", copy)
    docker.private_copy()
    copied = {str(path.relative_to(copy)): path.stat().st_mode & 0o777 for path in copy.rglob("*") if path.is_file()}
    assert copied == {".gitignore": 0o600, "app.py": 0o600, "deploy/certificates/proxy.crt": 0o600}


def test_taking_everything_down_names_every_profile() -> None:
    services = yaml.safe_load((docker.ROOT / "docker-compose.yml").read_text())["services"].values()
    profiles = {profile for service in services for profile in service.get("profiles", [])}
    named = zip(docker.EVERYTHING, docker.EVERYTHING[1:], strict=False)
    assert {name for flag, name in named if flag == "--profile"} == profiles


def test_training_of_the_update_reads_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written with the standard library alone, so the check of the data is here."""
    root = docker.ROOT
    monkeypatch.setattr(more_steps, "FOLDER", root)
    monkeypatch.setattr(more_steps, "newest", lambda: steps.newest(root / "models" / "bundles" / "movielens"))
    more_steps.training(tmp_path / "training")
    monkeypatch.chdir(tmp_path / "training")
    config = read_config(Path("movielens.toml"))
    data = load_data(config.data, config.tables)
    assert len(data.sequences) == more_steps.LEARNERS
    check_columns(read_manifest(more_steps.newest()), config.data)
