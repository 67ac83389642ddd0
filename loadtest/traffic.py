"""A light, mixed load on a running server: python -m loadtest.traffic --port 8000 --per-second 20 --seconds 600

Half of the requests come from returning users with a longer history, the rest from new users. Some returning users
have a meta-embedding in the bundle. Use it to fill dashboards; `python -m loadtest.server` is for measurements.
A server with keys gets the first key of SLATEWISE_API_KEYS.

Called by: docker-compose.yml (service `load`), `observability/dashboards.py`. Calls: `client.py`, `workload.py`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loadtest.client import limit_time, open_loop, post
from loadtest.workload import Workload, window

MOST_EVENTS = 200
MOST_CANDIDATES = 200
KNOWN_USERS = 200
CONNECTIONS = 16


def visits(workload: Workload, key: str = "", **members: Any) -> Iterator[bytes]:
    """Endless requests: a user's history grows by up to three events a visit, and starts again when it is used up."""
    rng = workload.rng
    folder = workload.folder
    named: list[str] = json.loads((folder / "users.json").read_text()) if (folder / "users.json").exists() else []
    users = named[: KNOWN_USERS // 2] + [
        workload.new_user() for _ in range(KNOWN_USERS - len(named[: KNOWN_USERS // 2]))
    ]
    known: dict[str, tuple[int, dict[str, list[Any]]]] = {}
    while True:
        user = rng.choice(users) if rng.random() < 0.5 else workload.new_user()
        sent, history = known.get(user, (0, {"item_ids": []}))
        if sent >= len(history["item_ids"]):
            sent = rng.randint(1, MOST_EVENTS // 2)
            history = workload.history(MOST_EVENTS)
        if user in users:
            known[user] = (sent + rng.randint(0, 3), history)
        body = workload.body(user, window(history, 0, sent), int(MOST_CANDIDATES ** rng.random()), **members)
        yield post("/rerank", body, user, key)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.traffic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bundles",
        type=Path,
        default=Path("models/bundles"),
        help="root folder of the bundles, for item and user ids (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--per-second", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=600.0)
    args = parser.parse_args()
    key = os.environ.get("SLATEWISE_API_KEYS", "").split(",")[0].strip()
    requests = visits(Workload(args.bundles), key)
    outcome = open_loop(args.port, limit_time(args.seconds, requests), args.per_second, CONNECTIONS)
    print(json.dumps(outcome.summary()))


if __name__ == "__main__":
    main()
