"""Servers as child processes, and the direction of imports between load tests and test helpers."""

from __future__ import annotations

import ast
import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from loadtest.peers.contenders import PEERS, Setup, peer_server
from loadtest.server_process import ServerProcess
from tests.conftest import HERE
from tests.support.network import free_port


def null_server(port: int) -> tuple[str, ...]:
    return (sys.executable, "-m", "loadtest.server.null_server", str(port), "16")


def test_server_process_starts_reports_cpu_memory_and_stops() -> None:
    port = free_port()
    with ServerProcess(command=null_server(port), port=port, ready="/", folder=HERE.parent) as server:
        assert server.get("/") == (200, "0" * 14)
        assert server.cpu_seconds() > 0
        assert server.resident_mb() > 5
    assert server.process.poll() is not None
    assert server.processes() == [] and server.cpu_seconds() == 0


def test_child_that_outlives_its_server_is_killed() -> None:
    port = free_port()
    command = ("sh", "-c", 'sleep 600 & exec "$@"', "sh", *null_server(port))
    with ServerProcess(command=command, port=port, ready="/", folder=HERE.parent) as server:
        (child,) = server.processes()[1:]
        assert child.name() == "sleep"
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_server_that_ends_at_start_raises() -> None:
    with (
        pytest.raises(RuntimeError, match="ended with status 3"),
        ServerProcess(command=(sys.executable, "-c", "raise SystemExit(3)")),
    ):
        pass


@pytest.mark.parametrize("name", PEERS)
def test_peer_environment_disables_telemetry(name: str, tmp_path: Path) -> None:
    """ONNX Runtime reads the variable; a peer's server does not import slatewise before it."""
    server = peer_server(PEERS[name], "rank", Setup(1, 1), tmp_path / "log")
    assert server.environment["ORT_DISABLE_TELEMETRY"] == os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    assert str(HERE.parent / "app") in server.environment["PYTHONPATH"].split(":")


def imported(path: Path) -> set[str]:
    """Modules that a file imports, imports inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_test_helpers_import_no_load_test_and_no_test() -> None:
    for path in (HERE / "support").glob("*.py"):
        for module in imported(path):
            assert not module.startswith("loadtest"), path
            assert not module.startswith("tests.") or module.startswith("tests.support."), path


def test_load_tests_import_only_test_helpers_of_tests() -> None:
    for path in (HERE.parent / "loadtest").rglob("*.py"):
        assert all(module.startswith("tests.support.") for module in imported(path) if module.startswith("tests")), path


def test_traffic_imports_no_test_helper() -> None:
    """docker-compose.yml mounts loadtest/ without tests/."""
    for name in ("__init__", "client", "traffic", "workload"):
        assert not any(module.startswith("tests") for module in imported(HERE.parent / "loadtest" / f"{name}.py"))
