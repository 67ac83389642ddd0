"""The machine as the process sees it: CPU quota, memory limit, allocator, CPU name.

Called by: main.py; training and load tests name the CPU in their reports.
"""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # in a container: the container's own cgroup
CPUINFO = Path("/proc/cpuinfo")
LARGE_BLOCK = 2 << 20  # bytes; the tensors of an ordinary request are smaller
M_TRIM_THRESHOLD = -1  # of mallopt(3)
M_MMAP_THRESHOLD = -3


def available_cpus() -> int:
    """CPUs that the scheduler may run this process on; all CPUs on systems without affinity (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(cgroup: Path = CGROUP) -> int:
    """Whole CPUs: the smaller of the cgroup's quota (version 2 or 1) and the available CPUs, at least 1."""
    cpus = available_cpus()
    with suppress(OSError, ValueError):
        quota, period = read_quota(cgroup)
        if quota != "max" and int(quota) > 0:
            return max(1, min(cpus, int(quota) // int(period)))
    return cpus


def read_quota(cgroup: Path) -> tuple[str, str]:
    """(quota, period) in microseconds; a quota of "max" (version 2) or -1 (version 1) means unlimited."""
    with suppress(FileNotFoundError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return quota, period
    return (cgroup / "cpu/cpu.cfs_quota_us").read_text(), (cgroup / "cpu/cpu.cfs_period_us").read_text()


def memory_limit(cgroup: Path = CGROUP) -> int:
    """Bytes: the smaller of the cgroup's limit (version 2 or 1) and the memory of the machine."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" is no number
            return min(machine, int((cgroup / name).read_text()))
    return machine


def bound_malloc() -> None:
    """Make glibc return freed blocks above LARGE_BLOCK, and the free end of the heap, to the system.

    By default glibc keeps them, so a server grows with the largest set of requests it ever served at once
    (docs/performance.md). Other C libraries have no mallopt, and nothing is done.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, 4 * LARGE_BLOCK)


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """Model and number of the available CPUs, for reports of measurements."""
    names: list[str] = []
    with suppress(OSError):  # macOS has no /proc
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {available_cpus()} cores"
