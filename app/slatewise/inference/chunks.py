"""Work in chunks: a generator that computes one chunk after each `yield`, which gives the cost of the chunk in rows.

Called by: `workers.py`, `slates.py`, `ranking/`; training and measurements, which have no threads. Calls: nothing.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")
Chunks = Generator[int, None, Result]


def run_all(chunks: Chunks[Result]) -> Result:
    """Run all chunks in this thread, and return the result of the generator."""
    try:
        while True:
            next(chunks)
    except StopIteration as end:
        result: Result = end.value
        return result
