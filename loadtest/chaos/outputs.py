"""R27. A server whose outputs fail: closed, full or broken standard output, a full disk, a read-only file system.

The file systems are mounted, which needs root on Linux; without it their rows are absent and a note says so.

Called by: `__main__.py`, and the command line: python -m loadtest.chaos.outputs. Calls: `bundle.py`, `report.py`,
`loadtest/server_process.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loadtest.chaos.bundle import small_bundles
from loadtest.chaos.report import Row, conclude
from loadtest.client import ask, connect, post
from loadtest.server_process import SERVE, ServerProcess, exit_on_sigterm

REQUESTS = 60
LINES = {"SLOW_MS": "0.001"}  # every request writes a line
STREAMS = {
    "standard output and error closed": '"$@" >&- 2>&-',
    "standard output and error on a full disk": '"$@" >/dev/full 2>&1',
    "the reader of standard output and error is gone": '"$@" 2>&1 | true',
}


def requests() -> Iterator[bytes]:
    """Right and wrong rankings, and events: all that writes to a log, a capture or a file of events."""
    ranking = json.dumps({"user": "u1", "candidates": {"item_ids": ["1", "2"]}}).encode()
    for k in range(REQUESTS // 3):
        event = json.dumps({"user": f"u{k}", "item_id": "1"}).encode()
        yield from (post("/rerank", ranking), post("/rerank", b"{"), post("/events", event))


def statuses(port: int) -> set[int]:
    """The statuses of all requests, each of which has to be answered."""
    connection = connect(port)
    try:
        return {ask(connection, request)[0] for request in requests()}
    finally:
        connection.close()


def serve_with(bundles: Path, script: str, settings: dict[str, str]) -> tuple[set[int], int]:
    """(statuses, exit code) of a server that a shell starts. `"$@"` in the script is the server's command."""
    settings = {"BUNDLES": str(bundles), "DRAIN_SECONDS": "0", "THREADS": "1"} | settings
    with ServerProcess(settings, ("bash", "-c", f"set -o pipefail; {script}", "bash", *SERVE)) as server:
        found = statuses(server.port)
        time.sleep(0.3)  # the thread that writes the lines has tried
        found |= statuses(server.port)
        server.processes()[-1].terminate()
        return found, server.process.wait(30)


@contextmanager
def small_disk() -> Iterator[Path]:
    """A file system of 2 MiB. Raises CalledProcessError without the right to mount."""
    with tempfile.TemporaryDirectory() as home:
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", home]
        subprocess.run(mount, check=True, capture_output=True)
        try:
            yield Path(home)
        finally:
            subprocess.run(["umount", "--lazy", home], check=True)


def with_full_disk(bundles: Path) -> tuple[set[int], int]:
    """Capture and events go to a disk that becomes full while the server runs."""
    with small_disk() as home:
        files = {"CAPTURE_FILE": f"{home}/capture", "CAPTURE_SHARE": "1", "CAPTURE_KEY": "key"}
        settings = files | {"EVENTS_DIR": f"{home}/events", "EVENTS_FILE_S": "1"}
        settings |= {"BUNDLES": str(bundles), "DRAIN_SECONDS": "0", "THREADS": "1"}
        with ServerProcess(settings) as server:
            found = statuses(server.port)
            with suppress(OSError), (home / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(4096))
            found |= statuses(server.port)
            time.sleep(1.5)  # a file of events is due
            found |= statuses(server.port)
            server.process.terminate()
            return found, server.process.wait(30)


def with_read_only_disk(bundles: Path) -> tuple[set[int], int]:
    """The bundles, the working folder, the home and the temporary folder are on a disk that cannot be written."""
    with small_disk() as home:
        shutil.copytree(bundles, home / "bundles")
        subprocess.run(["mount", "-o", "remount,ro", str(home)], check=True, capture_output=True)
        environment = dict(os.environ) | {"HOME": str(home), "TMPDIR": str(home)}
        settings = {"BUNDLES": str(home / "bundles"), "DRAIN_SECONDS": "0", "THREADS": "1"}
        with ServerProcess(settings, folder=home, environment=environment) as server:
            found = statuses(server.port)
            server.process.terminate()
            return found, server.process.wait(30)


def main() -> int:
    exit_on_sigterm()
    bundles = small_bundles()
    rows, notes = [], []
    for name, script in STREAMS.items():
        rows.append(row(name, *serve_with(bundles, script, LINES)))
    try:
        rows.append(row("the disk of capture and events is full", *with_full_disk(bundles)))
        rows.append(row("all disks are read-only", *with_read_only_disk(bundles)))
    except subprocess.CalledProcessError:
        notes.append("A full and a read-only disk were not tried, because this user may not mount one.")
    return conclude(rows, "\n".join(notes))


def row(fault: str, found: set[int], code: int) -> Row:
    answered = found == {200, 202, 400}
    return Row(
        "R27", f"{fault}: every request is answered", f"statuses {sorted(found)}, exit {code}", answered and code == 0
    )


if __name__ == "__main__":
    sys.exit(main())
