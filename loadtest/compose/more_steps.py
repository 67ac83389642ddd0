"""More of what is tried: versions of a bundle, the job `refresh`, and narrow limits.

Called by: `__main__.py`. Calls: `steps.py`, `docker.py`, `load.py`.
"""

from __future__ import annotations

import json
import shutil
import socket
import time

from loadtest.compose.docker import FOLDER, REFRESH, Stack, ask, until
from loadtest.compose.load import Load
from loadtest.compose.steps import BUNDLE, QUESTION, newest, printed, size, under_load


def bundles(stack: Stack) -> str:
    """A new version by a folder and a roll; the way back by its removal and a roll."""
    old = newest()
    new = BUNDLE / str(int(old.name) + 1)
    shutil.copytree(old, new)
    manifest = new / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"version": {old.name}', f'"version": {new.name}', 1))
    found = []
    for action in (lambda: None, lambda: shutil.rmtree(new)):
        action()
        load = under_load(stack, lambda: stack.run("deploy/compose/roll"), after=1)
        assert not load.lost, load.statuses
        found.append(int(ask(stack.balanced, "GET", "/models")[2]["models"][0]["version"]))
    assert found == [int(new.name), int(old.name)], found
    return f"version {found[0]} after its folder and a roll, {found[1]} after its removal and a roll; no request lost"


def refresh(stack: Stack) -> str:
    """Events become Parquet files, and these a generation that `up` does not overwrite."""
    settings = {"SLATEWISE_EVENTS_FILE_S": "2", "REFRESH_SECONDS": "5"}
    begin = time.monotonic()
    stack.compose(*REFRESH, "build", "slatewise", "refresh")
    built = time.monotonic() - begin
    stack.compose(*REFRESH, "up", "--detach", "slatewise", "refresh", **settings)
    until(lambda: ask(stack.port, "GET", "/readyz")[0] == 200)
    ids = json.loads((newest() / "ids.json").read_text())
    events = [{"user": "fresh:1", "item_id": item, "action": "view", "event_id": item} for item in ids[:30]]
    begin = time.monotonic()
    assert ask(stack.port, "POST", "/events", {"events": events})[0] == 202
    name = 'slatewise_embedding_generation{ranker="movielens"}'
    until(lambda: stack.metrics("slatewise")[name] >= 2, 120)
    seconds = time.monotonic() - begin
    status = ask(stack.port, "POST", "/rerank", QUESTION | {"user": "fresh:1"})[2]["meta_embedding"]["status"]
    generation = stack.metrics("slatewise")[name]
    stack.compose(*REFRESH, "up", "--detach", **settings)
    until(lambda: stack.state("push")["Status"] == "exited")
    pushed = printed(stack, "push", *REFRESH)
    assert status == "hit" and "kept" in pushed, (status, pushed)
    image = size(stack, "slatewise-refresh:0.1.0")
    return (
        f"images in {built:.0f} s ({image}); events of a new user became the vector of generation {generation:.0f} "
        f"after {seconds:.0f} s; the next `up` pushed nothing"
    )


def tight(stack: Stack) -> str:
    """256 descriptors, 64 processes and threads, half a CPU, against 300 idle connections."""
    name = "slatewise-check-tight"
    flags = ["--ulimit", "nofile=256:256", "--pids-limit", "64", "--cpus", "0.5", "--memory", "512m"]
    mount = f"{FOLDER}/models/bundles:/srv/models/bundles:ro"
    stack.run("docker", "rm", "--force", name, check=False)
    stack.run(
        "docker", "run", "--detach", "--name", name, *flags, "-v", mount, "-p", "127.0.0.1::8000", "slatewise:0.1.0"
    )
    try:
        port = int(stack.run("docker", "port", name, "8000").split(":")[-1])
        seconds = until(lambda: ask(port, "GET", "/readyz")[0] == 200, 120)
        threads = [
            line for line in str(ask(port, "GET", "/metrics")[2]).splitlines() if line.startswith("slatewise_threads ")
        ]
        idle_ones = []
        for _ in range(300):
            one = socket.socket()
            one.settimeout(2)
            if one.connect_ex(("127.0.0.1", port)) == 0:
                idle_ones.append(one)
        for one in idle_ones:
            one.close()
        with Load(port, newest(), per_second=10) as load:
            time.sleep(10)
        running = json.loads(stack.run("docker", "inspect", name))[0]["State"]["Running"]
        assert running and threads == ["slatewise_threads 1.0"] and not load.lost, (threads, load.statuses)
        return f"ready after {seconds:.1f} s with 1 thread; after 300 idle connections {load.summary()}"
    finally:
        stack.run("docker", "rm", "--force", name, check=False)
