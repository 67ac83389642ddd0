"""Send captured requests (SLATEWISE_CAPTURE_FILE) or a bundle's warm-up requests again.

    python -m loadtest.replay capture.jsonl 8000
        to the server at a port: statuses and latencies
    python -m loadtest.replay capture.jsonl OLD NEW
        to two bundles (folders of versions), or two ports: also how the scores differ

Requests are sent in the order of the file, one at a time, so histories grow as they did. Deadlines are removed, so an
answer depends on the bundle alone. The last line is JSON.

Called by: the command line. Calls: `client.py`, `server_process.py`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.client import Outcome, closed_loop, post
from loadtest.server_process import ServerProcess

TOP = 10


def read(path: Path) -> list[bytes]:
    """Return bodies for POST /score, without the members that make an answer depend on time or load."""
    bodies = []
    for line in filter(None, path.read_text().splitlines()):
        request = json.loads(line)
        for member in ("deadline_ms", "priority", "top_n"):
            request.pop(member, None)
        bodies.append(json.dumps(request).encode())
    return bodies


@contextmanager
def serving(where: str) -> Iterator[int]:
    """The port of a running server (`where` is a port), or of a new server on one bundle (`where` is its folder)."""
    if where.isdecimal():
        yield int(where)
        return
    folder = Path(where).resolve()
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / folder.parent.name).mkdir()
        (Path(root) / folder.parent.name / folder.name).symlink_to(folder)
        with ServerProcess({"BUNDLES": root, "DRAIN_SECONDS": "0"}) as server:
            yield server.port


def kendall_tau(one: np.ndarray, two: np.ndarray) -> float:
    """Rank correlation of two lists of scores; pairs that are tied in one of them do not count."""
    upper = np.triu_indices(len(one), 1)
    signs = np.sign(one[upper[0]] - one[upper[1]]) * np.sign(two[upper[0]] - two[upper[1]])
    return float(signs.sum() / np.count_nonzero(signs)) if signs.any() else 1.0


def compare(ones: list[bytes], twos: list[bytes]) -> dict[str, Any]:
    """Differences between two lists of answers to the same requests."""
    differences = []
    orders = []
    tops = []
    firsts = 0
    versions = set()
    exits = 0
    for one, two in zip(map(json.loads, ones), map(json.loads, twos), strict=True):
        versions.add(
            f"{one['ranker']} {one['version']} {one['variant']} and {two['ranker']} {two['version']} {two['variant']}"
        )
        a = np.array(one["results"]["scores"])
        b = np.array(two["results"]["scores"])
        differences.append(np.abs(a - b))
        orders.append(kendall_tau(a, b))
        best_a = np.argsort(-a, kind="stable")[:TOP]
        best_b = np.argsort(-b, kind="stable")[:TOP]
        tops.append(len(np.intersect1d(best_a, best_b)) / len(best_a))
        firsts += int(best_a[0] == best_b[0])
        exits += one["exit"] != two["exit"]
    every = np.concatenate(differences)
    return {
        "answers": len(ones),
        "compared": sorted(versions),
        "candidates": len(every),
        "largest_difference": float(every.max()),
        "mean_difference": float(every.mean()),
        "kendall_tau": round(float(np.mean(orders)), 5),
        f"top_{TOP}_overlap": round(float(np.mean(tops)), 5),
        "same_first": round(firsts / len(ones), 5),
        "other_exit": exits,
    }


def replay(bodies: list[bytes], ports: list[int]) -> dict[str, Any]:
    """Statuses and latencies of each server and, of two, their differences. Raises ValueError if a request failed."""
    outcomes: list[Outcome] = [
        closed_loop(port, (post("/score", body) for body in bodies), 1, keep_bodies=True) for port in ports
    ]
    result: dict[str, Any] = {"servers": [outcome.summary() for outcome in outcomes]}
    if len(outcomes) == 2:
        if any(len(outcome.bodies) < len(bodies) for outcome in outcomes):
            raise ValueError(f"not every request was answered: {[dict(outcome.statuses) for outcome in outcomes]}")
        result["difference"] = compare(outcomes[0].bodies, outcomes[1].bodies)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a captured file, or a bundle's warmup.jsonl")
    parser.add_argument("servers", nargs="+", help="a port, or a bundle's folder; one or two")
    args = parser.parse_args()
    if len(args.servers) > 2:
        parser.error("one server or two")
    with ExitStack() as stack:
        ports = [stack.enter_context(serving(where)) for where in args.servers]
        print(json.dumps(replay(read(args.file), ports)))


if __name__ == "__main__":
    main()
