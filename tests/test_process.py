"""CPU quota and memory limit of made-up cgroup folders, and systems without Linux's interfaces."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from slatewise import process
from slatewise.process import available_cpus, bound_malloc, cpu_name, cpu_quota, memory_limit, open_closed_streams

MACHINE = memory_limit(Path("/nowhere"))


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "available_cpus", lambda: 8)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


QUOTAS = [
    ("max 100000", 8),
    ("200000 100000", 2),
    ("250000 100000", 2),  # whole CPUs
    ("50000 100000", 1),  # at least one
    ("6400000 100000", 8),  # at most those that there are
    ("", 8),
    ("100000", 8),
    ("a b", 8),
]


@pytest.mark.parametrize(("text", "cpus"), QUOTAS)
def test_cpu_quota_of_cgroup_2(tmp_path: Path, text: str, cpus: int) -> None:
    assert cpu_quota(write(tmp_path, {"cpu.max": text + "\n"})) == cpus


@pytest.mark.parametrize(("quota", "cpus"), [("-1", 8), ("200000", 2), ("50000", 1), ("6400000", 8), ("0", 8), ("", 8)])
def test_cpu_quota_of_cgroup_1(tmp_path: Path, quota: str, cpus: int) -> None:
    files = {"cpu/cpu.cfs_quota_us": quota + "\n", "cpu/cpu.cfs_period_us": "100000\n"}
    assert cpu_quota(write(tmp_path, files)) == cpus


def test_cpu_quota_without_cgroups_is_the_available_cpus(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) == 8


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [("1048576", 1 << 20), ("max", MACHINE), ("9223372036854771712", MACHINE), ("", MACHINE), ("x", MACHINE)],
)
def test_memory_limit_of_both_cgroups(tmp_path: Path, name: str, text: str, expected: int) -> None:
    assert memory_limit(write(tmp_path, {name: text + "\n"})) == expected


def test_cpus_without_affinity_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert available_cpus() == os.cpu_count()


def test_cpu_name_is_the_models(tmp_path: Path) -> None:
    info = (
        write(tmp_path, {"cpuinfo": "processor\t: 0\nmodel name\t: Fast CPU\n\nmodel name\t: Fast CPU\n"}) / "cpuinfo"
    )
    assert cpu_name(info) == "Fast CPU, 8 cores"


def test_cpu_name_without_proc_is_the_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert cpu_name(tmp_path / "cpuinfo") == f"{platform.machine()}, 8 cores"


def test_bound_malloc_does_nothing_without_mallopt(monkeypatch: pytest.MonkeyPatch) -> None:
    bound_malloc()
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: object())
    bound_malloc()


def test_server_starts_without_affinity() -> None:
    code = "import os; del os.sched_getaffinity; from slatewise.cli import main; main(['serve', '--port', '0'])"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        log = ""
        for line in server.stderr:
            log += line
            if "listening on" in line:
                server.terminate()
        assert server.wait(30) == 0, log
        assert "listening on" in log


def test_closed_streams_are_the_null_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    kept = sys.stderr
    open_closed_streams()
    try:
        print("nowhere", flush=True)
        assert sys.stdout.name == os.devnull and not sys.stdout.isatty() and sys.stderr is kept
        os.fstat(1)  # was open, and is left as it was
    finally:
        sys.stdout.close()


def test_a_free_number_of_a_stream_is_taken() -> None:
    """Otherwise the next socket would get it, and what is printed would go to a client."""
    code = "from slatewise.process import open_closed_streams as o; import os, sys; o(); o(); os.fstat(1); sys.exit(7)"
    command = ["bash", "-c", '"$@" >&-', "bash", sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (7, "")
