"""`slatewise update` of a bundle of the family `dcn`: new events in, the next version out, which servers load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slatewise.bundle.loader import load_bundle
from slatewise.bundle.manifest import read_manifest
from slatewise.cli import main as run_command
from slatewise.events.tap import write_parquet
from slatewise_train.data import Data
from slatewise_train.incremental.grow import grown_model
from slatewise_train.rankers.weights import load_model
from tests.conftest import Tiny
from tests.ranking.support import draw_request, rank, run
from tests.train.dcn_bundle import SHAPE, export_dcn

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parents[1]
MODEL = '[model]\nfamily = "dcn"\n' + "".join(f"{name} = {value}\n" for name, value in SHAPE.items())


@pytest.fixture(scope="module")
def updated(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the ranker: version 1 as it was trained, and version 2 that learned from a folder of events."""
    folder = tmp_path_factory.mktemp("dcn-update")
    export_dcn(tiny, folder, SHAPE, epochs=4)
    write_events(tiny.trainer.data, folder / "events")
    toml = write_toml(tiny, folder)
    arguments = ["--from", str(folder / "bundles" / "tiny"), "--events", str(folder / "events"), "--threads", "1"]
    assert run_command(["update", str(toml), *arguments, "--force"]) == 0
    return folder / "bundles" / "tiny"


def write_events(data: Data, folder: Path) -> None:
    """A day of old users and a new one, with a new item and a new action, as a server writes them."""
    newest = float(np.nanmax(data.sequences.timestamps))
    ids = data.catalogue.vocabulary.items
    users = [*data.sequences.users[:30], "newcomer"]
    rows = [
        (user, "brand-new" if k == 1 else ids[7 * n % len(ids) + k]) for n, user in enumerate(users) for k in (0, 1, 2)
    ]
    columns: dict[str, list[Any]] = {
        "user_id": [user for user, _ in rows],
        "item_id": [item for _, item in rows],
        "action": ["share" if item == "brand-new" else "view" for _, item in rows],
        "timestamp": [newest + 60 * (k + 1) for k in range(len(rows))],
        "request_id": ["r"] * len(rows),
    }
    folder.mkdir()
    write_parquet(columns, folder / "events-1.parquet")


def write_toml(tiny: Tiny, folder: Path) -> Path:
    """The TOML of the tiny ranker with another `[model]`, and with the paths of its tables."""
    text = (HERE / "tiny.toml").read_text()
    for name in ("events", "items"):
        text = text.replace(f'"{name}.parquet"', json.dumps(str(Path(getattr(tiny.config.tables, name)))))
    before, _, rest = text.partition("[model]")
    after = rest.partition("\n[")
    path = folder / "tiny.toml"
    text = before + MODEL + after[1] + after[2]
    path.write_text(text.replace('default_exit = "set"', 'default_exit = "point"'))
    return path


def test_update_of_dcn_publishes_a_version_that_loads(updated: Path) -> None:
    old, new = (read_manifest(updated / version) for version in "12")
    assert old.model is not None and new.model is not None and new.model.family == old.model.family == "dcn"
    assert new.update is not None and new.update.parent == 1 and new.update.events > 0
    assert new.exits == old.exits == ["dot", "point"]
    assert new.space == old.space
    before, after = (json.loads((updated / version / "ids.json").read_text()) for version in "12")
    assert after == [*before, "brand-new"]
    ranker = load_bundle(updated / "2")
    assert not ranker.refused
    for exit in ("dot", "point"):
        ranking = run(ranker, lambda p, exit=exit: rank(p, draw_request(ranker, 20, 30, 1, exit=exit)))  # type: ignore[misc]
        assert ranking.exit == exit and not ranking.degraded


def test_update_of_dcn_trains_and_keeps_what_vectors_do(updated: Path) -> None:
    models = [load_model(updated / version, read_manifest(updated / version)) for version in "12"]
    changed = {
        name for name, value in models[0].state_dict().items()
        if value.shape == models[1].state_dict()[name].shape and not torch.equal(value, models[1].state_dict()[name])
    }  # fmt: skip
    assert any(name.startswith("fusion") for name in changed), changed
    metas = torch.eye(8)
    assert torch.equal(models[0].meta_shift(metas), models[1].meta_shift(metas))
    assert torch.equal(models[0].default_meta, models[1].default_meta)


def test_grown_dcn_scores_as_the_bundle(updated: Path, tiny: Tiny) -> None:
    manifest = read_manifest(updated / "1")
    grown = grown_model(updated / "1", manifest, tiny.trainer.data.catalogue)
    served = load_model(updated / "1", manifest)
    torch.testing.assert_close(grown.item_table(), served.item_table(), atol=1e-6, rtol=0)
    own = served.state_dict()
    for name, value in grown.state_dict().items():
        if name in own and name != "item.weight":
            torch.testing.assert_close(value, own[name], atol=0, rtol=0)


def test_default_exit_that_dcn_lacks_is_refused(updated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = updated.parents[1]
    toml = folder / "set.toml"
    toml.write_text((folder / "tiny.toml").read_text().replace('default_exit = "point"', 'default_exit = "set"'))
    arguments = ["--from", str(updated / "1"), "--events", str(folder / "events"), "--threads", "1"]
    assert run_command(["update", str(toml), *arguments]) == 1
    said = capsys.readouterr()
    assert '[export] default_exit = "set": this ranker has the exits dot, point' in said.err
    assert "trained on" not in said.out, "it says so before the training"


def test_second_update_of_dcn_finds_nothing_new(
    updated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(updated / "2", tmp_path / "tiny" / "2")
    toml, events = updated.parents[1] / "tiny.toml", updated.parents[1] / "events"
    arguments = ["--from", str(tmp_path / "tiny"), "--events", str(events), "--threads", "1"]
    assert run_command(["update", str(toml), *arguments]) == 0
    assert "no new events" in capsys.readouterr().out
    assert not (tmp_path / "tiny" / "3").exists()
