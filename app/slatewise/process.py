"""CPU quota, memory limit, allocator, closed standard streams, and CPU name.

Called by: main.py, and training and load tests, which name the CPU in their reports.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # in a container: the container's own cgroup
CPUINFO = Path("/proc/cpuinfo")
LARGE_BLOCK = 2 << 20  # bytes; the tensors of an ordinary request are smaller
M_TRIM_THRESHOLD = -1  # of mallopt(3)
M_MMAP_THRESHOLD = -3


def available_cpus() -> int:
    """Return the number of CPUs that may run this process: all CPUs on systems without affinity (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(cgroup: Path = CGROUP) -> int:
    """Return the cgroup's CPU quota (version 2 or 1), rounded down, but at least 1 and at most the available CPUs."""
    cpus = available_cpus()
    with suppress(OSError, ValueError):
        quota, period = read_quota(cgroup)
        if quota != "max" and int(quota) > 0:
            return max(1, min(cpus, int(quota) // int(period)))
    return cpus


def read_quota(cgroup: Path) -> tuple[str, str]:
    """Return (quota, period) in microseconds. A quota of "max" (version 2) or -1 (version 1) means unlimited."""
    with suppress(FileNotFoundError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return quota, period
    return (cgroup / "cpu/cpu.cfs_quota_us").read_text(), (cgroup / "cpu/cpu.cfs_period_us").read_text()


def memory_limit(cgroup: Path = CGROUP) -> int:
    """Return the smaller of the cgroup's memory limit (version 2 or 1) and the machine's memory, in bytes."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" is no number
            return min(machine, int((cgroup / name).read_text()))
    return machine


def bound_malloc() -> None:
    """Make glibc return freed blocks above LARGE_BLOCK, and the free end of the heap, to the system.

    By default glibc keeps this memory, so the memory of a server grows with the largest set of requests it ever served
    at once (docs/performance.md). Other C libraries have no mallopt; for them this function does nothing.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, 4 * LARGE_BLOCK)


def open_closed_streams() -> None:
    """Open the null device in place of each standard stream that the process was started without.

    Python has `None` for such a stream, which libraries write to, and the next socket would get its number.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is not None:
            continue
        stream = open(os.devnull, mode)  # noqa: SIM115 - it lives as long as the process
        setattr(sys, name, stream)
        try:
            os.fstat(number)
        except OSError:  # the number is free
            os.dup2(stream.fileno(), number)


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """Return the CPU model and the number of available CPUs, for reports of measurements."""
    names: list[str] = []
    with suppress(OSError):  # macOS has no /proc
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {available_cpus()} cores"
