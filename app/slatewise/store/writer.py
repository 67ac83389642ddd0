"""A generation that is being written, with the lock that excludes other writers of the space.

Called by: `generations.py`, `pointer.py` and commands for the errors. Calls: `client.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from typing import Any

from redis.exceptions import RedisError

from slatewise.store.client import run_script

LOCK_SECONDS = 30  # longest time for which a writer that died blocks others

RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('EXPIRE', KEYS[1], ARGV[2]) end return 0"
RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class StoreError(RuntimeError):
    """The store refuses an operation; the message gives the reason."""


class Busy(StoreError):
    """Another writer holds the lock."""


class GenerationWriter:
    """A generation that is being written, and its lock, which a thread renews until `release`.

    If the context ends before the generation is published, the finished chunks stay, and `Generations.begin` can resume
    the generation.
    """

    def __init__(self, client: Any, lock_key: str, pointer_key: str) -> None:
        """Take the lock. Raises Busy."""
        self.client = client
        self.lock_key = lock_key
        self.token = take_lock(client, lock_key, pointer_key)
        self.generation = 0
        self.full = False
        self.done = set[int]()  # chunks that are written
        self.ended = threading.Event()
        threading.Thread(target=self.renew, daemon=True).start()

    def renew(self) -> None:
        while not self.ended.wait(LOCK_SECONDS / 3):
            with contextlib.suppress(Exception):  # the next try may succeed; otherwise `publish` finds the lock lost
                run_script(self.client, RENEW, [self.lock_key], self.token, LOCK_SECONDS)

    def release(self) -> None:
        if not self.ended.is_set():
            self.ended.set()
            with contextlib.suppress(RedisError):  # the lock expires by itself; an earlier error is the one to report
                run_script(self.client, RELEASE, [self.lock_key], self.token)

    def __enter__(self) -> GenerationWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def take_lock(client: Any, lock_key: str, pointer_key: str) -> str:
    """Take the lock and return its content. Raises Busy with the holder's name and time."""
    mine = json.dumps(
        {
            "holder": f"process {os.getpid()} on {socket.gethostname()}",
            "since": time.time(),
            "token": secrets.token_hex(8),
        }
    )
    while not client.set(lock_key, mine, nx=True, ex=LOCK_SECONDS):
        held = client.get(lock_key)
        if held is None:  # released just now
            continue
        if held.decode() == mine:  # the lock was set, and only the reply was lost
            break
        other = json.loads(held)
        seconds = max(0.0, time.time() - other["since"])
        raise Busy(f"{pointer_key} is being written by {other['holder']}, for {seconds:.0f} s")
    return mine


def finished(writing: dict[bytes, bytes]) -> dict[int, tuple[int, int]]:
    """Return the finished chunks of a generation that is being written: chunk -> (users, bytes)."""
    return {
        int(key[6:]): (int(value.split()[0]), int(value.split()[1]))
        for key, value in writing.items()
        if key.startswith(b"chunk:")
    }
