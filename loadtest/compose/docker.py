"""A private copy of the checkout, and `docker compose` in it.

Called by: `steps.py`, `__main__.py`. Calls: docker and its plug-in compose; git.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROJECT = "slatewise-check"
FOLDER = ROOT / "build" / "compose-check"
REFRESH = ("-f", "docker-compose.yml", "-f", "deploy/compose/refresh.yaml")
UPDATE = ("-f", "docker-compose.yml", "-f", "deploy/compose/update.yaml")
EVERYTHING = (*REFRESH, *("--profile", "load"), *("--profile", "scale"), *("--profile", "grafana"))
SLOW_SECONDS = 1_800  # a build with a slow network


def missing() -> str | None:
    """Return one line that says what is missing for containers, or None."""
    if shutil.which("docker") is None:
        return "docker is missing: install Docker Engine, or on Debian `apt-get install docker.io`"
    for command, reason in (
        (["docker", "info"], "no Docker daemon answers: start Docker, or set DOCKER_HOST"),
        (["docker", "compose", "version"], "the plug-in `docker compose` (2.x) is missing"),
    ):
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode:
            return f"{reason} ({(found.stderr.strip().splitlines() or ['no output'])[-1]})"
    return None


def private_copy() -> None:
    """Copy the checkout as `umask 077` would make it: no other user may read a file.

    The certificates that the build needs behind a proxy come along, although Git ignores them.
    """
    shutil.rmtree(FOLDER, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    certificates = [str(path.relative_to(ROOT)) for path in ROOT.glob("deploy/certificates/*.crt")]
    for name in [*filter(None, listed.split("\0")), *certificates]:
        source, target = ROOT / name, FOLDER / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target, follow_symlinks=False)
    for path in (FOLDER, *FOLDER.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(0o700 if stat.S_ISDIR(mode) or mode & stat.S_IXUSR else 0o600)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Stack:
    """The services of the compose file in a project of their own, on free ports."""

    def __init__(self) -> None:
        self.port, self.balanced, self.prometheus = free_port(), free_port(), free_port()
        names = ("DOCKER_", "COMPOSE_DOCKER", "PIP_", "TORCH_", "HTTP", "NO_PROXY", "http", "no_proxy", "PATH", "HOME")
        self.environment = {key: value for key, value in os.environ.items() if key.startswith(names)} | {
            "COMPOSE_PROJECT_NAME": PROJECT,
            "SLATEWISE_PORT": str(self.port),
            "HAPROXY_PORT": str(self.balanced),
            "PROMETHEUS_PORT": str(self.prometheus),
        }

    def run(self, *arguments: str, check: bool = True, **settings: str) -> str:
        """Run a command in the copy. Return its output. Raises RuntimeError with the last lines of a failed one."""
        found = subprocess.run(
            arguments,
            cwd=FOLDER,
            env=self.environment | settings,
            capture_output=True,
            text=True,
            timeout=SLOW_SECONDS,
        )
        if check and found.returncode:
            last = "\n".join((found.stdout + found.stderr).strip().splitlines()[-15:])
            raise RuntimeError(f"{' '.join(arguments)} ended with status {found.returncode}:\n{last}")
        return found.stdout + found.stderr

    def compose(self, *arguments: str, check: bool = True, **settings: str) -> str:
        return self.run("docker", "compose", *arguments, check=check, **settings)

    def down(self) -> None:
        self.compose(*EVERYTHING, "down", "--volumes", "--remove-orphans", check=False)

    def container(self, service: str) -> str:
        """The id of a service's container, running or not. Raises RuntimeError if there is none."""
        found = self.compose(*REFRESH, "--profile", "scale", "ps", "--all", "--quiet", service).split()
        if not found:
            raise RuntimeError(f"no container of {service}")
        return found[-1]

    def state(self, service: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("docker", "inspect", self.container(service)))[0]
        return found["State"] | {"RestartCount": found["RestartCount"]}

    def healthy(self, service: str) -> bool:
        state = self.state(service)
        return bool(state["Running"]) and state.get("Health", {}).get("Status", "healthy") == "healthy"

    def python(self, service: str, code: str, **settings: str) -> str:
        """Run Python in a service's container."""
        return self.compose("--profile", "scale", "exec", "-T", service, "python", "-c", code, **settings).strip()

    def metrics(self, service: str) -> dict[str, float]:
        """The samples of a replica, by name with labels."""
        code = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8000/metrics').read().decode())"
        lines = (line for line in self.python(service, code).splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def ask(
    port: int, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """Status, headers in lower case, and the body of an answer. Raises OSError or HTTPException."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"} | (headers or {}))
        answer = connection.getresponse()
        text = answer.read().decode()
        content = json.loads(text) if "json" in answer.headers.get("content-type", "") else text
        return answer.status, {name.lower(): value for name, value in answer.headers.items()}, content
    finally:
        connection.close()


def until(condition: Callable[[], bool], seconds: float = 60.0) -> float:
    """Wait until a condition holds. Return the seconds. Raises TimeoutError."""
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        try:
            if condition():
                return time.monotonic() - begin
        except (OSError, http.client.HTTPException, RuntimeError):
            pass
        time.sleep(0.2)
    raise TimeoutError(f"not within {seconds:.0f} s: {condition.__doc__ or condition}")
