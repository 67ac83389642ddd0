"""What is tried with the containers. Each step returns what it found; a wrong finding raises AssertionError.

Called by: `__main__.py`. Calls: `docker.py`, `load.py`.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loadtest.compose.docker import EVERYTHING, FOLDER, PROJECT, Stack, ask, until
from loadtest.compose.load import CONNECTIONS, Load

BUNDLE = FOLDER / "models" / "bundles" / "movielens"
KEY = "compose-check"
QUESTION = {"user": "u42", "candidates": {"item_ids": ["595", "589", "661"]}}
SCALE = ("--profile", "scale")


def newest(folder: Path = BUNDLE) -> Path:
    return max((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))


def permissions(stack: Stack) -> str:
    """The documented command for a clone that was made under umask 077; the images need nothing."""
    stack.run("chmod", "-R", "a+rX", "deploy", "loadtest", "models/bundles")
    for folder in (FOLDER.parent, FOLDER, FOLDER / "models"):
        folder.chmod(0o755)
    return "a copy with mode 600, then `chmod -R a+rX deploy loadtest models/bundles`"


def build(stack: Stack) -> str:
    begin = time.monotonic()
    stack.compose("build", "slatewise")
    seconds = time.monotonic() - begin
    return f"{seconds:.0f} s; {size(stack, 'slatewise:0.1.0')}"


def size(stack: Stack, image: str) -> str:
    base = "python:3.11-slim-bookworm"
    own, below = (
        int(stack.run("docker", "image", "inspect", "--format", "{{.Size}}", name, check=False).strip() or 0)
        if name == image or has(stack, name)
        else 0
        for name in (image, base)
    )
    return f"{own / 1e6:.0f} MB" + (f", of them {below / 1e6:.0f} MB the base" if below else "")


def has(stack: Stack, image: str) -> bool:
    return image in stack.run("docker", "images", "--format", "{{.Repository}}:{{.Tag}}").split()


def up(stack: Stack) -> str:
    begin = time.monotonic()
    stack.compose("up", "--detach")
    until(lambda: ask(stack.port, "GET", "/readyz")[0] == 200)
    ready = time.monotonic() - begin
    until(lambda: all(map(stack.healthy, ("slatewise", "redis", "prometheus"))), 90)
    until(lambda: stack.state("push")["Status"] == "exited")
    assert stack.state("push")["ExitCode"] == 0, stack.compose("logs", "push")
    until(lambda: stack.metrics("slatewise")['slatewise_embedding_generation{ranker="movielens"}'] == 1)
    return f"ready after {ready:.1f} s, all healthy after {time.monotonic() - begin:.1f} s, vectors pushed"


def answers(stack: Stack) -> str:
    status, _, content = ask(stack.port, "POST", "/rerank", QUESTION)
    assert status == 200 and sorted(content["results"]["index"]) == [0, 1, 2], content
    user = json.loads((newest() / "users.json").read_text())[0]
    content = ask(stack.port, "POST", "/rerank", QUESTION | {"user": user})[2]
    assert content["meta_embedding"]["status"] == "hit", content
    return f"a ranking, and one with a user's vector from Redis (`{content['meta_embedding']['status']}`)"


def limits(stack: Stack) -> str:
    samples = stack.metrics("slatewise")
    threads, memory = samples["slatewise_threads"], samples["slatewise_memory_limit_bytes"]
    assert (threads, memory) == (2 if cores(stack) >= 2 else 1, 2**30), (threads, memory)
    return f"`cpus: 2.0`: {threads:.0f} threads; `mem_limit: 1g`: {memory / 2**20:.0f} MiB in the metrics"


def cores(stack: Stack) -> int:
    return int(stack.run("docker", "info", "--format", "{{.NCPU}}").split()[-1])


def own_user(stack: Stack) -> str:
    code = "import os; print(os.getuid(), os.access('/srv/app', os.W_OK), os.access('/srv/models/bundles', os.W_OK))"
    found = stack.python("slatewise", code)
    assert found == "10001 False False", found
    return "user 10001, the code and the bundles are not writable"


def allocator(stack: Stack) -> str:
    """LD_PRELOAD of a library that the user cannot read is a line in the log, and the server goes on without it."""
    code = "print({line.split()[-1] for line in open('/proc/1/maps') if 'jemalloc' in line})"
    found = stack.python("slatewise", code)
    assert found == "{'/usr/local/lib/libjemalloc.so.2'}", found
    log = stack.compose("logs", "--no-log-prefix", "slatewise", "push")
    assert "LD_PRELOAD" not in log, log
    return "user 10001 reads it, and the server has it in its memory"


IDLE = """
import os, pathlib, time
one = pathlib.Path("/sys/fs/cgroup/cpuacct/cpuacct.usage")
def used():
    if one.exists():
        return int(one.read_text()) / 1e9
    return int(pathlib.Path("/sys/fs/cgroup/cpu.stat").read_text().split()[1]) / 1e6
