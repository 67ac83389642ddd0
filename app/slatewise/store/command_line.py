"""The Redis URL as an option of the commands that write to the store.

Called by: `push`, `admin` and the refresh job.
"""

from __future__ import annotations

import argparse
import os

DEFAULT_URL = "redis://127.0.0.1:6379/0"


def add_redis_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--redis-url",
        metavar="URL",
        default=os.environ.get("SLATEWISE_REDIS_URL") or DEFAULT_URL,
        help=f"default: SLATEWISE_REDIS_URL, else {DEFAULT_URL}",
    )
