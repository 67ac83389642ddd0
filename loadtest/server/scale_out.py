"""Two replicas behind the HAProxy of the compose file: python -m loadtest.server.scale_out

A replica can extend a user's encoded history only if it served that user before. This compares hashing of the user
with round robin, and measures the effect of a killed replica and of its return. It starts real processes and uses
deploy/haproxy/haproxy.cfg unchanged. Prints Markdown. Needs haproxy in the PATH (apt-get install haproxy).

Called by: the command line, tests/loadtest/test_scale_out.py. Calls: `workload.py`, `server_process.py`.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtest.markdown import table
from loadtest.server_process import ServerProcess
from loadtest.workload import Shape, Workload, window
from tests.support.network import free_port

ROOT = Path(__file__).parents[2]
USERS = 40
VISITS = 6
SHAPE = Shape(100, 20)
THREADS = 4
BY_USER = "hdr(X-Balance-Key)"  # haproxy.cfg sets this header to the user


@contextmanager
def haproxy(balance: str, ports: list[int]) -> Iterator[int]:
    """Run HAProxy, and yield its port when its health checks have had time to find the replicas."""
    port = free_port()
    environment = {
        "LISTEN": f"127.0.0.1:{port}",
        "METRICS": f"127.0.0.1:{free_port()}",
        "BALANCE": balance,
        **{f"REPLICA_{k + 1}": f"127.0.0.1:{one}" for k, one in enumerate(ports)},
    }
    process = subprocess.Popen(
        ["haproxy", "-f", str(ROOT / "deploy" / "haproxy" / "haproxy.cfg")],
        env=os.environ | environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(1.5)
        yield port
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def replicas(bundles: Path) -> Iterator[list[ServerProcess]]:
    with ExitStack() as stack:
        yield [stack.enter_context(replica(bundles)) for _ in range(2)]


def replica(bundles: Path, port: int | None = None) -> ServerProcess:
    return ServerProcess({"BUNDLES": str(bundles), "VARIANTS": "fp32", "THREADS": "1", "DRAIN_SECONDS": "0"}, port=port)


class Users:
    """Users whose histories grow by one event a visit."""

    def __init__(self, bundles: Path, seed: int) -> None:
        self.workload = Workload(bundles, seed=seed)
        self.users = [(self.workload.new_user(), self.workload.history(SHAPE.history + 1_000)) for _ in range(USERS)]
        self.visits = Counter[str]()

    def body(self, k: int) -> tuple[str, bytes]:
        user, history = self.users[k]
        self.visits[user] += 1
        return user, self.workload.body(user, window(history, 0, SHAPE.history + self.visits[user]), SHAPE.candidates)


def connect(port: int) -> closing[http.client.HTTPConnection]:
    return closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30))


def visit(connection: http.client.HTTPConnection, user: str, body: bytes) -> tuple[int, str, int]:
    """(status, `history.cache` of the answer, events read)."""
    connection.request("POST", "/rerank", body, {"Content-Type": "application/json", "X-User-ID": user})
    answer = connection.getresponse()
    content = json.loads(answer.read()) if answer.status == 200 else {}
    history = content.get("history", {})
    return answer.status, history.get("cache", ""), history.get("used", 0)


def hits(bundles: Path, balance: str) -> dict[str, Any]:
    """VISITS requests of each user: share of reused histories, events encoded a request, cached megabytes."""
    users = Users(bundles, 0)
    with (
        replicas(bundles) as servers,
        haproxy(balance, [server.port for server in servers]) as port,
        connect(port) as connection,
    ):
        encoded = [server.sample("slatewise_history_events_encoded_total") for server in servers]
        found = [visit(connection, *users.body(k)) for _ in range(VISITS) for k in order(users)]
        encoded = [
            server.sample("slatewise_history_events_encoded_total") - before for server, before in zip(servers, encoded)
        ]
        kept = sum(server.sample("slatewise_history_cache_bytes") for server in servers)
        answered = [server.sample("slatewise_requests_total") for server in servers]
    assert all(status == 200 for status, _, _ in found)
    caches = Counter(cache for _, cache, _ in found)
    return {
        "balance": balance,
        "reused": (caches["hit"] + caches["extended"]) / len(found),
        "encoded_per_request": sum(encoded) / len(found),
        "kept_mb": kept / 2**20,
        "requests": answered,
    }


def order(users: Users) -> list[int]:
    """All users in random order; a fixed order could keep step with round robin."""
    return users.workload.rng.sample(range(USERS), USERS)


@dataclass
class Run:
    """Answers so far: (end time, status or 0 without an answer, user, `history.cache`)."""

    answers: list[tuple[float, int, str, str]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def work(self, port: int, users: Users, mine: list[int]) -> None:
        with connect(port) as connection:
            while not self.stop.is_set():
                for k in mine:
                    user, body = users.body(k)
                    try:
                        status, cache, _ = visit(connection, user, body)
                    except (OSError, http.client.HTTPException):
                        connection.close()  # the next request opens it again
                        status = 0
                        cache = ""
                    self.answers.append((time.monotonic(), status, user, cache))
                    time.sleep(0.02)

    def between(self, begin: float, end: float) -> list[tuple[float, int, str, str]]:
        return [answer for answer in self.answers if begin <= answer[0] < end]


def death(bundles: Path, seconds: float = 4.0) -> dict[str, Any]:
    """Kill a replica under load and start it again at its port: failed requests, and users with a lost history."""
    users = Users(bundles, 1)
    run = Run()
    with (
        replicas(bundles) as servers,
        haproxy(BY_USER, [server.port for server in servers]) as port,
        ExitStack() as stack,
    ):
        threads = [
            threading.Thread(target=run.work, args=(port, users, list(range(k, USERS, THREADS))))
            for k in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        killed = time.monotonic()
        servers[1].process.kill()
        time.sleep(seconds)
        stack.enter_context(replica(bundles, servers[1].port))
        back = time.monotonic()
        time.sleep(seconds)
        run.stop.set()
        for thread in threads:
            thread.join()
    before = run.between(0, killed)
    dead = run.between(killed, back)
    after = run.between(back, time.monotonic())
    lost = {user for _, _, user, cache in dead if cache == "miss"}  # users of the killed replica
    others = {user for user, _ in users.users} - lost
    return {
        "requests": len(run.answers),
        "failed": [sum(status != 200 for _, status, _, _ in part) for part in (before, dead, after)],
        "moved_users": len(lost),
        "misses_of_others": sum(cache == "miss" for _, _, user, cache in dead + after if user in others),
        "misses_when_back": sum(cache == "miss" for _, _, user, cache in after),
        "share_of_the_one_that_came_back": sum(user in lost for _, _, user, _ in after) / len(after),
    }


def main() -> None:
    bundles = ROOT / "models" / "bundles"
    found = [hits(bundles, balance) for balance in (BY_USER, "roundrobin")]
    rows = [
        (r["balance"], f"{r['reused']:.1%}", f"{r['encoded_per_request']:.1f}", f"{r['kept_mb']:.1f}") for r in found
    ]
    print(f"{USERS} users, {VISITS} visits each, {SHAPE.history} events and one more a visit; two replicas\n")
    print(
        table(("balance", "requests with a cached history", "events encoded a request", "cached histories, MB"), rows)
    )
    killed = death(bundles)
    failed = ", ".join(map(str, killed["failed"]))
    print(f"\nOne replica was killed and started again: {killed['requests']} requests.")
    print(f"Failed before, while it was dead, and after its return: {failed}.")
    print(
        f"Users that moved: {killed['moved_users']} of {USERS}. Lost histories of others: {killed['misses_of_others']}."
    )
    print(f"Histories encoded again after its return: {killed['misses_when_back']}.")


if __name__ == "__main__":
    main()