def server():
    return sum(map(int, pathlib.Path("/proc/1/stat").read_text().split()[13:15])) / os.sysconf("SC_CLK_TCK")
before = used(), server(), time.process_time()
time.sleep(30)
print(used() - before[0] - (time.process_time() - before[2]), server() - before[1])
"""


def idle(stack: Stack) -> str:
    """CPU of an idle replica in 30 s: its own polls and the scrapes, and the rest, which is the health check."""
    total, server = map(float, stack.python("slatewise", IDLE).split())
    check = (total - server) / 30
    assert check < 0.04, f"the health check takes {check:.1%} of a core"
    return f"server {server / 30:.1%} of a core, health check {check:.1%}"


def printed(stack: Stack, service: str, *arguments: str, **settings: str) -> dict[str, Any]:
    """The JSON in the last line of a service's log. Compose may write control characters before it."""
    line = stack.compose(*arguments, "logs", "--no-log-prefix", service, **settings).strip().splitlines()[-1]
    found: dict[str, Any] = json.loads(line[line.index("{") :])
    return found


def keys_and_load(stack: Stack) -> str:
    settings = {"SLATEWISE_API_KEYS": f"{KEY},other", "LOAD_SECONDS": "5"}
    load = ("--profile", "load")
    try:
        stack.compose(*load, "up", "--detach", **settings)
        until(lambda: stack.compose(*load, "ps", "--all", "--format", "{{.State}}", "load").strip() == "exited", 90)
        sent = printed(stack, "load", *load)
        assert sent["requests"] > 0 and list(sent["statuses"]) == ["200"], sent
        assert ask(stack.port, "POST", "/rerank", QUESTION)[0] == 401
        assert ask(stack.port, "POST", "/rerank", QUESTION, {"Authorization": f"Bearer {KEY}"})[0] == 200
    finally:
        stack.compose("up", "--detach", "--wait", "slatewise")
    return f"{sent['requests']} requests of the profile `load` answered 200; without a key 401"


def scale(stack: Stack) -> str:
    begin = time.monotonic()
    stack.compose(*SCALE, "up", "--detach")
    until(lambda: ask(stack.balanced, "GET", "/readyz")[0] == 200)
    until(lambda: stack.healthy("haproxy"))
    until(lambda: len(replicas_up(stack)) == 2, 60)
    targets = [one["health"] for one in prometheus(stack, "targets")["activeTargets"] if one["health"] != "up"]
    assert not targets, targets
    return (
        f"two replicas behind HAProxy after {time.monotonic() - begin:.1f} s; Prometheus found the second by its name"
    )


def prometheus(stack: Stack, path: str) -> dict[str, Any]:
    found: dict[str, Any] = ask(stack.prometheus, "GET", f"/api/v1/{path}")[2]["data"]
    return found


def replicas_up(stack: Stack) -> list[Any]:
    found: list[Any] = prometheus(stack, "query?query=up%7Bjob%3D%22slatewise%22%7D%3D%3D1")["result"]
    return found


def stickiness(stack: Stack) -> str:
    """Users in the body alone: all requests of one user reach one replica. Without a user the answer says so."""
    ids = json.loads((newest() / "ids.json").read_text())
    body = {"history": {"item_ids": ids[:40]}, "candidates": {"item_ids": ids[40:60]}}
    caches = []
    for user in range(10):
        for _ in range(3):
            _, headers, content = ask(stack.balanced, "POST", "/rerank", body | {"user": f"body:{user}"})
            assert headers["x-balanced-by"] == "user", headers
            caches.append(content["history"]["cache"])
    assert caches.count("miss") == 10 and caches.count("hit") == 20, caches
    headers = ask(stack.balanced, "POST", "/rerank", {"candidates": body["candidates"]})[1]
    assert headers["x-balanced-by"] == "round-robin", headers
    return "user in the body alone: 10 misses, then 20 hits of 20; without a user: `X-Balanced-By: round-robin`"


def under_load(stack: Stack, action: Callable[[], object], port: int | None = None, after: float = 4.0) -> Load:
    with Load(port or stack.balanced, newest()) as load:
        time.sleep(3)
        action()
        time.sleep(after)
    return load


def stop_one(stack: Stack) -> str:
    load = under_load(stack, lambda: stack.compose(*SCALE, "stop", "slatewise-2"))
    code = stack.state("slatewise-2")["ExitCode"]
    back = under_load(stack, lambda: stack.compose(*SCALE, "up", "--detach", "--no-deps", "--wait", "slatewise-2"))
    assert not load.lost and not back.lost and code == 0, (load.statuses, back.statuses, code)
    return f"{load.summary()}, exit status {code}; while it comes back: {back.summary()}"


