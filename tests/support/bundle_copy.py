"""A bundle to break, for the tests of this folder and those of new versions."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slatewise.bundle.loader import load_bundle
from slatewise.bundle.ranker import Ranker

GRAPHS = ("encode", "dot", "point", "set")
FP32 = "variants/fp32"


class Copy:
    """A copy of a bundle below `root`, for the test to change."""

    def __init__(self, source: Path, root: Path, version: int = 1) -> None:
        self.root = root
        self.folder = root / "tiny" / str(version)
        shutil.copytree(source, self.folder)
        if version != 1:
            self.change_manifest(lambda m: m.update(version=version))

    def change_manifest(self, change: Callable[[dict[str, Any]], object]) -> None:
        path = self.folder / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    def write(self, name: str, content: bytes) -> None:
        """Write a file, and its digest into the manifest."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self.change_manifest(lambda m: m["files"].update({name: hashlib.sha256(content).hexdigest()}))

    def rewrite(self, name: str, change: Callable[[bytes], bytes]) -> None:
        self.write(name, change((self.folder / name).read_bytes()))

    def add_variant(self, name: str) -> None:
        """Add a variant that is equal to fp32."""
        for graph in GRAPHS:
            self.write(f"variants/{name}/{graph}.onnx", (self.folder / FP32 / f"{graph}.onnx").read_bytes())
        self.change_manifest(lambda m: m["variants"].update({name: m["variants"]["fp32"]}))

    def load(self) -> Ranker:
        return load_bundle(self.folder)


def array_bytes(array: np.ndarray, path: Path, allow_pickle: bool = False) -> bytes:
    np.save(path, array, allow_pickle=allow_pickle)
    return path.read_bytes()
