"""The allocator of all contenders: jemalloc if the machine has it, else glibc's malloc.

Called by: `contenders.py`, `measurements.py`, `__main__.py`. Calls: the loader's LD_PRELOAD, /proc (Linux only).
"""

from __future__ import annotations

from collections.abc import Iterable
from ctypes.util import find_library
from functools import cache
from pathlib import Path

JEMALLOC = "libjemalloc.so.2"  # Debian: apt-get install libjemalloc2


@cache
def preloaded() -> str:
    """The library that every contender preloads; empty for glibc's malloc."""
    return JEMALLOC if find_library("jemalloc") == JEMALLOC else ""


def environment() -> dict[str, str]:
    """The library and its setting, as the image of Slatewise has them."""
    return {"LD_PRELOAD": preloaded(), "MALLOC_CONF": "oversize_threshold:0"}


def title() -> str:
    return f"jemalloc ({JEMALLOC})" if preloaded() else f"glibc's malloc, because the machine has no {JEMALLOC}"


def check(processes: Iterable[int]) -> None:
    """Raises RuntimeError if one of the processes has another allocator.

    The loader only warns if it does not find a library, and a server may start its workers with another environment.
    """
    for process in processes:
        mapped = Path(f"/proc/{process}/maps").read_text()
        if mapped and (JEMALLOC in mapped) != bool(preloaded()):  # an ended process has no mappings
            raise RuntimeError(f"process {process} does not use {title()}")
