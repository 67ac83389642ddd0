"""Start a server as a child process, wait until it is ready, and read its CPU time and memory.

Called by: every measurement that needs a server. Calls: psutil.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.support.network import free_port

SERVE = (sys.executable, "-m", "slatewise", "serve")
READY_SECONDS = 120.0
STOP_SECONDS = 60.0


def exit_on_sigterm() -> None:
    """Turn SIGTERM into SystemExit, so that `with` blocks stop the servers that they started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def machine_cpu_seconds() -> float:
    """CPU seconds of all processes since the machine started, time stolen by the hypervisor included."""
    times = psutil.cpu_times()
    return float(
        sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal")),
    )


class RunningServer:
    """A server on this machine that another process started: requests work, CPU and memory are unknown."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get(self, path: str) -> tuple[int, Any]:
        """Status and content of an answer: decoded JSON, or text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            text = answer.read().decode()
            return answer.status, json.loads(text) if "json" in answer.headers.get("content-type", "") else text
        finally:
            connection.close()

    def sample(self, name: str) -> float:
        """Sum of the samples in /metrics whose line begins with `name`."""
        lines = str(self.get("/metrics")[1]).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


class ServerProcess(RunningServer):
    """A child process that serves HTTP at `port`, ready inside the `with` block. The default command is Slatewise.

    settings: name without SLATEWISE_ -> value. environment: replaces this process's environment.
    """

    def __init__(
        self,
        settings: dict[str, str] | None = None,
        command: tuple[str, ...] = SERVE,
        port: int | None = None,
        ready: str = "/readyz",
        folder: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        super().__init__(port or free_port())
        self.ready = ready
        self.command = command
        self.folder = folder
        self.environment = (
            (dict(os.environ) if environment is None else environment)
            | {f"SLATEWISE_{name}": value for name, value in (settings or {}).items()}
            | {"SLATEWISE_PORT": str(self.port)}
        )

    def __enter__(self) -> ServerProcess:
        self.process = subprocess.Popen(
            self.command,
            env=self.environment,
            cwd=self.folder,
            start_new_session=True,
            stdout=sys.__stderr__.fileno() if sys.__stderr__ else None,  # standard output is for the report
        )
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait_until_ready(self) -> None:
        """Raises RuntimeError if the process ends or is not ready after READY_SECONDS."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"{' '.join(self.command)} ended with status {self.process.returncode}")
            with suppress(OSError):
                if self.get(self.ready)[0] == 200:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the server was not ready after {READY_SECONDS:.0f} seconds")

    def __exit__(self, *_: object) -> None:
        processes = self.processes()
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for process in processes:  # workers that outlive their server; psutil checks that the id was not reused
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self) -> list[psutil.Process]:
        """The server's process and all its descendants, also those that lead sessions of their own."""
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def cpu_seconds(self) -> float:
        """User and system time of all processes of the server."""
        total = 0.0
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def minor_faults(self) -> int:
        """Page faults so far of all processes of the server that needed no disk. Linux only: it reads /proc."""
        return sum(
            int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[7])
            for process in self.processes()
        )

    def resident_mb(self) -> float:
        total = 0
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total / 2**20
