"""Two replicas, a Redis and a light load, and the faults that are injected into them one after the other.

Called by: `dashboards.py`. Calls: `server_process.py`, `traffic.py`, `tests/support/redis_server.py`.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.client import closed_loop, limit_time, open_loop, post
from loadtest.observability.prometheus import Prometheus
from loadtest.server_process import ServerProcess
from loadtest.traffic import visits
from loadtest.workload import Shape, Workload
from slatewise.bundle.adapted_items import AdaptedItems
from slatewise.inference.arrays import UNKNOWN_ITEM
from slatewise.store.adapted_items import write_items
from slatewise.store.client import connect
from slatewise.store.generations import Generations
from slatewise.store.push import push, read
from tests.support.network import free_port
from tests.support.redis_server import run_redis

PER_SECOND = 10  # requests to each replica
NEW_ITEM = "new"  # which the ranker does not know, with a vector in Redis
SETTINGS = {
    "THREADS": "1",
    "DRAIN_SECONDS": "0",
    "EMBEDDING_CACHE_S": "2",
    "MAX_IN_FLIGHT": "24",
    "SLOW_MS": "100",
    "LOG_FORMAT": "json",
}
RAISED = {  # fault -> the alerts that it must raise
    "Redis killed": {"StoreCircuitOpen"},
    "Redis back, and empty": {"NoMetaEmbeddings"},
    "unreadable values in Redis": {"MetaEmbeddingsCorrupt"},
    "overload": {"AvailabilityBurnFast", "LatencyBurnFast"},  # cheaper exits and 429 come before the input order
    "deadlines too short": {"AnswersUnranked"},
    "unknown items": {"UnknownItems"},
    "one replica killed": {"ReplicaDown"},
    "both replicas killed": {"NoReplica", "ReplicaDown"},
}


@dataclass(frozen=True)
class Fault:
    """A fault and the time in which it was active, in unix seconds."""

    name: str
    begin: float
    end: float


class Scene:
    """The servers, the load and the faults so far."""

    def __init__(self, stack: ExitStack, folder: Path, bundles: Path) -> None:
        self.stack = stack
        self.folder = folder
        self.bundles = bundles
        self.workload = Workload(bundles)
        self.redis_port = free_port()
        self.ports = [free_port(), free_port()]
        self.servers: list[ServerProcess] = []
        self.faults: list[Fault] = []
        self.stop = threading.Event()

    @property
    def redis_url(self) -> str:
        return f"redis://127.0.0.1:{self.redis_port}/0"

    def serve(self, k: int) -> ServerProcess:
        """Start replica `k` with its log in replica-`k`.jsonl."""
        own = {"BUNDLES": str(self.bundles), "REDIS_URL": self.redis_url, "EVENTS_DIR": str(self.folder / "events")}
        settings = own | SETTINGS
        command = ("sh", "-c", f"exec {sys.executable} -m slatewise serve 2>> {self.folder}/replica-{k}.jsonl")
        return self.stack.enter_context(ServerProcess(settings, command, self.ports[k]))

    def fill_redis(self) -> None:
        """Write the users' vectors, and one of a new item."""
        ranker, space, users, vectors = read(self.workload.folder)
        items = np.load(self.workload.folder / "items.npy", mmap_mode="r")
        new = AdaptedItems([NEW_ITEM], items[[UNKNOWN_ITEM]], np.ones(1, np.int64), time.time())
        with connect(self.redis_url) as client:
            push(Generations(client, ranker, space, 0), users, vectors)
            write_items(client, ranker, int(self.workload.folder.name), new)

    def spoil_redis(self) -> None:
        """Overwrite every user's vector with an invalid value."""
        with connect(self.redis_url) as client:
            for key in client.scan_iter("slatewise:*:emb:*"):
                for name in client.hkeys(key):
                    client.hset(key, name, b"not a vector")

    def light_load(self, k: int) -> None:
        """Send a light load to replica `k` until the end, also while it is down."""
        requests = visits(Workload(self.bundles, seed=k))
        while not self.stop.is_set():
            try:
                open_loop(self.ports[k], limit_time(2, requests), PER_SECOND, 8)
            except OSError:
                time.sleep(0.3)

    def events(self) -> None:
        """Send events of users, and rank them by their stored histories, until the end.

        Half of the rankings explore, and one candidate of each is new.
        """
        ids = self.workload.ids
        candidates = [*ids[:20], NEW_ITEM]
        for k in itertools.count():
            if self.stop.wait(0.2):
                return
            user = f"events:{k % 20}"
            event = json.dumps({"user": user, "item_id": ids[k % 500], "event_id": str(k)}).encode()
            ranking = json.dumps(
                {"user": user, "candidates": {"item_ids": candidates}, "explore": float(k // 2 % 2)}
            ).encode()
            with suppress(OSError):
                closed_loop(self.ports[k % 2], [post("/events", event, user), post("/rerank", ranking, user)], 1)

    @contextmanager
    def fault(self, name: str) -> Iterator[None]:
        print(name, file=sys.stderr)
        begin = time.time()
        yield
        self.faults.append(Fault(name, begin, time.time()))

    def load(self, seconds: float, connections: int, shape: Shape, **members: Any) -> None:
        """A closed loop on both replicas."""

        def run(port: int) -> None:
            bodies = [post("/rerank", body) for body in self.workload.distinct(shape, 40, **members)]
            closed_loop(port, limit_time(seconds, (bodies[k % 40] for k in range(10**6))), connections)

        threads = [threading.Thread(target=run, args=(port,)) for port in self.ports]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@dataclass(frozen=True)
class Observation:
    """The finished run: its faults, its time in unix seconds, and degraded answers by reason in (log, metrics)."""

    faults: list[Fault]
    begin: float
    end: float
    degraded: dict[str, tuple[int, int]]
    bundle: str  # version


def observe(scene: Scene, evaluate: Callable[[Prometheus, Observation], None]) -> None:
    """Inject the faults, with quiet time between them, and call `evaluate` while Prometheus still runs."""
    loads = [threading.Thread(target=scene.light_load, args=(k,), daemon=True) for k in range(2)]
    loads.append(threading.Thread(target=scene.events, daemon=True))
    redis = scene.stack.enter_context(ExitStack())
    redis.enter_context(run_redis(scene.folder, scene.redis_port))
    scene.fill_redis()
    scene.servers = [scene.serve(k) for k in range(2)]
    with Prometheus(scene.folder, scene.ports) as prometheus:
        for thread in loads:
            thread.start()
        time.sleep(12)  # Prometheus finds both replicas, and alerts of the start clear
        begin = time.time()
        time.sleep(20)
        store_faults(scene, redis)
        time.sleep(15)
        request_faults(scene)
        time.sleep(10)
        degraded = replica_faults(scene)
        time.sleep(45)  # until the windows of the burn rates are clean
        end = time.time()
        scene.stop.set()
        evaluate(prometheus, Observation(scene.faults, begin, end, degraded, scene.workload.folder.name))


def store_faults(scene: Scene, redis: ExitStack) -> None:
    with scene.fault("Redis killed"):
        redis.close()
        time.sleep(15)
    with scene.fault("Redis back, and empty"):
        redis.enter_context(run_redis(scene.folder, scene.redis_port))
        time.sleep(14)
        scene.fill_redis()
    time.sleep(10)
    with scene.fault("unreadable values in Redis"):
        scene.spoil_redis()
        time.sleep(12)
        scene.fill_redis()


def request_faults(scene: Scene) -> None:
    with scene.fault("overload"):
        scene.load(7, 40, Shape(200, 200))
        scene.load(7, 20, Shape(200, 200), allow_degraded=False)
    time.sleep(15)
    with scene.fault("deadlines too short"):
        scene.load(6, 4, Shape(200, 500), deadline_ms=4)
        scene.load(3, 4, Shape(200, 500), deadline_ms=1)
        scene.load(6, 4, Shape(200, 500), deadline_ms=1)
    time.sleep(10)
    with scene.fault("unknown items"):
        known = scene.workload.ids
        scene.workload.ids = [f"new-{k}" for k in range(1_000)]
        scene.load(25, 1, Shape(5, 100), deadline_ms=1_000)
        scene.workload.ids = known


def replica_faults(scene: Scene) -> dict[str, tuple[int, int]]:
    """Kill one replica, then both. Returns `degraded_answers` just before the second is killed for the first time."""
    with scene.fault("one replica killed"):
        scene.servers[0].process.kill()
        time.sleep(10)
        scene.servers[0] = scene.serve(0)
    time.sleep(10)
    with scene.fault("both replicas killed"):
        degraded = degraded_answers(scene)
        for server in scene.servers:
            server.process.kill()
        time.sleep(10)
        scene.servers = [scene.serve(k) for k in range(2)]
    return degraded


def degraded_answers(scene: Scene) -> dict[str, tuple[int, int]]:
    """Degraded answers of the second replica by reason: (lines in its log, value of its metric)."""
    text = str(scene.servers[1].get("/metrics")[1])
    counted = {
        reason: int(float(value))
        for reason, value in re.findall(r'slatewise_degraded_total\{reason="(\w+)"\} (\S+)', text)
    }
    dropped = re.search(r'slatewise_lines_total\{kind="log",result="dropped"\} (\S+)', text)
    assert dropped and float(dropped[1]) == 0, "log lines were dropped"
    lines = [json.loads(line) for line in (scene.folder / "replica-1.jsonl").read_text().splitlines()]
    logged = Counter(reason for line in lines for reason in line.get("reasons", ()))  # others are of the server
    return {reason: (logged[reason], value) for reason, value in counted.items()}
