"""`slatewise check-bundle`: loads bundles as the server does, and prints the variants that the server would serve.

Called by: cli.py. Calls: trust.py, and loader.py, which logs each refusal with its reason.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from slatewise.bundle.loader import load_bundle, load_rankers
from slatewise.bundle.manifest import ManifestError, bundle_folder
from slatewise.bundle.ranker import Ranker
from slatewise.bundle.trust import keys_of_environment
from slatewise.settings import default_bundles


def load(path: Path) -> list[Ranker]:
    """Load one bundle, the newest version of one ranker, or all rankers of a root folder.

    Raises ManifestError, or SettingsError for wrong keys of bundles.
    """
    keys = keys_of_environment()
    if not path.is_dir():
        raise ManifestError(f"{path}: no such folder")
    try:
        folder = bundle_folder(path)
    except ManifestError:  # a root folder of bundles
        return list(load_rankers(path, keys=keys).values())
    return [load_bundle(folder, keys=keys)]


def main(argv: Sequence[str]) -> None:
    """Raises ManifestError if no bundle can be loaded, or SettingsError."""
    parser = argparse.ArgumentParser(
        "slatewise check-bundle",
        description="Load bundles and print the variants that the server would serve. If SLATEWISE_BUNDLE_KEYS is set, "
        "bundles must be signed by one of its keys.",
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
    for ranker in load(args.path):
        names = ", ".join(f"{name} (default)" if name == ranker.default_variant else name for name in ranker.engines)
        print(f"{ranker.name} version {ranker.manifest.version} serves the variants {names}")
