"""Who takes part: our own server and the peers, how each is started, and how each wants the body to be wrapped.

Before: `environments.py` (where each is installed). After: `measurements.py` starts and measures them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from loadtest.peers.environments import BUILD, BUNDLE, BUNDLES, GRAPHS, HERE
from loadtest.server import Server, free_port

OURS = "slatewise"


@dataclass(frozen=True)
class Setup:
    workers: int
    threads: int  # of each worker's session

    def __str__(self) -> str:
        return f"{self.workers} x {self.threads}"


def same(body: bytes) -> bytes:
    return body


def v2_request(body: bytes) -> bytes:
    """The Open Inference Protocol: the body as the one string of a tensor."""
    tensor = {
        "name": "body",
        "shape": [1],
        "datatype": "BYTES",
        "parameters": {"content_type": "str"},
        "data": [body.decode()],
    }
    return json.dumps({"inputs": [tensor]}).encode()


def v2_answer(answer: bytes) -> bytes:
    return json.loads(answer)["outputs"][0]["data"][0].encode()


@dataclass(frozen=True)
class Peer:
    """{port}, {spare} (another free port) and {workers} are put into the command and the environment."""

    title: str
    command: tuple[str, ...]
    path: str = "/rerank"
    ready: str = "/readyz"
    environment: dict[str, str] = field(default_factory=dict)
    workers: tuple[int, ...] = (1, 2)
    wrap: Callable[[bytes], bytes] = same
    unwrap: Callable[[bytes], bytes] = same

    def setups(self) -> list[Setup]:
        return [Setup(*pair) for pair in product(self.workers, (1, 2))]


PEERS = {
    "fastapi": Peer(
        "FastAPI",
        (
            f"{BUILD}/fastapi/bin/uvicorn",
            "loadtest.peers.fastapi_server:app",
            "--port",
            "{port}",
            "--workers",
            "{workers}",
            "--no-access-log",
        ),
    ),
    "bentoml": Peer(
        "BentoML",
        (
            f"{BUILD}/bentoml/bin/bentoml",
            "serve",
            "loadtest.peers.bentoml_service:Rerank",
            "--host",
            "127.0.0.1",
            "--port",
            "{port}",
        ),
        environment={"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(BUILD / "bentoml/home")},
    ),
    "litserve": Peer(
        "LitServe", (f"{BUILD}/litserve/bin/python", "-m", "loadtest.peers.litserve_server"), ready="/health"
    ),
    "mlserver": Peer(
        "MLServer",
        (f"{BUILD}/mlserver/bin/mlserver", "start", str(HERE / "mlserver")),
        path="/v2/models/rerank/infer",
        ready="/v2/models/rerank/ready",
        environment={
            "MLSERVER_HOST": "127.0.0.1",
            "MLSERVER_HTTP_PORT": "{port}",
            "MLSERVER_GRPC_PORT": "{spare}",
            "MLSERVER_PARALLEL_WORKERS": "{workers}",
            "MLSERVER_METRICS_DIR": str(BUILD / "mlserver/metrics"),
            "MLSERVER_ENVIRONMENTS_DIR": str(BUILD / "mlserver/environments"),
        },
        workers=(0, 1, 2),  # 0: inference in the process that speaks HTTP
        wrap=v2_request,
        unwrap=v2_answer,
    ),
}


class Contender(Server):
    """A server with its own log, counted and stopped with all its descendants: some peers' workers lead sessions of their own."""

    def __init__(self, command: tuple[str, ...], environment: dict[str, str], port: int, ready: str, log: Path) -> None:
        super().__init__(command=["sh", "-c", 'exec "$@" >>"$0" 2>&1', str(log), *command], port=port, ready=ready)
        self.environment |= environment

    def __exit__(self, *reason: object) -> None:
        family = self.family()
        try:
            super().__exit__(*reason)
        finally:
            for pid, (_, started) in all_processes().items():  # workers that outlive their server
                if pid in family and family[pid] == started:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def processes(self) -> list[int]:
        return list(self.family())

    def family(self) -> dict[int, str]:
        """Process to its start time, which tells it from a later process of the same number."""
        every = all_processes()
        found = {self.process.pid} & every.keys()
        while more := {pid for pid, (parent, _) in every.items() if parent in found} - found:
            found |= more
        return {pid: every[pid][1] for pid in sorted(found)}


def all_processes() -> dict[int, tuple[int, str]]:
    """Process to its parent and its start time."""
    processes = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            processes[int(path.parent.name)] = (int(fields[1]), fields[19])
    return processes


def our_server(variant: str, log: Path) -> Contender:
    """With its default settings, but for the variant that it loads."""
    return Contender(
        (sys.executable, "-m", "slatewise.main"),
        {"SLATEWISE_BUNDLES": str(BUNDLES), "SLATEWISE_VARIANTS": variant},
        free_port(),
        "/readyz",
        log,
    )


def peer_server(peer: Peer, graph: str, setup: Setup, log: Path) -> Contender:
    values: dict[str, Any] = {"port": free_port(), "spare": free_port(), "workers": setup.workers}
    environment = {
        "PYTHONPATH": ".",
        "PEER_BUNDLE": str(BUNDLE),
        "PEER_GRAPH": str(GRAPHS[graph]),
        "PEER_THREADS": str(setup.threads),
        "PEER_WORKERS": "{workers}",
        "PEER_PORT": "{port}",
    } | peer.environment
    command = tuple(part.format(**values) for part in peer.command)
    return Contender(
        command, {name: value.format(**values) for name, value in environment.items()}, values["port"], peer.ready, log
    )
