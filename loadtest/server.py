"""A Slatewise server of our own to be measured: a process, its CPU seconds and its resident memory."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def machine_cpu_seconds() -> float:
    """Of all that ran on this machine since it started, and of what the hypervisor took from it."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / TICKS


class Running:
    """A server that somebody else runs on this machine: it can be asked, and not metered."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            text = answer.read().decode()
            return answer.status, json.loads(text) if "json" in answer.headers.get("content-type", "") else text
        finally:
            connection.close()


class Server(Running):
    """A process that serves HTTP at `port`, ready when entered: `python -m slatewise.main` unless another command is given."""

    def __init__(
        self,
        settings: dict[str, str] | None = None,
        command: list[str] | None = None,
        port: int | None = None,
        ready: str = "/readyz",
    ) -> None:
        super().__init__(port or free_port())
        self.ready = ready
        self.command = command or [sys.executable, "-m", "slatewise.main"]
        self.environment = (
            os.environ
            | {f"SLATEWISE_{name}": value for name, value in (settings or {}).items()}
            | {"SLATEWISE_PORT": str(self.port)}
        )

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(self.command, env=self.environment, start_new_session=True)
        try:
            self.wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait(self) -> None:
        for _ in range(1_200):
            if self.process.poll() is not None:
                raise RuntimeError(f"{' '.join(self.command)} ended with status {self.process.returncode}")
            try:
                if self.get(self.ready)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise RuntimeError("the server did not get ready in two minutes")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def processes(self) -> list[int]:
        """Of the server's session, workers too."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid:  # session
                found.append(int(path.parent.name))
        return found

    def cpu_seconds(self) -> float:
        """User and system time, over all of its processes."""
        total = 0
        for pid in self.processes():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / TICKS

    def resident_mb(self) -> float:
        total = 0
        for pid in self.processes():
            total += sum(
                int(line.split()[1])
                for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                if line.startswith("VmRSS")
            )
        return total / 1024
