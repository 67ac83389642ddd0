"""The contenders: Slatewise and the peers, their start commands, and their request and answer formats.

Called by: `measurements.py`. Calls: `allocator.py`, `server_process.py`; `environments.py` names their folders.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from loadtest.peers import allocator
from loadtest.peers.environments import BUILD, BUNDLE, GRAPHS, HERE, ROOT
from loadtest.server_process import SERVE, ServerProcess
from tests.support.network import free_port

OURS = "slatewise"


@dataclass(frozen=True)
class Setup:
    workers: int
    threads: int  # threads of each worker's session

    def __str__(self) -> str:
        return f"{self.workers} x {self.threads}"


def same(body: bytes) -> bytes:
    return body


def v2_request(body: bytes) -> bytes:
    """The Open Inference Protocol: the body as a tensor with one string."""
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
    """A peer. {port}, {spare} (a second free port) and {workers} are filled into `command` and `environment`."""

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
        workers=(0, 1, 2),  # 0: inference in the HTTP process
        wrap=v2_request,
        unwrap=v2_answer,
    ),
}


class Contender(ServerProcess):
    """A server with the common allocator that appends its output to a log file."""

    def __init__(self, command: tuple[str, ...], environment: dict[str, str], port: int, ready: str, log: Path) -> None:
        redirected = ("sh", "-c", 'exec "$@" >>"$0" 2>&1', str(log), *command)
        super().__init__(
            command=redirected,
            port=port,
            ready=ready,
            environment=os.environ | environment | allocator.environment(),
        )


def our_server(bundles: Path, variant: str, log: Path) -> Contender:
    """Slatewise with its default settings and one variant."""
    return Contender(
        SERVE,
        {"SLATEWISE_BUNDLES": str(bundles), "SLATEWISE_VARIANTS": variant},
        free_port(),
        "/readyz",
        log,
    )


def peer_server(peer: Peer, graph: str, setup: Setup, log: Path) -> Contender:
    values: dict[str, Any] = {"port": free_port(), "spare": free_port(), "workers": setup.workers}
    environment = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'app'}",  # loadtest.peers, and slatewise for the features
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
