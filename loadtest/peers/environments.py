"""What the side by side needs and does not find: an environment a peer, the reference bundle, the straightforward graph.

Before: requirements/<peer>.txt, with exact versions. After: build/peers/.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
BUILD = Path("build/peers")
BUNDLES = Path("build/bundles")
RANKER = "reference"
BUNDLE = BUNDLES / RANKER / "1"
RANK_GRAPH = BUNDLE / "variants/fp32/rank.onnx"
STRAIGHTFORWARD_GRAPH = BUILD / "straightforward.onnx"
GRAPHS = {"rank": RANK_GRAPH, "straightforward": STRAIGHTFORWARD_GRAPH}


def prepare(peers: Iterable[str]) -> None:
    for name in peers:
        install(name)
    if not RANK_GRAPH.exists():
        run(sys.executable, "-m", "slatewise_train.demo.reference")
    if not STRAIGHTFORWARD_GRAPH.exists() or STRAIGHTFORWARD_GRAPH.stat().st_mtime < RANK_GRAPH.stat().st_mtime:
        install("straightforward", "--no-deps")
        run(
            sys.executable,
            "-m",
            "loadtest.peers.straightforward",
            path=BUILD / "straightforward/lib/python3.11/site-packages",
        )


def install(name: str, *options: str) -> None:
    """Its requirements into a new environment, unless the very same are there."""
    requirements = HERE / "requirements" / f"{name}.txt"
    folder = BUILD / name
    installed = folder / "installed.txt"
    if installed.exists() and installed.read_text() == requirements.read_text():
        return
    print(f"installing {requirements.name} into {folder}", flush=True)
    run(sys.executable, "-m", "venv", "--clear", str(folder))
    run(
        str(folder / "bin/python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        *options,
        "--requirement",
        str(requirements),
    )
    installed.write_text(requirements.read_text())


def run(*command: str, path: Path | None = None) -> None:
    subprocess.run(command, check=True, env=os.environ | ({"PYTHONPATH": str(path)} if path else {}))
