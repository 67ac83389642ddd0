"""The state of the spaces that are served: which generations of vectors are live in each.

A ranker's meta-embeddings belong to a space, which its manifest names. Versions of a ranker may share a space or not.
Called by: `poll` (writes), `node` and `lookup` (read). Calls: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

SpaceKey = tuple[str, str]  # (ranker's name, space)


@dataclass(eq=False)
class Live:
    """The live generations as one read of the pointer listed them. Another read that differs makes another object."""

    pointer: bytes | None  # as stored; `None`: the key does not exist
    generations: list[str]  # newest first
    created_at: float | None = None  # of the newest generation, in unix seconds; `None`: not read yet

    @property
    def fields(self) -> list[str]:
        """The fields to ask for in a user's hash, newest first. Without generations, a field that is never written."""
        return self.generations or ["0"]


@dataclass(eq=False)
class Space:
    """A space whose pointer has been read at least once."""

    key: SpaceKey
    live: Live
