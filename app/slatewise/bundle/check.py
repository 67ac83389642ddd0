"""`slatewise check-bundle`: loads bundles as the server does, and prints the variants that the server would serve.

Called by: cli.py. Calls: loader.py, which logs each refusal with its reason.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from slatewise.bundle.loader import load_bundle, load_rankers, versions
from slatewise.bundle.manifest import ManifestError
from slatewise.bundle.ranker import Ranker
from slatewise.settings import default_bundles


def load(path: Path) -> list[Ranker]:
    """Load one bundle, the newest version of one ranker, or all rankers of a root folder. Raises ManifestError."""
    if not path.is_dir():
        raise ManifestError(f"{path}: no such folder")
    if (path / "manifest.json").exists():
        return [load_bundle(path, 1)]
    if found := versions(path):
        return [load_bundle(path / str(found[-1]), 1)]
    return list(load_rankers(path).values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "slatewise check-bundle", description="Load bundles and print the variants that the server would serve."
    )
    parser.add_argument(
        "path",
        type=Path,
        nargs="?",
        default=default_bundles(),
        help="a bundle, a ranker's folder (its newest version), or a root folder of bundles; default: %(default)s",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)  # refusals
    try:
        rankers = load(args.path)
    except ManifestError as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    for ranker in rankers:
        names = ", ".join(f"{name} (default)" if name == ranker.default_variant else name for name in ranker.engines)
        print(f"{ranker.name} version {ranker.manifest.version} serves the variants {names}")
    return 0
