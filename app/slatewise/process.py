"""The machine as the process sees it: CPU quota, memory limit, allocator, CPU name."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

LARGE_BLOCK = 2 << 20  # bytes: no tensor of an ordinary request is larger


M_TRIM_THRESHOLD = -1


M_MMAP_THRESHOLD = -3  # of mallopt(3)


def cpu_quota() -> int:
    """Whole CPUs that the cgroup lets this process use: its quota where there is one, else what it may be scheduled on."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def memory_limit() -> int:
    """Bytes: the cgroup's limit where there is one, else the machine's memory."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return machine if limit == "max" else min(machine, int(limit))
    except (OSError, ValueError):
        return machine


def bound_malloc() -> None:
    """Where the C library is glibc: blocks above LARGE_BLOCK go back to the system when they are freed, and so does the end of the heap.

    By itself glibc keeps them, and a server grows with the largest requests that ever came together (docs/performance.md).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, 4 * LARGE_BLOCK)


def cpu_name() -> str:
    """The machine that a measurement was made on."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"
