"""Code that the commands of the store share: the flag for the Redis URL, a bundle's folder, one-line errors.

Called by: `push.py`, `admin.py`. Calls: `bundle/loader.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from slatewise.bundle.loader import versions

DEFAULT_URL = "redis://127.0.0.1:6379/0"


def add_redis_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--redis-url",
        metavar="URL",
        default=os.environ.get("SLATEWISE_REDIS_URL") or DEFAULT_URL,
        help=f"default: SLATEWISE_REDIS_URL, else {DEFAULT_URL}",
    )


def bundle_folder(path: Path) -> Path:
    """`path` itself if it is one version of a ranker, else its newest version. Raises ValueError if it is neither."""
    if (path / "manifest.json").exists():
        return path
    newest = max(versions(path), default=None)
    if newest is None:
        raise ValueError(f"{path}: no bundle, and no folder of a ranker's versions")
    return path / str(newest)


def fail(command: str, error: object) -> int:
    """Print an error as one line on standard error. Return the exit code of a failure."""
    print(f"{command}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    return 1
