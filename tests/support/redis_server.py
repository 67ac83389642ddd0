"""A real Redis server as a child process.

Called by: `tests/conftest.py`, tests of the store, `loadtest/store`, `loadtest/observability`. Calls: redis-server.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.network import free_port
from tests.support.redis_binary import redis_binary

START_SECONDS = 10


def redis_command(folder: Path, port: int, *options: str) -> list[str]:
    """The command of a server on loopback without persistence."""
    settings = {"port": str(port), "bind": "127.0.0.1", "save": "", "appendonly": "no", "dir": str(folder)}
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return [redis_binary(), *flags, *options]


@contextmanager
def run_redis(folder: Path, port: int | None = None) -> Iterator[int]:
    """Run Redis on loopback without persistence, and yield its port. Raises RuntimeError if it does not start."""
    port = port or free_port()
    command = redis_command(folder, port)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("redis-server did not start") from None
                time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()
