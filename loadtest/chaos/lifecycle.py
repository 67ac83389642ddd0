"""Ends of processes under load: python -m loadtest.chaos.lifecycle

Signals during load and while bundles load (R25); kill -9, a pause of 10 s, and an address space that is too small, each
with a second replica beside it (R26). Prints Markdown; the exit code is 1 if a criterion does not hold. Takes 90 s.

Called by: the command line, `make chaos`. Calls: `loadtest/server_process.py`, `tests/support/kept_alive.py`.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from loadtest.markdown import table
from loadtest.server_process import SERVE, ServerProcess, exit_on_sigterm
from slatewise.process import cpu_name
from slatewise.settings import default_bundles
from tests.support.kept_alive import Clients, Tally

HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
SETTINGS = {"VARIANTS": "fp32", "THREADS": "1", "DRAIN_SECONDS": "1", "MAX_QUEUE_MS": "1000000"}
LEAST = 1_500  # requests before a signal
BACK_SECONDS = 3.0  # a replica that died answers again
PAUSE_SECONDS = 10.0
MOMENTS = 6  # of a signal while bundles load
SPARE_BYTES = 1 << 20  # of address space that a replica may still take
QUIET = ("sh", "-c", 'exec "$@" >/dev/null', "sh", *SERVE)  # the request log is not part of the report


@dataclass(frozen=True)
class Line:
    number: str
    criterion: str
    found: str
    holds: bool


def example() -> dict[str, Any]:
    newest = max((default_bundles() / "movielens").glob("[0-9]*"), key=lambda folder: int(folder.name))
    body: dict[str, Any] = json.loads((newest / "manifest.json").read_text())["example"]
    return body


def clients_of(server: ServerProcess, body: dict[str, Any], count: int = 8, pause: float = 0.005) -> Clients:
    content = json.dumps(body).encode()
    return Clients(server.port, HEAD, lambda _: content, count, pause)


async def until(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until the condition holds. Raises TimeoutError after `seconds`."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > seconds:
            raise TimeoutError
        await asyncio.sleep(0.005)
    return time.monotonic() - begin


async def signal_under_load(number: signal.Signals) -> Line:
    """Kept connections, some busy and some with pauses, through the drain and beyond its end."""
    with ServerProcess(SETTINGS, QUIET) as server:
        busy = clients_of(server, example(), 12, 0.0)
        slow = clients_of(server, example(), 12, 0.05)
        running = [asyncio.create_task(each.run()) for each in (busy, slow)]
        await until(lambda: len(busy.tally.answered) + len(slow.tally.answered) >= LEAST, 120)
        begin = time.monotonic()
        server.process.send_signal(number)
        tallies = await asyncio.gather(*running)
        code = await asyncio.to_thread(server.process.wait, 60)
        seconds = time.monotonic() - begin
    lost = [each for tally in tallies for each in tally.lost]
    count = sum(len(tally.answered) for tally in tallies)
    wrong = {status for tally in tallies for status in tally.statuses()} - {200}
    found = f"{count} answered, {len(lost)} lost, other statuses {wrong or 'none'}, exit {code} after {seconds:.1f} s"
    holds = not lost and not wrong and code == 0 and seconds < 10
    return Line("R25", f"{number.name} under load, kept connections: no accepted request is lost, exit 0", found, holds)


def start_loading() -> subprocess.Popen[bytes]:
    return subprocess.Popen([*SERVE, "--port", "0"], stderr=subprocess.PIPE)


async def signal_while_loading() -> Line:
    """At random moments between the start of the process and the first answer."""
    codes, slowest = [], 0.0
    for seed in range(MOMENTS):
        process = start_loading()
        caught = Path(f"/proc/{process.pid}/status")
        await until(lambda: bool(int(caught.read_text().split("SigCgt:")[1].split()[0], 16) & 1), 30)  # noqa: B023
        await asyncio.sleep(random.Random(seed).uniform(0, 1.5))
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        error = (await asyncio.to_thread(process.communicate, None, 60))[1]
        slowest = max(slowest, time.monotonic() - begin)
        codes.append(process.returncode if b"Traceback" not in error else -1)
    found = f"exit codes {codes}, at most {slowest:.1f} s"
    holds = set(codes) == {0} and slowest < 5
    return Line("R25", "SIGTERM while libraries and bundles load: exit 0 within 5 s", found, holds)


async def beside(fault: Callable[[ServerProcess], Any]) -> tuple[Tally, Tally, Any]:
    """Load two replicas, and let `fault` happen to the first. Returns the tallies of both, and what `fault` returns."""
    with ServerProcess(SETTINGS, QUIET) as first, ServerProcess(SETTINGS, QUIET) as second:
        hit, other = clients_of(first, example(), 4), clients_of(second, example(), 4)
        running = [asyncio.create_task(each.run()) for each in (hit, other)]
        await until(lambda: len(other.tally.answered) >= 300, 120)
        result = await fault(first)
        await asyncio.sleep(1)
        hit.stopping = other.stopping = True
        await asyncio.wait(running, timeout=30)
        return hit.tally, other.tally, result


def start_again(server: ServerProcess) -> None:
    server.process.wait()
    server.process = subprocess.Popen(server.command, env=server.environment, start_new_session=True)
    server.wait_until_ready()


async def restart(server: ServerProcess) -> float:
    """Start the process again, as a supervisor does. Seconds until it is ready."""
    begin = time.monotonic()
    await asyncio.to_thread(start_again, server)
    return time.monotonic() - begin


def unharmed(other: Tally) -> tuple[str, bool]:
    good = not other.lost and not other.refused and other.statuses() == {200}
    return f"beside it {len(other.answered)} answered, {len(other.lost) + other.refused} lost", good


async def killed() -> Line:
    async def kill(server: ServerProcess) -> float:
        server.process.kill()
        return await restart(server)

    _, other, seconds = await beside(kill)
    text, good = unharmed(other)
    found = f"{text}; ready again after {seconds:.1f} s"
    holds = good and seconds <= BACK_SECONDS
    return Line("R26", "kill -9 of one of two: the other unharmed, back within 3 s", found, holds)


async def stopped() -> Line:
    async def pause(server: ServerProcess) -> float:
        server.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(PAUSE_SECONDS)
        server.process.send_signal(signal.SIGCONT)
        begin = time.monotonic()
        await asyncio.to_thread(server.wait_until_ready)
        return time.monotonic() - begin

    hit, other, seconds = await beside(pause)
    text, good = unharmed(other)
    found = f"{text}; ready {seconds:.1f} s after SIGCONT, {len(hit.lost)} of its own requests lost"
    holds = good and seconds <= BACK_SECONDS and not hit.lost
    return Line("R26", "SIGSTOP for 10 s of one of two: the other unharmed, back within 3 s, none lost", found, holds)


async def out_of_memory() -> Line:
    """The address space is limited as `ulimit -v` does, to little more than it is, and large requests come."""
    statuses: set[int] = set()

    async def starve(server: ServerProcess) -> float:
        process = psutil.Process(server.process.pid)
        size = process.memory_info().vms + SPARE_BYTES
        process.rlimit(psutil.RLIMIT_AS, (size, psutil.RLIM_INFINITY))
        ids = [str(k) for k in range(4096)]
        large = clients_of(server, example() | {"candidates": {"item_ids": ids}}, 16, 0.0)
        running = asyncio.create_task(large.run())
        await asyncio.sleep(3)
        large.stopping = True
        await asyncio.wait([running], timeout=30)
        statuses.update(large.tally.statuses())
        begin = time.monotonic()
        if server.process.poll() is not None:
            statuses.add(0)
            return await restart(server)
        process.rlimit(psutil.RLIMIT_AS, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        await asyncio.to_thread(server.wait_until_ready)
        after = clients_of(server, example(), 1)
        task = asyncio.create_task(after.run())
        await until(lambda: bool(after.tally.answered), 10)
        after.stopping = True
        await task
        statuses.update(10_000 + status for status in after.tally.statuses())
        return time.monotonic() - begin

    _, other, seconds = await beside(starve)
    text, good = unharmed(other)
    own = sorted(status for status in statuses if 0 < status < 10_000)
    end = "it died and was started again" if 0 in statuses else "it lived, and answers after it"
    recovered = 10_200 in statuses or 0 in statuses
    happened = 500 in own or 0 in statuses  # else there was memory enough
    holds = happened and good and seconds <= BACK_SECONDS and set(own) <= {200, 429, 500, 503} and recovered
    found = f"{text}; its own statuses {own}; {end}, after {seconds:.1f} s"
    return Line("R26", "no address space left in one of two: the other unharmed, back within 3 s", found, holds)


async def run_all() -> list[Line]:
    return [
        await signal_under_load(signal.SIGTERM),
        await signal_under_load(signal.SIGHUP),
        await signal_while_loading(),
        await killed(),
        await stopped(),
        await out_of_memory(),
    ]


def main() -> int:
    """Print the report. The exit code is 1 if a criterion does not hold."""
    exit_on_sigterm()
    lines = asyncio.run(run_all())
    print(f"## Ends of processes\n\n{cpu_name()}. `python -m loadtest.chaos.lifecycle`\n")
    rows = [(line.number, line.criterion, line.found, "pass" if line.holds else "fail") for line in lines]
    print(table(("test", "criterion", "found", "result"), rows))
    return int(not all(line.holds for line in lines))


if __name__ == "__main__":
    sys.exit(main())
