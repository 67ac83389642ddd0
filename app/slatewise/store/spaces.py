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
        """The fields of a user's hash to read: one for each live generation, newest first.

        Without generations it is "0", which no writer uses, because HMGET needs a field.
        """
        return self.generations or ["0"]


@dataclass(eq=False)
class Space:
    """A space whose pointer has been read at least once."""

    key: SpaceKey
    live: Live
