"""The live generations of each space that is served.

A space is a set of vectors that versions of a ranker may share. The manifest names the space.
Called by: `poll.py` (writes), `node.py` (reads).
"""

from __future__ import annotations

from dataclasses import dataclass

SpaceKey = tuple[str, str]  # (ranker's name, space)


@dataclass(eq=False)
class Live:
    """The live generations at one read of the pointer. A later read with another result makes a new object."""

    pointer: bytes | None  # as stored; `None`: the key does not exist
    generations: list[str]  # newest first
    created_at: float | None = None  # of the newest generation, in unix seconds; `None`: not read yet

    @property
    def fields(self) -> list[str]:
        """Fields to request from a user's hash, newest first; without generations, a field that is never written."""
        return self.generations or ["0"]


@dataclass(eq=False)
class Space:
    """A space whose pointer has been read at least once."""

    key: SpaceKey
    live: Live
