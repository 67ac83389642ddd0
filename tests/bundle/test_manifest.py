"""The folder of a bundle, from the paths that the commands take."""

from __future__ import annotations

from pathlib import Path

import pytest

from slatewise.bundle.manifest import ManifestError, bundle_folder, versions
from slatewise_train import compress


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of a ranker with the versions 2 and 10."""
    home = tmp_path / "root" / "ranker"
    for version in ("2", "10"):
        (home / version).mkdir(parents=True)
        (home / version / "manifest.json").write_text("{}")
    (home / "README.txt").touch()
    return home


def test_bundle_folder_is_the_version_or_the_newest(home: Path) -> None:
    assert versions(home) == [2, 10]
    assert bundle_folder(home) == home / "10"
    assert bundle_folder(home / "2") == home / "2"


def test_bundle_folder_of_another_folder_is_refused(home: Path) -> None:
    for path in (home.parent, home / "missing"):
        with pytest.raises(ManifestError, match="no bundle, and no folder of a ranker's versions"):
            bundle_folder(path)


@pytest.mark.parametrize(("path", "version"), [("ranker", "10"), ("ranker/2", "2"), ("ranker/2/.", "2")])
def test_compress_takes_a_version_or_a_ranker(
    home: Path, path: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home.parent)
    given = []
    monkeypatch.setattr(compress, "open_source", lambda folder, *_: folder)
    monkeypatch.setattr(compress, "compress", lambda source, root, *_: given.append((source, root)))
    compress.main([path])
    assert given == [(home / version, home.parent)]
