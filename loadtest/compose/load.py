"""Requests at a fixed rate that count what a plain client loses. It repeats nothing.

Called by: `steps.py`. Calls: nothing.
"""

from __future__ import annotations

import http.client
import json
import random
import select
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

CONNECTIONS = 8
USERS = 40


@dataclass
class Load:
    """Rankings of USERS users with histories over kept connections, while the `with` block runs.

    statuses: by code; "refused" is a connection that was not accepted, "broken" a request without a whole answer.
    """

    port: int
    bundle: Path
    per_second: float = 25.0
    statuses: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    degraded: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> Load:
        self.ids: list[str] = json.loads((self.bundle / "ids.json").read_text())
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.work, args=(k,)) for k in range(CONNECTIONS)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def work(self, seed: int) -> None:
        rng = random.Random(seed)
        pause = CONNECTIONS / self.per_second
        due = time.monotonic() + rng.random() * pause
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        while not self.stop.wait(max(0.0, due - time.monotonic())):
            due += pause
            user = f"check:{rng.randrange(USERS)}"
            history = {"item_ids": random.Random(user).sample(self.ids, 50)}
            body = json.dumps({"user": user, "history": history, "candidates": {"item_ids": rng.sample(self.ids, 50)}})
            begin = time.monotonic()
            status, degraded = send(connection, body, user)
            with self.lock:
                self.statuses[status] += 1
                self.latencies.append(time.monotonic() - begin)
                self.degraded.update(degraded)
        connection.close()

    @property
    def lost(self) -> int:
        return self.statuses.total() - self.statuses["200"]

    def summary(self) -> str:
        """As "750 requests, 3 lost (2 broken, 1 refused), p99 40 ms"."""
        others = ", ".join(f"{count} {name}" for name, count in sorted(self.statuses.items()) if name != "200")
        latencies = sorted(self.latencies)
        p99 = latencies[int(0.99 * len(latencies))] * 1e3 if latencies else 0.0
        lost = f"{self.lost} lost ({others})" if self.lost else "none lost"
        reasons = ", ".join(f"{count} {name}" for name, count in sorted(self.degraded.items()))
        return f"{self.statuses.total()} requests, {lost}, p99 {p99:.0f} ms" + (
            f"; degraded: {reasons}" if reasons else ""
        )


def send(connection: http.client.HTTPConnection, body: str, user: str) -> tuple[str, list[str]]:
    """Status, "refused" or "broken", and the reasons of a degraded answer.

    A kept connection that the other side has closed is opened anew first, as common HTTP clients do.
    """
    if connection.sock is not None and select.select([connection.sock], [], [], 0)[0]:
        connection.close()
    try:
        connection.request("POST", "/rerank", body, {"Content-Type": "application/json", "X-User-ID": user})
        answer = connection.getresponse()
        text = answer.read()
    except ConnectionRefusedError:
        connection.close()
        return "refused", []
    except (OSError, http.client.HTTPException):
        connection.close()
        return "broken", []
    return str(answer.status), json.loads(text).get("degraded", []) if answer.status == 200 else []
