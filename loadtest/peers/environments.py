"""Prepares a comparison: an environment for each peer, the reference bundle with its variants, the graphs of peers.

Called by: `__main__.py`. Calls: pip with requirements/<peer>.txt (exact versions), `slatewise compress`. Output:
build/peers/, build/bundles/reference/.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from slatewise.bundle.manifest import bundle_folder, read_manifest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = Path("build/peers")
BUNDLES = Path("build/bundles")
RANKER = "reference"
DEMO = "demo:"  # before a variant of the demo, which is trained, and smaller than the reference ranker
DEMO_BUNDLES = Path("models/bundles")
BUNDLE = BUNDLES / RANKER / "1"
RANK_GRAPH = BUNDLE / "variants/fp32/rank.onnx"
STRAIGHTFORWARD_GRAPH = BUILD / "straightforward.onnx"
STUDENT = "blocks=1,feed_forward=1,attention_heads=1,key_size=16"
GRAPHS = {"rank": RANK_GRAPH, "straightforward": STRAIGHTFORWARD_GRAPH}


def site_packages(name: str) -> Path:
    return BUILD / name / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


def prepare(peers: Iterable[str], graphs: Iterable[str], variants: Iterable[str]) -> None:
    """Raises CalledProcessError if something cannot be installed or written."""
    for name in peers:
        install(name)
    if not RANK_GRAPH.exists():
        run(sys.executable, "-m", "slatewise_train.demo.reference")
    wanted = [name for name in variants if name != "fp32" and not name.startswith(DEMO)]
    if set(wanted) - read_manifest(bundle_folder(BUNDLES / RANKER)).variants.keys():
        options = ("--variants", ",".join(wanted), "--student", STUDENT, "--force")  # also if another one is faster
        run(sys.executable, "-m", "slatewise", "compress", str(BUNDLE), *options)
    if "straightforward" in graphs and not up_to_date(STRAIGHTFORWARD_GRAPH):
        install("straightforward", "--no-deps")
        run(sys.executable, "-m", "loadtest.peers.straightforward", path=site_packages("straightforward"))


def up_to_date(graph: Path) -> bool:
    return graph.exists() and graph.stat().st_mtime >= RANK_GRAPH.stat().st_mtime


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
