"""Try docker-compose.yml with real containers: python -m loadtest.compose [--no-refresh] [--report FILE]

Builds the images from a copy of the checkout, starts, asks, scales, kills, rolls and takes down, in a project of its
own on free ports. Base images are pulled, or taken from this machine. Writes a dated report. Takes about eight minutes,
and with `refresh` and `update` also a download of torch. Grafana is not started.

Called by: `make compose-check`. Calls: `steps.py`, `more_steps.py`, `docker.py`. Needs docker with the plug-in
compose, and nothing beyond Python's standard library.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from loadtest.compose import more_steps, steps
from loadtest.compose.docker import ROOT, Stack, missing, private_copy
from loadtest.markdown import table
from slatewise.process import cpu_name

REPORT = ROOT / "docs" / "compose-report.md"
STEPS: dict[str, Callable[[Stack], str]] = {
    "a checkout made under `umask 077`": steps.permissions,
    "`docker compose build`": steps.build,
    "`docker compose up`": steps.up,
    "rankings": steps.answers,
    "limits of the container (R28)": steps.limits,
    "user and file system": steps.own_user,
    "jemalloc": steps.allocator,
    "an idle replica": steps.idle,
    "`--profile load` with keys": steps.keys_and_load,
    "`docker compose restart` of a single replica": steps.restart_single,
    "`--profile scale`": steps.scale,
    "a user keeps its replica": steps.stickiness,
    "`docker compose stop` of one of two replicas": steps.stop_one,
    "`deploy/compose/roll`": steps.roll,
    "a replica crashes (SIGKILL)": steps.crash_one,
    "`docker kill` of slatewise": partial(steps.kill_replica, service="slatewise"),
    "`docker kill` of slatewise-2": partial(steps.kill_replica, service="slatewise-2"),
    "`docker kill` of redis": steps.kill_redis,
    "`docker kill` of prometheus": steps.kill_prometheus,
    "`docker kill` of haproxy": steps.kill_haproxy,
    "a new bundle, and back": more_steps.bundles,
    "256 descriptors, 64 threads, `--cpus 0.5` (R28)": more_steps.tight,
    "`refresh`": more_steps.refresh,
    "`update`": more_steps.update,
    "HAProxy stops under load, then `docker compose down`": steps.down,
}


def images(stack: Stack) -> str:
    """The programs that ran under the names of the compose file."""
    found = []
    for image, command in (
        ("redis:8.2.2-bookworm", ["redis-server", "--version"]),
        ("haproxy:3.2.4-alpine", ["haproxy", "-v"]),
        ("prom/prometheus:v3.5.0", ["prometheus", "--version"]),
    ):
        line = stack.run("docker", "run", "--rm", "--entrypoint", command[0], image, command[1]).strip().splitlines()[0]
        found.append(f"`{image}`: {line.split(' sha=')[0].split(' (branch')[0].split(' - http')[0]}")
    return "; ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.compose", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--no-refresh", action="store_true", help="leave out `refresh` and `update`, whose image has torch"
    )
    parser.add_argument("--report", type=Path, default=REPORT, help="file to write (default: %(default)s)")
    args = parser.parse_args()
    if reason := missing():
        print(f"compose-check: {reason}", file=sys.stderr)
        return 1
    private_copy()
    stack = Stack()
    stack.down()
    rows, failed = [], 0
    try:
        for name, step in STEPS.items():
            if args.no_refresh and step in (more_steps.refresh, more_steps.update):
                continue
            begin = time.monotonic()
            try:
                result, found = "ok", step(stack)
            except (AssertionError, RuntimeError, TimeoutError, OSError, ValueError, KeyError) as error:
                result, found = "**failed**", " ".join(str(error).split())[:600] or repr(error)
                failed += 1
            rows.append((name, found, result, f"{time.monotonic() - begin:.0f}"))
            print(" | ".join(rows[-1]), flush=True)
        programs = images(stack)
    finally:
        stack.down()
    version = stack.run("docker", "version", "--format", "{{.Server.Version}}").split()[-1]
    plugin = stack.compose("version", "--short").strip()
    setting = (
        f"{datetime.now(UTC):%Y-%m-%d}, commit {steps.commit()}, `make compose-check`, {cpu_name()}; Docker {version}, "
        f"compose {plugin}. {programs}. Loads are 25 requests/s of plain clients that repeat nothing."
    )
    counts = f"**{len(rows)} steps, {failed} failed.**"
    titles = ("step", "found", "", "s")
    args.report.write_text(
        "\n\n".join(["# The compose file in real containers", setting, counts, table(titles, rows)]) + "\n"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
