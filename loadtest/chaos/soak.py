"""R29. Memory, descriptors, threads and tasks of a server over a million requests of mixed shapes.

Meanwhile Redis fails and recovers, and two versions of the bundle are switched by `/admin`; each switch is a load from
the disk. First the same test has to fail with a server that leaks on purpose, so that its limits are known to find a
leak.

Called by: `__main__.py`, and the command line: python -m loadtest.chaos.soak [--requests 1000000]. Calls: `bundle.py`,
`traffic.py`, `watched_server.py`, `reload.py`, `report.py`, and the fault proxy of the store's measurements.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from loadtest.chaos.bundle import NAME, push_vectors, small_bundles
from loadtest.chaos.reload import admin
from loadtest.chaos.report import Row, conclude
from loadtest.chaos.traffic import Deck, Traffic
from loadtest.chaos.watched_server import LEAK, TASKS
from loadtest.client import ask
from loadtest.client import connect as connect_http
from loadtest.server_process import ServerProcess, exit_on_sigterm
from loadtest.store.faults import FAULTS, ProxyThread, proxy_thread
from loadtest.workload import Workload
from slatewise.process import CGROUP
from slatewise.store.client import connect
from tests.support.redis_server import run_redis
from tests.support.versions import KEY

REQUESTS = 1_000_000
CONNECTIONS = 6
CONTROL_SHARE = 0.03  # of the requests, for the server that leaks
LEAST_CONTROL = 6_000
LEAST_WARM_UP = 500
MOST_HISTORY, MOST_CANDIDATES = 160, 200
SETTINGS = {
    "HISTORY_CACHE_MB": "8",
    "EMBEDDING_CACHE_USERS": "1000",
    "DRAIN_SECONDS": "0",
    "THREADS": "1",
    "RELOAD": "admin",
    "ADMIN_KEY": KEY,
}
SLOPE_LIMIT = 1.0  # MB in 100,000 requests, from the middle of the run on
GROWTH_LIMIT = 0.05  # of the memory in the middle of the run
FAULT_SECONDS = 1.5  # and as long without a fault
SAMPLE_SECONDS = 0.5
REST_SECONDS = 1.5
MORE_DESCRIPTORS = 8  # connections to Redis, of which a server may have some more than before


class Sample(NamedTuple):
    done: int  # requests
    mb: float  # resident
    descriptors: int
    threads: int
    tasks: int
    group_mb: float = math.nan  # memory of the server's cgroup, with the page cache and whatever else is in it


def sample(server: ServerProcess, done: int) -> Sample:
    process = psutil.Process(server.process.pid)
    tasks = int(server.get(TASKS)[1])
    mb = process.memory_info().rss / 2**20
    return Sample(done, mb, process.num_fds(), process.num_threads(), tasks, group_mb(server.process.pid))


def group_mb(pid: int) -> float:
    """Memory of the cgroup (version 2 or 1) of a process; NaN if it cannot be read."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            names = {"": f".{path}/memory.current", "memory": f"memory{path}/memory.usage_in_bytes"}
            if kinds in names and (CGROUP / names[kinds]).exists():
                return int((CGROUP / names[kinds]).read_text()) / 2**20
    return math.nan


def second_half(samples: list[Sample]) -> np.ndarray:
    """(samples, 2): requests and MB."""
    middle = samples[-1].done / 2
    return np.array([(each.done, each.mb) for each in samples if each.done >= middle], float)


def slope(samples: list[Sample]) -> float:
    """MB in 100,000 requests from the middle of the run on, by least squares."""
    done, mb = second_half(samples).T
    return float(np.polyfit(done, mb, 1)[0] * 1e5)


