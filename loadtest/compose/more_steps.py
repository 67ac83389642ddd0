"""More of what is tried: versions of a bundle, the jobs `refresh` and `update`, and narrow limits.

Called by: `__main__.py`. Calls: `steps.py`, `docker.py`, `load.py`.
"""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from loadtest.compose.docker import FOLDER, REFRESH, UPDATE, Stack, ask, until
from loadtest.compose.load import Load
from loadtest.compose.steps import BUNDLE, QUESTION, newest, printed, size, under_load

LEARNERS = 40  # users whose events the update learns from
NEW_EVENTS = 6  # of each


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


def update(stack: Stack) -> str:
    """New events become the next version, which a half of the users gets first, and then all."""
    old = int(newest().name)
    training(FOLDER / "training")
    BUNDLE.chmod(0o777)  # for the user 10001
    settings = {
        "SLATEWISE_EVENTS_FILE_S": "2",
        "SLATEWISE_RELOAD_S": "1",
        "SLATEWISE_RELOAD_CANARY": "0.5",
        "SLATEWISE_RELOAD_CANARY_S": "20",
        "UPDATE_SECONDS": "3600",
    }
    stack.compose(*REFRESH, "rm", "--stop", "--force", "refresh")
    stack.compose(*UPDATE, "build", "slatewise", "update")
    stack.compose(*UPDATE, "up", "--detach", "slatewise", **settings)
    until(lambda: ask(stack.port, "GET", "/readyz")[0] == 200)
    sent = send_events(stack)
    until(lambda: stack.metrics("slatewise")['slatewise_events_tapped_total{result="written"}'] >= sent)
    time.sleep(6)  # the file is complete
    begin = time.monotonic()
    stack.compose(*UPDATE, "up", "--detach", "update", **settings)

    def state() -> dict[str, Any]:
        found: dict[str, Any] = ask(stack.port, "GET", "/models")[2]["models"][0]["versions"]
        return found

    try:
        until(lambda: state()["candidate"] is not None, 600)
    except TimeoutError as error:
        raise RuntimeError(stack.compose(*UPDATE, "logs", "--no-log-prefix", "update")) from error
    published = time.monotonic() - begin
    first = state()
    assert (first["version"], first["candidate"]["version"], first["candidate"]["canary"]) == (old, old + 1, 0.5), first
    users = [QUESTION | {"user": f"canary:{k}"} for k in range(40)]
    versions = {ask(stack.port, "POST", "/rerank", body)[2]["version"] for body in users}
    assert versions == {old, old + 1}, versions
    begin = time.monotonic()
    until(lambda: state()["version"] == old + 1)
    promoted = time.monotonic() - begin
    log = stack.compose(*UPDATE, "logs", "--no-log-prefix", "update", **settings)
    learned = re.search(r"trained on [\d,]+ events of [\d,]+ new ones", log)
    assert learned and ask(stack.port, "POST", "/rerank", QUESTION)[2]["version"] == old + 1, log
    stack.compose(*UPDATE, "rm", "--stop", "--force", "update")
    return (
        f"{sent} events, {learned[0]}; version {old + 1} was the candidate after {published:.0f} s, answered a half of "
        f"the users, and all of them {promoted:.0f} s later"
    )


def training(folder: Path) -> None:
    """Write the TOML of the demo with small tables: random old events of the users who send new ones, and items."""
    folder.mkdir(mode=0o755)
    rng = random.Random(0)
    manifest = json.loads((newest() / "manifest.json").read_text())
    ids = json.loads((newest() / "ids.json").read_text())
    genres, decades = (manifest["fields"][name]["values"] for name in ("genres", "decade"))
    items = [(item, f"Item {item}", rng.choice(genres), rng.choice(decades), rng.random(), 1990) for item in ids]
    events = [
        (f"learner:{user}", item, 1_000_000_000 + 60 * k, "view", rng.randrange(2))
        for user in range(LEARNERS)
        for k, item in enumerate(rng.sample(ids, 50))
    ]
    names = {
        "items": ("item_id", "title", *manifest["fields"], *manifest["features"]),
        "events": ("user_id", "item_id", "timestamp", "action", "label_like"),
    }
    for name, rows in (("items", items), ("events", events)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([names[name], *rows])
    toml = (FOLDER / "models" / "movielens.toml").read_text()
    for pattern, value in (
        (r'"[^"]*/(events|items)\.parquet"', r'"\1.csv"'),
        (r"slate_users = \d+", "slate_users = 10"),
        (r"validation_users = \d+", "validation_users = 20"),
        (r"\n\[demo\][^\[]*", ""),
    ):
        toml = re.sub(pattern, value, toml)
    (folder / "movielens.toml").write_text(toml)
    for path in folder.iterdir():
        path.chmod(0o644)


def send_events(stack: Stack) -> int:
    """Send random events of the users of `training`. Returns their number."""
    rng = random.Random(1)
    ids = json.loads((newest() / "ids.json").read_text())
    for user in range(LEARNERS):
        events = [
            {"user": f"learner:{user}", "item_id": item, "action": "view", "event_id": f"{user}-{item}"}
            for item in rng.sample(ids, NEW_EVENTS)
        ]
        assert ask(stack.port, "POST", "/events", {"events": events})[0] == 202
    return LEARNERS * NEW_EVENTS


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
