"""Prepares a comparison: one virtual environment for each peer, the reference bundle, the straightforward graph.

Called by: `__main__.py`. Calls: pip with requirements/<peer>.txt (exact versions). Output: build/peers/.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = Path("build/peers")
BUNDLES = Path("build/bundles")
RANKER = "reference"
BUNDLE = BUNDLES / RANKER / "1"
RANK_GRAPH = BUNDLE / "variants/fp32/rank.onnx"
STRAIGHTFORWARD_GRAPH = BUILD / "straightforward.onnx"
GRAPHS = {"rank": RANK_GRAPH, "straightforward": STRAIGHTFORWARD_GRAPH}


def site_packages(name: str) -> Path:
    return BUILD / name / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


def prepare(peers: Iterable[str]) -> None:
    for name in peers:
        install(name)
    if not RANK_GRAPH.exists():
        run(sys.executable, "-m", "slatewise_train.demo.reference")
    if not STRAIGHTFORWARD_GRAPH.exists() or STRAIGHTFORWARD_GRAPH.stat().st_mtime < RANK_GRAPH.stat().st_mtime:
        install("straightforward", "--no-deps")
        run(sys.executable, "-m", "loadtest.peers.straightforward", path=site_packages("straightforward"))


def install(name: str, *options: str) -> None:
    """Install a peer's requirements into a new environment, unless the same ones are installed."""
    requirements = HERE / "requirements" / f"{name}.txt"
    folder = BUILD / name
    installed = folder / "installed.txt"
    if installed.exists() and installed.read_text() == requirements.read_text():
        return
    print(f"installing {requirements.name} into {folder}", flush=True)
    run(sys.executable, "-m", "venv", "--clear", str(folder))
    pip = (str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, *options, "--requirement", str(requirements))
    installed.write_text(requirements.read_text())


def run(*command: str, path: Path | None = None) -> None:
    """Run a command; `path` comes first on its PYTHONPATH."""
    paths = [str(path)] if path else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