def growth(samples: list[Sample]) -> float:
    """Growth from the middle to the end, as a share: means of the first and the last fifth of that time."""
    mb = second_half(samples)[:, 1]
    part = max(1, len(mb) // 5)
    return float(mb[-part:].mean() / mb[:part].mean() - 1)


class Disturbances:
    """Faults of Redis one after the other, each with another version and an emptied Redis, until it is stopped."""

    def __init__(self, bundles: Path, redis_port: int) -> None:
        self.bundles = bundles
        self.redis_port = redis_port
        self.stopping = threading.Event()
        self.done = 0
        self.switches: Counter[int] = Counter()  # by status

    def empty(self) -> None:
        with connect(f"redis://127.0.0.1:{self.redis_port}/0") as client:
            client.flushall()
        push_vectors(self.bundles, self.redis_port)

    def switch(self, port: int) -> None:
        """Serve the other version."""
        connection = connect_http(port)
        try:
            status, _ = ask(connection, admin(f"{NAME}/switch", {"version": 2 - self.done % 2}))
        finally:
            connection.close()
        self.switches[status] += 1

    def work(self, proxy: ProxyThread, port: int) -> None:
        for fault in itertools.cycle(list(FAULTS.values())[1:]):  # the first is "none"
            proxy.loop.call_soon_threadsafe(fault, proxy.proxy)
            self.switch(port)
            self.stopping.wait(FAULT_SECONDS)
            proxy.heal()
            self.empty()
            self.done += 1
            if self.stopping.wait(FAULT_SECONDS):
                return

    @contextmanager
    def running(self, proxy: ProxyThread, port: int) -> Iterator[None]:
        """`port`: of the server. Raises at the end what went wrong in the thread."""
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(self.work, proxy, port)
            try:
                yield
            finally:
                self.stopping.set()
        work.result()


class Outcome(NamedTuple):
    """Samples during the run, and those of the idle server before and after it."""

    samples: list[Sample]
    before: Sample
    after: Sample
    traffic: Traffic
    faults: int
    switches: Counter[int]  # of versions, by status
    seconds: float
    cpu_seconds: float  # of the server

    @property
    def flat(self) -> bool:
        """Whether the memory passes the test."""
        return slope(self.samples) <= SLOPE_LIMIT and growth(self.samples) <= GROWTH_LIMIT


def follow(server: ServerProcess, traffic: Traffic) -> list[Sample]:
    """Sample until all requests are sent. Say how far it is."""
    samples = []
    said = time.monotonic()
    traffic.start()
    while traffic.running:
        time.sleep(SAMPLE_SECONDS)
        samples.append(sample(server, traffic.done))
        if time.monotonic() > said + 20:
            said = time.monotonic()
            last = samples[-1]
            print(f"soak: {last.done:,} of {traffic.requests:,}, {last.mb:.1f} MB", file=sys.stderr, flush=True)
    traffic.join()
    return samples


def run(requests: int, leaks: bool = False) -> Outcome:
    """Serve, warm up without faults, then send the requests while Redis fails and versions change again and again."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bundles = home / "bundles"
        publish_two(bundles)
        redis_port = stack.enter_context(run_redis(home))
        proxy = stack.enter_context(proxy_thread(redis_port))
        disturbances = Disturbances(bundles, redis_port)
        push_vectors(bundles, redis_port)
        settings = SETTINGS | {"BUNDLES": str(bundles), "REDIS_URL": f"redis://127.0.0.1:{proxy.proxy.port}/0"}
        environment = dict(os.environ) | ({LEAK: "1"} if leaks else {})
        log = home / "log"  # a line for each wrong request
        command = ("sh", "-c", f'exec "$@" >{log} 2>&1', "sh", sys.executable, "-m", "loadtest.chaos.watched_server")
        server = stack.enter_context(ServerProcess(settings, command, environment=environment))
        deck = Deck(Workload(bundles), MOST_HISTORY, MOST_CANDIDATES)
        warm = Traffic(server.port, deck, max(LEAST_WARM_UP, requests // 20), CONNECTIONS)
        follow(server, warm)
        before = at_rest(server)
        traffic = Traffic(server.port, deck, requests, CONNECTIONS)
        begin, cpu = time.monotonic(), server.cpu_seconds()
        with disturbances.running(proxy, server.port):
            samples = follow(server, traffic)
        seconds, cpu = time.monotonic() - begin, server.cpu_seconds() - cpu
        after = at_rest(server)
        return Outcome(samples, before, after, traffic, disturbances.done, disturbances.switches, seconds, cpu)


def publish_two(bundles: Path) -> None:
    """Write versions 1 and 2 of the small bundle, which differ by their number."""
    shutil.copytree(small_bundles(), bundles)
    shutil.copytree(bundles / NAME / "1", bundles / NAME / "2")
    manifest = bundles / NAME / "2" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 2}))


def at_rest(server: ServerProcess) -> Sample:
    """A sample of the server without requests."""
    time.sleep(REST_SECONDS)
    return sample(server, 0)


def rows_of(found: Outcome, control: Outcome) -> list[Row]:
    before, after, samples = found.before, found.after, found.samples
    statuses = dict(sorted(found.traffic.statuses.items()))
    memory = f"{samples[0].mb:.0f} to {samples[-1].mb:.0f} MB"
    counts = f"{before.descriptors} to {after.descriptors}, {before.threads} to {after.threads}, "
    return [
        Row(
            "R29",
            f"memory slope from mid-run at most {SLOPE_LIMIT:g} MB in 100,000 requests",
            f"{slope(samples):.2f} MB in 100,000 of {found.traffic.requests:,}; {memory}",
            slope(samples) <= SLOPE_LIMIT,
        ),
        Row(
            "R29",
            f"memory growth from mid-run at most {GROWTH_LIMIT:.0%}",
            f"{growth(samples):.1%}",
            growth(samples) <= GROWTH_LIMIT,
        ),
        Row(
            "R29",
            "descriptors, threads, tasks as before",
            counts + f"{before.tasks} to {after.tasks}",
            after.descriptors <= before.descriptors + MORE_DESCRIPTORS
            and after.threads == before.threads
            and after.tasks <= before.tasks + MORE_DESCRIPTORS,
        ),
        Row("R29", "no status that the request does not allow", f"{statuses}", not found.traffic.wrong),
        Row(
            "R29",
            "versions change while Redis fails: every switch succeeds",
            f"{found.switches[200]:,} of {found.switches.total():,} switches",
            set(found.switches) == {200},
        ),
        Row(
            "R29",
            "a server that leaks on purpose fails the same test",
            f"{slope(control.samples):.1f} MB in 100,000 of {control.traffic.requests:,} requests",
            not control.flat,
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.chaos.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=int(os.environ.get("CHAOS_REQUESTS", REQUESTS)))
    requests = parser.parse_args().requests
    exit_on_sigterm()
    control = run(max(LEAST_CONTROL, int(requests * CONTROL_SHARE)), leaks=True)
    found = run(requests)
    middle = found.samples[len(found.samples) // 2]
    notes = [
        f"{requests:,} requests over {CONNECTIONS} connections in {found.seconds:.0f} s, of which the server computed "
        f"{found.cpu_seconds:.0f} s. In {found.traffic.left_early:,} clients left without reading. "
        f"{found.faults:,} faults of Redis, each with a switch of the version and followed by an emptied Redis. "
        "The cgroup of server, clients and Redis, with the page cache and all other work in it, had "
        f"{middle.group_mb:.0f} MB in the middle and {found.samples[-1].group_mb:.0f} MB at the end."
    ]
    notes += [f"{count} x {what}" for what, count in found.traffic.wrong.most_common(10)]
    return conclude(rows_of(found, control), "\n".join(notes))


if __name__ == "__main__":
    sys.exit(main())
