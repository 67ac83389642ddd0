"""The versions in the folders of rankers, and whether all of their files have arrived.

A folder may be a mounted object store, where files appear late, one by one and without a rename, and where times mean
nothing. So a version is complete when all files that its manifest lists are there, and trusted when their digests agree
(`loader.py`).

Called by: `ranking/watch.py`, `ranking/versions.py`. Calls: `manifest.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slatewise.bundle.manifest import versions


@dataclass(frozen=True)
class Seen:
    """A version's folder at one look. Two looks are equal if nothing seems to have changed."""

    manifest: str  # SHA-256; empty without a manifest that can be read
    missing: tuple[str, ...]
    files: tuple[tuple[str, int, int, int], ...]  # name, bytes, inode, time of the last change


def look(folder: Path) -> Seen:
    """Look at the files that the manifest lists, without reading them."""
    try:
        content = (folder / "manifest.json").read_bytes()
        names = sorted(json.loads(content)["files"])
    except (OSError, ValueError, LookupError, TypeError):
        return Seen("", ("manifest.json",), ())
    missing, files = [], []
    for name in names:
        try:
            found = (folder / str(name)).stat()
        except (OSError, ValueError):
            missing.append(str(name))
        else:
            files.append((str(name), found.st_size, found.st_ino, found.st_mtime_ns))
    return Seen(hashlib.sha256(content).hexdigest(), tuple(missing), tuple(files))


def look_for(root: Path, after: Mapping[str, int]) -> dict[str, dict[int, Seen]]:
    """Return, by ranker, the versions below `root` that are newer than that in `after`, the newest first."""
    found: dict[str, dict[int, Seen]] = {}
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    except OSError:  # a mount may be gone for a while
        return found
    for folder in folders:
        try:
            numbers = [version for version in reversed(versions(folder)) if version > after.get(folder.name, -1)]
        except OSError:
            continue
        if numbers:
            found[folder.name] = {version: look(folder / str(version)) for version in numbers}
    return found
