"""R15: versions change every 200 ms under load. No request fails, no answer mixes two versions, memory stays flat.

    .venv/bin/python -m loadtest.chaos.reload [--seconds 120] [--bundle FOLDER]

Two versions of a bundle with different scores are switched by `/admin`, every 200 ms, or as soon as the switch before
has ended; each switch is a load from the disk. Clients ask the same
requests all the time, and compare each answer with the one that its version gave before the load. A third client loads
and unloads a version of another ranker from two threads at once.

Called by: `make chaos`, tests/versions. Calls: `server_process.py`, `client.py`, tests/support/versions.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.client import ask, connect, post
from loadtest.markdown import table
from loadtest.server_process import ServerProcess
from slatewise.bundle.manifest import bundle_folder, read_manifest
from tests.support.versions import KEY, publish, shuffled

BOUND = 2e-5  # between a score and that of the same version and request before the load
CLIENTS = 3
REQUESTS = 24
OTHER = "other"  # the ranker that is loaded and unloaded
MOST_GROWTH = 0.05  # of resident memory, from the second quarter of the run to the last
# Its log does not mix with the table.
SERVE_QUIETLY = ("sh", "-c", 'exec "$0" -m slatewise serve >&2', sys.executable)
SETTINGS = {"VARIANTS": "fp32", "RELOAD": "admin", "ADMIN_KEY": KEY, "HISTORY_CACHE_MB": "8"}

Expected = dict[int, list[tuple[list[int], Any]]]  # version -> for each request: order and scores


@dataclass
class Tally:
    """What was seen during a run."""

    statuses: Counter[int] = field(default_factory=Counter)
    versions: Counter[int] = field(default_factory=Counter)
    wrong: int = 0  # answers that no single version gave
    latencies: list[float] = field(default_factory=list)  # seconds
    switches: list[float] = field(default_factory=list)  # seconds of each
    refused_switches: int = 0
    other: Counter[int] = field(default_factory=Counter)  # statuses of loads, unloads and requests of the other ranker
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds, resident MB
    failures: list[str] = field(default_factory=list)


def admin(path: str, body: dict[str, Any]) -> bytes:
    request = post(f"/admin/rankers/{path}", json.dumps(body).encode())
    return request.replace(b"\r\n\r\n", f"\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode(), 1)


def make_bundles(source: Path, root: Path) -> tuple[str, list[bytes]]:
    """Publish versions 1 and 2 of the bundle, and version 1 of another ranker. Return the name and the requests."""
    publish(source, root, 1)
    folder = publish(source, root, 2, shuffled)
    name = folder.parent.name
    other = publish(source, root / ".other", 1) / "manifest.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"ranker": OTHER}))
    (root / OTHER).mkdir()
    other.parent.rename(root / OTHER / "1")
    return name, draw(folder, name)


def draw(folder: Path, name: str) -> list[bytes]:
    """Bodies with users, histories and candidates of several sizes."""
    rng = np.random.default_rng(0)
    ids = json.loads((folder / "ids.json").read_text())
    bodies = []
    for k in range(REQUESTS):
        history = [ids[i] for i in rng.integers(0, len(ids), int(rng.integers(0, 60)))]
        candidates = [ids[i] for i in rng.choice(len(ids), int(rng.integers(2, 80)), replace=False)]
        body = {
            "ranker": name,
            "user": f"user-{k}",
            "history": {"item_ids": history},
            "candidates": {"item_ids": candidates},
            "request_time": 978_300_000,
        }
        bodies.append(json.dumps(body).encode())
    return bodies


def result_of(body: bytes) -> tuple[int, list[int], Any]:
    content = json.loads(body)
    return content["version"], content["results"]["index"], np.array(content["results"]["scores"])


def agrees(found: tuple[list[int], Any], expected: tuple[list[int], Any]) -> bool:
    """Whether order and scores are those that are expected. Candidates with nearly equal scores may change places."""
    by_candidate = [np.empty(len(index)) for index, _ in (found, expected)]
    for scores, (index, values) in zip(by_candidate, (found, expected), strict=True):
        scores[index] = values
    return bool(np.abs(by_candidate[0] - by_candidate[1]).max() <= BOUND and (np.diff(found[1]) <= 0).all())


def learn(port: int, name: str, requests: list[bytes]) -> Expected:
    """The answers of each version alone."""
    connection = connect(port)
    expected: Expected = {}
    for version in (2, 1):
        status, body = ask(connection, admin(f"{name}/switch", {"version": version}))
        if status != 200:
            raise RuntimeError(f"switch: {status} {body.decode()}")
        answers = [result_of(ask(connection, request)[1]) for request in requests]
        assert {answer[0] for answer in answers} == {version}
        expected[version] = [(index, scores) for _, index, scores in answers]
    connection.close()
    return expected


class Run:
    """The clients of one run. Each method is the work of a thread, until `end`."""

    def __init__(self, server: ServerProcess, name: str, requests: list[bytes], expected: Expected) -> None:
        self.server = server
        self.name = name
        self.requests = requests
        self.expected = expected
        self.tally = Tally()
        self.end = threading.Event()
        self.lock = threading.Lock()

    def rank(self, first: int) -> None:
        connection = connect(self.server.port)
        k = first
        while not self.end.is_set():
            k = (k + CLIENTS) % len(self.requests)
            begin = time.perf_counter()
            status, body = ask(connection, self.requests[k])
            seconds = time.perf_counter() - begin
            with self.lock:
                self.tally.statuses[status] += 1
                self.tally.latencies.append(seconds)
                if status == 200:
                    version, *found = result_of(body)
                    self.tally.versions[version] += 1
                    self.tally.wrong += not agrees((found[0], found[1]), self.expected[version][k])
        connection.close()

    def switch(self, every: float) -> None:
        connection = connect(self.server.port)
        version = 1
        while not self.end.is_set():
            begin = time.perf_counter()
            status, _ = ask(connection, admin(f"{self.name}/switch", {"version": 3 - version}))
            if status == 200:
                version = 3 - version
                self.tally.switches.append(time.perf_counter() - begin)
            else:  # 409: the other ranker is being loaded
                self.tally.refused_switches += 1
                if status != 409:
                    self.tally.failures.append(f"switch: {status}")
            # at least a moment, in which the other ranker may change
            self.end.wait(max(0.03, begin + every - time.perf_counter()) if status == 200 else 0.01)
        connection.close()

    def load_and_unload(self) -> None:
        connection = connect(self.server.port)
        ranked = post("/rerank", json.dumps({"ranker": OTHER, "candidates": {"item_ids": ["1", "2"]}}).encode())
        while not self.end.is_set():
            for request in (admin(f"{OTHER}/switch", {"version": 1}), ranked, admin(f"{OTHER}/unload", {"version": 1})):
                status = ask(connection, request)[0]
                self.tally.other[status] += 1
                self.end.wait(0.01 if status == 409 else 0.1)
        connection.close()

    def watch_memory(self) -> None:
        begin = time.monotonic()
        while not self.end.wait(0.25):
            self.tally.memory.append((time.monotonic() - begin, self.server.resident_mb()))

    def go(self, seconds: float, every: float) -> Tally:
        """Run all clients for some seconds."""
        works = [(self.rank, (k,)) for k in range(CLIENTS)] + [(self.load_and_unload, ())] * 2
        works += [(self.switch, (every,)), (self.watch_memory, ())]  # type: ignore[list-item]

        def guarded(work: Any, arguments: tuple[Any, ...]) -> None:
            try:
                work(*arguments)
            except Exception as error:
                self.tally.failures.append(f"{work.__name__}: {type(error).__name__}: {error}")
                self.end.set()

        threads = [threading.Thread(target=guarded, args=work) for work in works]
        for thread in threads:
            thread.start()
        self.end.wait(seconds)
        self.end.set()
        for thread in threads:
            thread.join()
        return self.tally


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def checks(tally: Tally, seconds: float) -> dict[str, bool]:
    return {
        "no request failed": set(tally.statuses) == {200} and not tally.failures,
        "both versions answered": set(tally.versions) == {1, 2},
        "no answer mixes two versions": tally.wrong == 0,
        "commands end with 200, 404 (not loaded) or 409 (another one is in progress)": set(tally.other)
        <= {200, 404, 409},
        f"memory grows by at most {MOST_GROWTH:.0%}": seconds < 60
        or quarter(tally, 0.75) <= (1 + MOST_GROWTH) * quarter(tally, 0.25),
    }


def report(tally: Tally, before: float, after: float) -> str:
    mb = [value for _, value in tally.memory] or [before]
    early, late = (quarter(tally, low) for low in (0.25, 0.75))
    rows: list[tuple[str, object]] = [
        ("requests", sum(tally.statuses.values())),
        ("statuses", dict(tally.statuses)),
        ("answers by version", dict(sorted(tally.versions.items()))),
        ("answers that no single version gave", tally.wrong),
        ("switches", len(tally.switches)),
        ("median time of a switch, load included, ms", round(float(np.median(tally.switches or [0])) * 1e3)),
        ("switches refused because the other ranker was changing", tally.refused_switches),
        ("statuses of loads, unloads and requests of the other ranker", dict(sorted(tally.other.items()))),
        (
            "latency p50 / p99 / max, ms",
            " / ".join(f"{q * 1e3:.1f}" for q in np.quantile(tally.latencies, (0.5, 0.99, 1))),
        ),
        (
            "resident MB before / second quarter / last quarter / largest / after",
            " / ".join(f"{value:.0f}" for value in (before, early, late, max(mb), after)),
        ),
        *(("failure", failure) for failure in tally.failures[:5]),
    ]
    return table(("measure", "value"), rows)


def quarter(tally: Tally, low: float) -> float:
    """Mean resident MB in the quarter of the run that begins at the share `low` of it."""
    return mean(mb for at, mb in tally.memory if low <= at / tally.memory[-1][0] <= low + 0.25)


def run(bundle: Path, seconds: float, every: float = 0.2) -> tuple[Tally, str]:
    """Run the test against a server of its own. Return what was seen, and the table."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        name, bodies = make_bundles(bundle, root)
        (root / OTHER).rename(root / ".waiting")  # the server starts with one ranker
        with ServerProcess({"BUNDLES": str(root), **SETTINGS}, SERVE_QUIETLY) as server:
            (root / ".waiting").rename(root / OTHER)
            requests = [post("/rerank", body) for body in bodies]
            expected = learn(server.port, name, requests)
            before = server.resident_mb()
            tally = Run(server, name, requests, expected).go(seconds, every)
            time.sleep(1)
            return tally, report(tally, before, server.resident_mb())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--bundle", type=Path, default=Path("models/bundles/movielens"))
    options = parser.parse_args(argv)
    folder = bundle_folder(options.bundle)
    tally, text = run(folder, options.seconds)
    passed = checks(tally, options.seconds)
    manifest = read_manifest(folder)
    print(f"## R15: a switch every 200 ms for {options.seconds:.0f} s ({manifest.ranker} version {manifest.version})\n")
    print(text + "\n")
    print("\n".join(f"- {'pass' if good else 'FAIL'}: {what}" for what, good in passed.items()))
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
