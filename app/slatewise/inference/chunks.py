"""Work in chunks: a generator that computes one chunk after each `yield`, which gives the cost of the chunk in rows.

Parts of the work that do not depend on each other can run on several threads at the same time (`run_parts`).

Called by: `workers.py`, `slates.py`, `ranking/`; training and measurements, which have no threads. Calls: nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Split:
    """What a generator yields before work that has independent parts. `parts` makes at most so many of them.

    The answer is the list of their results, or `None` if no other thread is idle: then the generator does the work.
    """

    parts: Callable[[int], Sequence[Chunks[Any]]]


Chunks = Generator[int | Split, list[Any] | None, Result]


def run_all(chunks: Chunks[Result]) -> Result:
    """Run all chunks in this thread, and return the result of the generator."""
    try:
        while True:
            next(chunks)
    except StopIteration as end:
        result: Result = end.value
        return result


def run_parts(parts: Callable[[int], Sequence[Chunks[Result]]]) -> Chunks[list[Result]]:
    """Run the parts of some work, at the same time if threads are idle, and return their results in order.

    parts: makes the generators for a number of threads, at most one for each of them. For 1 it makes one.
    """
    results = yield Split(parts)
    if results is None:
        results = []
        for part in parts(1):
            results.append((yield from part))
    return results
