"""A new item in a running server, under load: python -m loadtest.store.new_items

The demo answers 50 requests a second and writes events to files, as with `deploy/compose/refresh.yaml`. A job runs
`slatewise refresh` in a loop, with a pause between two runs. Five users take an item that the ranker does not know. The
command prints the seconds from the answer to the fifth event until an answer with a vector for the item, the scores of
the item, and the failed requests. Client, server, job and Redis share this machine's cores.

Called by: the command line. Its numbers appear in docs/meta_embeddings.md. Calls: `updates.py`, `server_process.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from loadtest.client import ask, post
from loadtest.client import connect as connect_http
from loadtest.server_process import ServerProcess, exit_on_sigterm
from loadtest.store.updates import RATE, OpenLoop
from slatewise.process import cpu_name
from tests.support.redis_server import run_redis

ITEM = "brand new"
EVENTS = 5
MOST_SECONDS = 180.0


class Job:
    """Runs `slatewise refresh` again and again inside its `with` block, as the compose service does."""

    def __init__(self, bundle: Path, events: Path, url: str, pause: float) -> None:
        self.command = [sys.executable, "-m", "slatewise", "refresh", "--processes", "1", str(bundle), str(events)]
        self.command += ["--redis-url", url]
        self.events = events
        self.pause = pause
        self.stop = threading.Event()
        self.seconds: list[float] = []  # of each run
        self.faults: list[str] = []

    def work(self) -> None:
        while not self.stop.wait(self.pause):
            if not any(self.events.glob("*.parquet")):
                continue
            begin = time.monotonic()
            done = subprocess.run(self.command, capture_output=True, text=True)
            self.seconds.append(time.monotonic() - begin)
            if done.returncode:
                self.faults.append(done.stderr[-300:])

    def __enter__(self) -> Job:
        self.thread = threading.Thread(target=self.work)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def take(port: int, known: list[str], users: int) -> None:
    """Send events of `users` users: five of known items, then one of the new item."""
    connection = connect_http(port)
    for user in range(users):
        items = [*known[5 * user : 5 * user + 5], ITEM]
        events = [{"user": f"taker {user}", "item_id": item, "event_id": f"{item} {user}"} for item in items]
        status, content = ask(connection, post("/events", json.dumps({"events": events}).encode()))
        if status != 202:
            raise RuntimeError(f"POST /events: {status} {content!r}")
    connection.close()


def measure(bundles: Path, ranker: str, pause: float, file_seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home, run_redis(Path(home)) as port:
        url = f"redis://127.0.0.1:{port}/0"
        events = Path(home) / "events"
        settings = {"BUNDLES": str(bundles.resolve()), "REDIS_URL": url, "DRAIN_SECONDS": "0"}
        settings |= {"EVENTS_DIR": str(events), "EVENTS_FILE_S": f"{file_seconds:g}"}
        with ServerProcess(settings) as server, Job(bundles / ranker, events, url, pause) as job:
            example = server.get(f"/models/{ranker}")[1]["example"]
            known = example["candidates"]["item_ids"]
            body = example | {"candidates": {"item_ids": [ITEM, *known[:30]]}}
            del body["user"]
            connection = connect_http(server.port)

            def ask_for_item() -> tuple[float, bool]:
                answer = json.loads(ask(connection, post("/score", json.dumps(body).encode()))[1])
                return answer["results"]["scores"][0], "adapted_candidates" in answer

            with OpenLoop(server.port, example) as load:
                time.sleep(3)
                before, _ = ask_for_item()
                take(server.port, known, EVENTS)
                begin = time.monotonic()
                found = False
                while not found and time.monotonic() - begin < MOST_SECONDS:
                    time.sleep(0.1)
                    after, found = ask_for_item()
                seconds = time.monotonic() - begin
            connection.close()
    statuses = [answer.status for answer in load.answers]
    return {
        "machine": cpu_name(),
        "seconds": round(seconds, 1) if found else None,
        "score before": before,
        "score after": after,
        "requests": len(statuses),
        "requests a second": RATE,
        "failed": len(load.failures) + sum(status != 200 for status in statuses),
        "refreshes": [round(each, 1) for each in job.seconds],
        "refresh faults": job.faults,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.store.new_items",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundles", type=Path, default=Path("models/bundles"))
    parser.add_argument("--ranker", default="movielens")
    parser.add_argument("--pause", type=float, default=15.0, help="seconds between two refreshes; default: %(default)s")
    parser.add_argument(
        "--file-seconds", type=float, default=15.0, help="SLATEWISE_EVENTS_FILE_S; default: %(default)s"
    )
    args = parser.parse_args()
    exit_on_sigterm()
    result = measure(args.bundles, args.ranker, args.pause, args.file_seconds)
    print(json.dumps(result, indent=1))
    ok = result["seconds"] is not None and result["seconds"] <= 60 and not result["failed"]
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
