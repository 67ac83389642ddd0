"""R13. Each variant of the demo: a request alone, with its candidates in another order, and beside 15 others.

The largest difference of a score has to be within the bound that the manifest states for the variant.

Called by: `__main__.py`, and the command line: python -m loadtest.chaos.invariance. Calls: `loadtest/client.py`,
`workload.py`, `report.py`.
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loadtest.chaos.report import Row, conclude
from loadtest.client import ask, connect, post
from loadtest.server_process import ServerProcess, exit_on_sigterm
from loadtest.workload import Workload
from slatewise.bundle.manifest import read_manifest

BUNDLES = Path("models/bundles")
REQUESTS = 64  # of each variant
CROWD = 16
MOST_HISTORY, MOST_CANDIDATES = 400, 1_000


def bodies(workload: Workload, variant: str) -> Iterator[dict[str, Any]]:
    """Requests of log-uniform sizes without a user, so that no kept state joins in."""
    rng = random.Random(1)
    for _ in range(REQUESTS):
        history = workload.history(int((MOST_HISTORY + 1) ** rng.random()) - 1)
        body = json.loads(workload.body("u", history, int(MOST_CANDIDATES ** rng.random())))
        del body["user"]
        yield body | {"variant": variant}


def shuffled(body: dict[str, Any], order: list[int]) -> dict[str, Any]:
    columns = body["candidates"]
    features = {name: [column[k] for k in order] for name, column in columns["features"].items()}
    return body | {"candidates": {"item_ids": [columns["item_ids"][k] for k in order], "features": features}}


def scores(port: int, body: dict[str, Any]) -> list[float]:
    """In the order of the candidates. Raises RuntimeError if the request is not answered with the scores."""
    connection = connect(port)
    try:
        status, text = ask(connection, post("/score", json.dumps(body).encode()))
    finally:
        connection.close()
    answer = json.loads(text)
    if status != 200 or answer["degraded"]:
        raise RuntimeError(f"{status}: {text[:300]!r}")
    found: list[float] = answer["results"]["scores"]
    return found


def largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def differences(port: int, workload: Workload, variant: str) -> dict[str, float]:
    """Largest difference of a score by kind of change."""
    asked = list(bodies(workload, variant))
    alone = [scores(port, body) for body in asked]
    found: dict[str, float] = defaultdict(float)
    rng = random.Random(2)
    for body, expected in zip(asked, alone, strict=True):
        order = rng.sample(range(len(expected)), len(expected))
        moved = scores(port, shuffled(body, order))
        found["another order"] = max(found["another order"], largest(moved, [expected[k] for k in order]))
    with ThreadPoolExecutor(CROWD) as pool:
        together = list(pool.map(lambda body: scores(port, body), asked))
    found["beside others"] = max(map(largest, together, alone))
    return found


def main() -> int:
    exit_on_sigterm()
    workload = Workload(BUNDLES)
    manifest = read_manifest(workload.folder)
    rows = []
    settings = {"BUNDLES": str(BUNDLES), "DRAIN_SECONDS": "0", "MAX_QUEUE_MS": "1000000"}
    with ServerProcess(settings) as server:
        for variant, entry in manifest.variants.items():
            found = differences(server.port, workload, variant)
            number = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
            criterion = (
                f"{variant}: order of candidates and requests beside it change no score by over {entry.bound:.0e}"
            )
            rows.append(Row("R13", criterion, number, max(found.values()) <= entry.bound))
            print(f"invariance: {variant}: {number}", file=sys.stderr, flush=True)
    return conclude(rows)


if __name__ == "__main__":
    sys.exit(main())
