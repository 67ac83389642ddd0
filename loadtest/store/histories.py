"""Stored histories under events and rankings: python -m loadtest.store.histories [--users 100000] [--fsync everysec]

    memory    bytes of a user in Redis, with histories of several lengths
    ranking   p50, p99 and CPU of requests whose history is stored, under events; of the same requests with the history
              in them, under events; and of those without events. Blocks of the three take turns
    faults    events go on while one of two replicas is killed and started again, and while Redis is killed and started
              again on its append-only file; then every event that was acknowledged must be in its history, except
              for those of the seconds that Redis may keep out of its file
    encode    CPU of the first request after POST /encode, and of the request after it, which finds the same kept state

Prints Markdown tables, then a line of JSON. Clients, servers and Redis share this machine's cores.
Called by: the command line. Its numbers appear in docs/events.md. Calls: `client.py`, `server_process.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis

from loadtest.client import ask, post
from loadtest.client import connect as connect_http
from loadtest.markdown import table
from loadtest.server_process import ServerProcess, exit_on_sigterm
from slatewise.events.event import Event
from slatewise.events.packed import merge, unpack
from slatewise.events.redis_histories import history_key
from slatewise.process import cpu_name
from tests.support.network import free_port
from tests.support.redis_server import redis_command

EVENTS_A_SECOND = 200
RANKINGS_A_SECOND = 50
LENGTHS = (10, 20, 50, 100, 200)  # events of a user, each for a fifth of the users
TEMPLATES = 500  # different histories; more would take longer to make than to measure
BLOCK_SECONDS = 2.0
ROUNDS = 20  # a block of each kind; a p99 of 2,000 requests is the twentieth slowest
FAULT_SECONDS = 25.0
UNSYNCED_SECONDS = 2.0  # Redis delays a write to its file for so long while the file is synchronized
ENCODE_ROUNDS = 25
ENCODE_USERS = 20
BUDGET_MS = 50  # of a read: server, clients and Redis wait for the same cores


class RedisProcess:
    """A Redis with an append-only file, synchronized every second. It can be killed and started again."""

    def __init__(self, folder: Path, fsync: str) -> None:
        self.port = free_port()
        self.command = [*redis_command(folder, self.port), "--appendonly", "yes", "--appendfsync", fsync]
        self.client = redis.Redis(port=self.port)

    def __enter__(self) -> RedisProcess:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(redis.RedisError):  # also while it loads the file
                self.client.ping()
                return self
            time.sleep(0.05)
        raise RuntimeError("redis-server did not start")

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def fill(store: RedisProcess, users: int, items: list[str], actions: list[str]) -> dict[str, Any]:
    """Give each user a history. Return the bytes that one user takes, by length and on average."""
    chance = random.Random(0)
    now = time.time() - 10**7
    client = store.client
    result: dict[str, Any] = {}
    start = client.info("memory")["used_memory"]
    for group, length in enumerate(LENGTHS):
        values = []
        for _ in range(TEMPLATES // len(LENGTHS)):
            events = [
                (Event("", chance.choice(items), chance.choice(actions), round(now + 60.0 * k, 3), "", f"{k}"), now)
                for k in range(length)
            ]
            values.append(merge(None, events, length)[0])
        before = client.info("memory")["used_memory"]
        mine = range(group, users, len(LENGTHS))
        for first in range(0, len(mine), 1_000):
            pipe = client.pipeline(transaction=False)
            for user in mine[first : first + 1_000]:
                pipe.set(history_key(f"u{user}"), values[user % len(values)], ex=90 * 86_400)
            pipe.execute()
        result[str(length)] = (client.info("memory")["used_memory"] - before) / len(mine)
    result["mean"] = (client.info("memory")["used_memory"] - start) / users
    return result


class EventLoad:
    """Sends single events at a fixed rate inside its `with` block, each until it is acknowledged by some replica."""

    def __init__(self, ports: list[int], users: int, items: list[str]) -> None:
        self.ports = ports
        self.users = users
        self.items = items
        self.stop = threading.Event()
        self.acknowledged: list[tuple[str, str, float, float]] = []  # user, item, time, time of the answer
        self.name = f"load-{time.time()}"
        self.statuses: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.lock = threading.Lock()
        self.next = 0

    def work(self, chance: random.Random) -> None:
        connections: dict[int, Any] = {}
        while not self.stop.is_set():
            with self.lock:
                turn = self.next
                self.next += 1
            time.sleep(max(0.0, self.begin + turn / EVENTS_A_SECOND - time.monotonic()))
            user, item, at = f"u{chance.randrange(self.users)}", chance.choice(self.items), round(time.time(), 3)
            body = json.dumps(
                {"user": user, "item_id": item, "timestamp": at, "event_id": f"{self.name}-{turn}"}
            ).encode()
            begin = time.perf_counter()
            for attempt in range(200):
                port = self.ports[(turn + attempt) % len(self.ports)]
                try:
                    if port not in connections:
                        connections[port] = connect_http(port)
                    status = ask(connections[port], post("/events", body))[0]
                except OSError:
                    connections.pop(port, None)
                    self.statuses["no connection"] += 1
                    time.sleep(0.05)
                    continue
                self.statuses[str(status)] += 1
                if status == 202:
                    self.acknowledged.append((user, item, at, time.time()))
                    self.seconds.append(time.perf_counter() - begin)
                    break
                time.sleep(0.2)

    def __enter__(self) -> EventLoad:
        self.begin = time.monotonic()
        self.threads = [threading.Thread(target=self.work, args=(random.Random(k),)) for k in range(8)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def lost(self, client: redis.Redis) -> list[float]:
        """The times of the answers to events that are not in the history of their user."""
        users = sorted({user for user, *_ in self.acknowledged})
        found: dict[str, set[tuple[str, float | None]]] = {}
        for first in range(0, len(users), 1_000):
            some = users[first : first + 1_000]
            for user, value in zip(some, client.mget(list(map(history_key, some))), strict=True):
                history = unpack(value, 10_000) if value is not None else None
                if history is not None:
                    found[user] = set(zip(history.item_ids, history.timestamps or [], strict=True))
        return [answered for user, item, at, answered in self.acknowledged if (item, at) not in found.get(user, set())]


class Ranker:
    """Ranks random users at a fixed rate, in blocks."""

    def __init__(self, server: ServerProcess, client: redis.Redis, users: int, example: dict[str, Any]) -> None:
        self.server = server
        self.client = client
        self.users = users
        self.example = {name: value for name, value in example.items() if name != "history"}
        self.chance = random.Random(7)
        self.connection = connect_http(server.port)

    def request(self, stored: bool) -> bytes:
        user = f"u{self.chance.randrange(self.users)}"
        body = self.example | {"user": user}
        if not stored:
            history = unpack(self.client.get(history_key(user)), 256)
            assert history is not None
            body |= {"history": history.model_dump(exclude_none=True)}
        return post("/rerank", json.dumps(body).encode())

    def block(self, stored: bool) -> tuple[list[float], float, int]:
        """Latencies in seconds from the times at which requests were due, CPU seconds, and requests not so ranked."""
        requests = [self.request(stored) for _ in range(int(BLOCK_SECONDS * RANKINGS_A_SECOND))]
        latencies = []
        wrong = 0
        cpu = self.server.cpu_seconds()
        begin = time.perf_counter()
        for turn, request in enumerate(requests):
            due = begin + turn / RANKINGS_A_SECOND
            time.sleep(max(0.0, due - time.perf_counter()))
            status, content = ask(self.connection, request)
            latencies.append(time.perf_counter() - due)
            wrong += status != 200 or json.loads(content)["history"]["source"] != ("stored" if stored else "request")
        return latencies, self.server.cpu_seconds() - cpu, wrong


def measure_ranking(ranker: Ranker, ports: list[int], items: list[str]) -> dict[str, Any]:
    kinds: dict[str, list[tuple[list[float], float, int]]] = {"stored": [], "in the request": [], "no events": []}
    for turn in range(ROUNDS):
        with EventLoad(ports, ranker.users, items):
            ranker.block(True)  # unmeasured: clients and servers connect
            for stored in (True, False) if turn % 2 else (False, True):
                kinds["stored" if stored else "in the request"].append(ranker.block(stored))
        kinds["no events"].append(ranker.block(False))
    result = {}
    for kind, blocks in kinds.items():
        latencies = sorted(second for block in blocks for second in block[0])
        result[kind] = {
            "requests": len(latencies),
            "not so ranked": sum(block[2] for block in blocks),
            "p50_ms": latencies[len(latencies) // 2] * 1e3,
            "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3,
            "cpu_ms": sum(block[1] for block in blocks) / len(latencies) * 1e3,  # the events' share included
        }
    return result


def thread_seconds(pid: int) -> float:
    """CPU seconds of the living threads of a process, in nanosecond steps."""
    total = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):
            total += int(path.read_text().split()[0])
    return total / 1e9


def measure_encode(server: ServerProcess, example: dict[str, Any], users: int) -> dict[str, float]:
    """CPU milliseconds of one request: right after /encode, once more, and without /encode. Medians of the rounds."""
    connection = connect_http(server.port)
    base = {name: value for name, value in example.items() if name != "history"}
    chance = random.Random(11)

    def cost(listed: list[str]) -> float:
        requests = [post("/rerank", json.dumps(base | {"user": user}).encode()) for user in listed]
        begin = thread_seconds(server.process.pid)
        for request in requests:
            assert ask(connection, request)[0] == 200
        return (thread_seconds(server.process.pid) - begin) / len(listed) * 1e3

    rounds: dict[str, list[float]] = {"first after /encode": [], "hit": [], "first without /encode": []}
    for _ in range(ENCODE_ROUNDS):
        listed = [f"u{chance.randrange(users)}" for _ in range(2 * ENCODE_USERS)]
        encoded, other = listed[:ENCODE_USERS], listed[ENCODE_USERS:]
        for user in encoded:
            assert ask(connection, post("/encode", json.dumps({"user": user}).encode()))[0] == 200
        for name, some in zip(rounds, (encoded, encoded, other), strict=True):
            rounds[name].append(cost(some))
    return {name: statistics.median(values) for name, values in rounds.items()} | {
        "ratio": statistics.median(a / b for a, b in zip(*list(rounds.values())[:2], strict=True))
    }


def measure_faults(servers: list[ServerProcess], store: RedisProcess, users: int, items: list[str]) -> dict[str, Any]:
    """Kill a replica and Redis under events. Return what the clients saw and what was lost."""
    with EventLoad([server.port for server in servers], users, items) as load:
        time.sleep(FAULT_SECONDS / 5)
        servers[0].process.send_signal(signal.SIGKILL)
        servers[0].process.wait()
        time.sleep(FAULT_SECONDS / 5)
        servers[0].__enter__()
        time.sleep(FAULT_SECONDS / 5)
        killed_at = time.time()
        store.__exit__()
        time.sleep(1.0)
        store.__enter__()
        time.sleep(FAULT_SECONDS / 5)
    waits = sorted(load.seconds)
    lost = load.lost(store.client)
    excused = sum(killed_at - UNSYNCED_SECONDS < at < killed_at + UNSYNCED_SECONDS for at in lost)
    return {
        "acknowledged": len(load.acknowledged),
        "lost, answered in the last 2 s before Redis was killed": excused,
        "lost otherwise": len(lost) - excused,
        "answers": dict(load.statuses),
        "p50_ms": waits[len(waits) // 2] * 1e3,
        "p99_ms": waits[int(len(waits) * 0.99)] * 1e3,
        "longest_ms": waits[-1] * 1e3,
    }


def report(result: dict[str, Any]) -> str:
    ranking, faults, encode = result["ranking"], result["faults"], result["encode"]
    names = list(next(iter(ranking.values())))
    parts = [
        table(["events of a user", "bytes in Redis"], [(k, f"{v:,.0f}") for k, v in result["memory"].items()]),
        table(
            ["history", *names],
            [(kind, *(round(row[name], 2) for name in names)) for kind, row in ranking.items()],
        ),
        table(
            ["events under faults", ""], [(k, round(v, 1) if isinstance(v, float) else v) for k, v in faults.items()]
        ),
        table(["one request", "CPU ms"], [(name, round(value, 3)) for name, value in encode.items()]),
    ]
    return "\n\n".join(parts)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m loadtest.store.histories", description=__doc__, formatter_class=raw)
    parser.add_argument("--bundles", type=Path, default=Path("models/bundles"))
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--fsync", choices=["everysec", "always"], default="everysec", help="of the append-only file")
    args = parser.parse_args()
    exit_on_sigterm()
    with tempfile.TemporaryDirectory() as home, RedisProcess(Path(home), args.fsync) as store:
        settings = {
            "BUNDLES": str(args.bundles.resolve()),
            "VARIANTS": "fp32",
            "REDIS_URL": f"redis://127.0.0.1:{store.port}/0",
            "REDIS_TIMEOUT_MS": str(BUDGET_MS),
            "DRAIN_SECONDS": "0",
        }
        with ServerProcess(settings) as first, ServerProcess(settings) as second:
            name = first.get("/models")[1]["models"][0]["name"]
            example = first.get(f"/models/{name}")[1]["example"]
            items, actions = example["candidates"]["item_ids"], sorted(filter(None, set(example["history"]["actions"])))
            result: dict[str, Any] = {"machine": cpu_name(), "users": args.users, "fsync": args.fsync}
            result["memory"] = fill(store, args.users, items, actions)
            ranker = Ranker(first, store.client, args.users, example)
            result["ranking"] = measure_ranking(ranker, [first.port, second.port], items)
            result["encode"] = measure_encode(first, example, args.users)
            result["faults"] = measure_faults([first, second], store, args.users, items)
    print(report(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
