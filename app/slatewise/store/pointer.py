"""Reads and atomically changes the pointer, the key that lists the live generations of a space.

Called by: `generations.py`. Calls: `client.py`, `codec.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Container, Sequence
from typing import Any

from slatewise.store.client import run_script
from slatewise.store.codec import read_pointer
from slatewise.store.writer import StoreError

KEPT = 3  # least number of live generations: the newest, and two to roll back to

# Compare and swap. If the token is already there, this change was already made and its reply was lost.
SWAP = """
if redis.call('GET', KEYS[2]) == ARGV[3] then return 1 end
if ARGV[4] ~= '' and redis.call('HGET', KEYS[3], 'generation') ~= ARGV[4] then return -1 end
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[3], 'EX', 600)
if ARGV[4] ~= '' then redis.call('DEL', KEYS[3]) end
return 1
"""


def live_after(generation: int, live: Sequence[int], full: Container[int]) -> list[int]:
    """Return the live list after publishing `generation`.

    It has as few of the newest generations as possible, but enough that a full generation remains after two roll-backs:
    an incremental generation contains only users that changed. `full` contains the full generations.
    """
    everything = [generation, *(g for g in live if g != generation)]
    for length in range(KEPT, len(everything) + 1):
        if any(g in full for g in everything[KEPT - 1 : length]):
            return everything[:length]
    return everything


class Pointer:
    """The pointer of one space. `writing_key` is the key of the generation that is being written."""

    def __init__(self, client: Any, key: str, token_key: str, writing_key: str) -> None:
        self.client = client
        self.key = key
        self.token_key = token_key
        self.writing_key = writing_key

    def read(self) -> tuple[list[int], int]:
        """Return (live generations, newest first; number of deleted users)."""
        return read_pointer(self.client.get(self.key))

    def swap(
        self, change: Callable[[list[int]], list[int]], deleted_users: int = 0, publishes: int | None = None
    ) -> list[int]:
        """Replace the live list by `change(live list)`. Return the new list.

        After a concurrent change, `change` is applied again to the newer list, so no change is lost. A command that is
        repeated after a lost reply applies once. With `publishes`, raises StoreError if that generation is not being
        written any more.
        """
        token = secrets.token_hex(8)
        while True:
            before = self.client.get(self.key) or b""
            live, deleted = read_pointer(before)
            live = change(live)
            deleted += deleted_users
            after = ",".join(map(str, live)) + (f"#{deleted}" if deleted else "")
            published = "" if publishes is None else publishes
            keys = [self.key, self.token_key, self.writing_key]
            answer = run_script(self.client, SWAP, keys, before, after, token, published)
            if answer < 0:
                raise StoreError(f"generation {publishes} was taken over by another writer")
            if answer:
                return live
