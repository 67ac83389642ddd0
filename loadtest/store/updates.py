"""New generations and a roll-back while a server answers requests: failures, and how long an old generation is served.

Called by: `__main__.py`. Calls: `slatewise/store/push.py`, `client.py`, `server_process.py`.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.client import ask, post
from loadtest.client import connect as connect_http
from loadtest.server_process import ServerProcess
from loadtest.store.lookups import summary
from loadtest.store.memory import random_vectors
from slatewise.store.client import connect
from slatewise.store.generations import Generations
from slatewise.store.push import push

RATE = 50  # requests a second
CONNECTIONS = 16
ASKED_USERS = 500


@dataclass(frozen=True)
class Answer:
    """One answer: its arrival and end on the monotonic clock, in seconds, its status and its content."""

    user: int
    due: float
    ended: float
    status: int
    content: dict[str, Any]

    @property
    def version(self) -> str | None:
        version: str | None = self.content["meta_embedding"]["version"]
        return version


class OpenLoop:
    """Sends requests at a fixed rate inside its `with` block, whatever the server does."""

    def __init__(self, port: int, example: dict[str, Any]) -> None:
        self.port = port
        self.example = example
        self.stop = threading.Event()
        self.answers: list[Answer] = []
        self.failures: list[str] = []
        self.next = 0
        self.lock = threading.Lock()
        self.begin = time.monotonic()

    def work(self) -> None:
        connection = connect_http(self.port)
        while not self.stop.is_set():
            with self.lock:
                turn = self.next
                self.next += 1
            due = self.begin + turn / RATE
            time.sleep(max(0.0, due - time.monotonic()))
            user = turn * 37 % ASKED_USERS
            body = json.dumps(self.example | {"user": f"u{user}", "id": f"{turn}"}).encode()
            try:
                status, content = ask(connection, post("/rerank", body))
                self.answers.append(Answer(user, due, time.monotonic(), status, json.loads(content)))
            except Exception as error:
                self.failures.append(repr(error))
                connection = connect_http(self.port)
        connection.close()

    def __enter__(self) -> OpenLoop:
        self.threads = [threading.Thread(target=self.work) for _ in range(CONNECTIONS)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def last_served(self, version: str, since: float, until: float) -> float:
        """Seconds from `since` to the end of the last answer before `until` with that version."""
        ends = (one.ended - since for one in self.answers if since < one.ended < until and one.version == version)
        return max(ends, default=0.0)


def count_mixed(answers: list[Answer]) -> int:
    """Users with an answer of another generation than the one it names.

    Each generation's vectors differ, so the scores of a user and exit must be one list for each version, and a
    different list for each other version.
    """
    scores: dict[Any, set[Any]] = defaultdict(set)
    for one in answers:
        key = one.user, one.version, one.content["exit"]
        scores[key].add(tuple(np.round(one.content["results"]["scores"], 5)))
    by_user: dict[Any, set[Any]] = defaultdict(set)
    for (user, _, exit), lists in scores.items():
        by_user[user, exit] |= lists
    versions = Counter((user, exit) for user, _, exit in scores)
    several = sum(len(lists) > 1 for lists in scores.values())
    return several + sum(len(by_user[key]) != count for key, count in versions.items())


def measure_updates(bundles: Path, ranker: str, space: str, dim: int, users: list[str], port: int) -> dict[str, Any]:
    """Push, switch, roll back and push again under requests."""
    url = f"redis://127.0.0.1:{port}/0"
    client = connect(url)
    store = Generations(client, ranker, space)
    first = push(store, users, random_vectors(len(users), dim, 1))
    with ServerProcess({"BUNDLES": str(bundles.resolve()), "REDIS_URL": url, "DRAIN_SECONDS": "0"}) as server:
        example = server.get(f"/models/{ranker}")[1]["example"]
        with OpenLoop(server.port, example) as load:
            time.sleep(3)
            second = push(store, users, random_vectors(len(users), dim, 2))
            switched = time.monotonic()
            time.sleep(4)
            store.roll_back()
            rolled_back = time.monotonic()
            time.sleep(4)
            third = push(store, users, random_vectors(len(users), dim, 3))
            switched_again = time.monotonic()
            time.sleep(4)
    client.close()
    old, new, newest = (str(each["generation"]) for each in (first, second, third))
    versions = Counter(one.version for one in load.answers)
    assert newest in versions
    return {
        "rate": RATE,
        "pushed_alone": first,
        "pushed_while_served": [second, third],
        "requests": len(load.answers),
        "failed": len(load.failures) + sum(one.status != 200 for one in load.answers),
        "old_served_s": [
            load.last_served(old, switched, rolled_back),
            load.last_served(old, switched_again, float("inf")),
        ],
        "rolled_back_served_s": load.last_served(new, rolled_back, switched_again),
        "versions": versions,
        "statuses": Counter(one.content["meta_embedding"]["status"] for one in load.answers),
        "mixed": count_mixed(load.answers),
        "latency_ms": summary([one.ended - one.due for one in load.answers]),
    }