def roll(stack: Stack) -> str:
    begin = time.monotonic()
    load = under_load(stack, lambda: stack.run("deploy/compose/roll"))
    assert not load.lost, load.statuses
    return f"{load.summary()}, {time.monotonic() - begin - 7:.0f} s for both"


def crash(stack: Stack, service: str) -> None:
    """SIGKILL to the process itself, as the kernel does for memory. Docker then restarts the container."""
    pid = str(stack.state(service)["Pid"])
    code = f"import os; os.kill({pid}, 9)"
    stack.run(
        *("docker", "run", "--rm", "--pid=host", "--user=0", "--entrypoint=python", "slatewise:0.1.0", "-c", code)
    )


def crash_one(stack: Stack) -> str:
    load = under_load(stack, lambda: crash(stack, "slatewise-2"), after=12)
    seconds = until(lambda: stack.healthy("slatewise-2"))
    assert load.lost <= 2 and stack.state("slatewise-2")["RestartCount"] == 1, (load.statuses, seconds)
    return f"{load.summary()}; Docker restarted it"


def kill(stack: Stack, service: str) -> tuple[Load, str]:
    """`docker kill` under load, then `up`. Docker does not restart a container that was killed by hand."""
    load = under_load(stack, lambda: stack.run("docker", "kill", stack.container(service)), after=6)
    how = "restarted by Docker" if stack.state(service)["Running"] else "down until `docker compose up`"
    stack.compose(*SCALE, "up", "--detach", "--no-recreate", "--wait", service)
    return load, how


def kill_replica(stack: Stack, service: str) -> str:
    load, how = kill(stack, service)
    assert load.lost <= 2, load.statuses  # those that a dying replica had begun to answer
    until(lambda: ask(stack.balanced, "GET", "/readyz")[0] == 200)
    time.sleep(3)
    return f"{load.summary()}; {how}"


def kill_redis(stack: Stack) -> str:
    """Requests are answered meanwhile. Vectors and stored histories are there again afterwards."""
    event = {"user": "events:1", "item_id": "595", "event_id": "one"}
    assert ask(stack.balanced, "POST", "/events", event)[0] == 202
    time.sleep(2.5)  # appendfsync everysec
    load, how = kill(stack, "redis")
    assert not load.lost, load.statuses
    until(lambda: stack.metrics("slatewise")["slatewise_redis_circuit_state"] == 0)
    content = ask(stack.balanced, "POST", "/rerank", {"user": "events:1", "candidates": {"item_ids": ["589", "661"]}})[
        2
    ]
    assert content["history"]["source"] == "stored" and content["history"]["used"] == 1, content
    user = json.loads((newest() / "users.json").read_text())[1]
    status = ask(stack.balanced, "POST", "/rerank", QUESTION | {"user": user})[2]["meta_embedding"]["status"]
    assert status == "hit", status
    return f"{load.summary()}; {how}; then the vectors and a stored history are there again"


def kill_prometheus(stack: Stack) -> str:
    load, how = kill(stack, "prometheus")
    assert not load.lost, load.statuses
    return f"{load.summary()}; {how}"


def kill_haproxy(stack: Stack) -> str:
    load, how = kill(stack, "haproxy")
    assert load.lost and stack.metrics("slatewise"), load.statuses
    until(lambda: ask(stack.balanced, "GET", "/readyz")[0] == 200)
    return f"{load.summary()}; {how}. It is one process: a balancer of its own needs a second one"


def restart_single(stack: Stack) -> str:
    load = under_load(stack, lambda: stack.compose("restart", "slatewise"), port=stack.port)
    assert load.statuses["200"], load.statuses
    return f"{load.summary()}. One replica cannot restart without a gap"


def down(stack: Stack) -> str:
    """HAProxy finishes what it has accepted: its log has a line for each request that it breaks off.

    Docker's own proxy of the port accepts connections for a moment longer, and breaks them: at most one per connection.
    """
    load = under_load(stack, lambda: stack.compose(*SCALE, "stop", "haproxy"), after=1)
    log = stack.compose(*SCALE, "logs", "--no-log-prefix", "--since", "15s", "haproxy")
    cut = [line for line in log.splitlines() if "POST" in line]
    assert not cut and load.statuses["broken"] <= CONNECTIONS, (cut, load.statuses)
    begin = time.monotonic()
    stack.compose(*EVERYTHING, "down")  # without its profile or file, a service stays
    seconds = time.monotonic() - begin
    project = f"label=com.docker.compose.project={PROJECT}"
    left = stack.run("docker", "ps", "--all", "--format", "{{.Names}}", "--filter", project)
    assert not left.strip(), f"containers left: {left}"
    return f"{load.summary()}; HAProxy's log has none that it broke off; the rest took {seconds:.0f} s"


def commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
