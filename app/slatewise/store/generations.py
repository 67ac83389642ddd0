"""Writes, publishes, rolls back, merges and sweeps generations of meta-embeddings in Redis.

A generation is a numbered set of vectors that becomes visible at once. Keys, besides the users' hashes (`codec.py`):

    slatewise:<ranker>:<space>:generations            the pointer; replicas read only the generations that it lists
    slatewise:<ranker>:<space>:generations:last       the last number assigned; no number is assigned twice
    {slatewise:<ranker>:<space>:generations}:about    hash; generation -> JSON: created_at, kind, users, watermark, plan
    {...}:writing                                     the generation being written, with its chunks
    {...}:lock                                        the lock of its writer
    {...}:token                                       id of the last change, so that a repeated command applies once
    {...}:forgotten                                   users deleted during a write

In a Cluster, the braces put the keys that a script changes together into one slot.
Called by: `push.py`, `admin.py` and the refresh job. Calls: `pointer.py`, `writer.py`, `codec.py`.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, cast

from slatewise.inference.arrays import Float32
from slatewise.store.client import Client, is_wrong_type, run_script
from slatewise.store.codec import first_readable, metadata_key, pack_many, pointer_key, read_pointer, user_key
from slatewise.store.pointer import KEPT, Pointer, live_after
from slatewise.store.writer import GenerationWriter, StoreError, finished

BATCH = 1_000  # users in one round trip
MAX_LIVE = 16  # generations above which they are merged: each adds a field to every look-up
MOST_DEAD = 64  # most dead fields that a write removes; a sweep removes all
SWEEP_WAIT_SECONDS = (
    2.5  # longer than two polls of a replica: by then no replica reads generations that left the pointer
)

MARK = (
    "if redis.call('HGET', KEYS[1], 'generation') == ARGV[1] then "
    "redis.call('HSET', KEYS[1], ARGV[2], ARGV[3]) return 1 end return 0"
)


class Generations:
    """The generations of one space of a ranker. Each process needs a client of its own (`connect`)."""

    def __init__(self, client: Client, ranker: str, space: str, ttl_days: float = 0.0) -> None:
        self.client: Any = client  # redis-py types its blocking and its asyncio API as one
        self.ranker = ranker
        self.space = space
        self.ttl_seconds = int(ttl_days * 86_400)
        self.metadata_key = metadata_key(ranker, space)
        key = pointer_key(ranker, space)
        self.writing_key = f"{{{key}}}:writing"
        self.lock_key = f"{{{key}}}:lock"
        self.deleted_key = f"{{{key}}}:forgotten"
        self.pointer = Pointer(self.client, key, f"{{{key}}}:token", self.writing_key)

    def live(self) -> list[int]:
        """Return the live generations, newest first."""
        return self.pointer.read()[0]

    def metadata(self) -> dict[int, dict[str, Any]]:
        return {
            int(generation): json.loads(text) for generation, text in self.client.hgetall(self.metadata_key).items()
        }

    def begin(self, plan: str, full: bool) -> GenerationWriter:
        """Take the lock and begin a generation, or resume an unfinished one with the same plan. Raises Busy.

        plan: a digest of all inputs that determine the vectors and their division into chunks.
        """
        writer = GenerationWriter(self.client, self.lock_key, self.pointer.key)
        try:
            writer.full = full
            kind = "full" if full else "incremental"
            found = self.client.hgetall(self.writing_key)
            if found and (found[b"plan"].decode(), found[b"kind"].decode()) == (plan, kind):
                writer.generation = int(found[b"generation"])
                writer.done = set(finished(found))
                return writer
            if found:
                self.abandon(int(found[b"generation"]))
            writer.generation = int(self.client.incr(f"{self.pointer.key}:last"))
            live = self.live()
            dead = sorted((g for g in self.metadata() if g not in live), reverse=True)[:MOST_DEAD]
            self.client.delete(self.deleted_key)
            state = {
                "generation": writer.generation,
                "plan": plan,
                "kind": kind,
                "started": time.time(),
                "dead": ",".join(map(str, dead)),
            }
            self.client.hset(self.writing_key, mapping=state)
            return writer
        except BaseException:
            writer.release()
            raise

    def abandon(self, generation: int) -> None:
        """Give up a generation: it is never published, and a later write or sweep removes its fields."""
        self.client.hset(
            self.metadata_key, str(generation), json.dumps({"kind": "abandoned", "created_at": time.time(), "users": 0})
        )
        self.client.delete(self.writing_key)

    def write_chunk(
        self,
        generation: int,
        chunk: int,
        users: Sequence[str],
        vectors: Float32,
        created_at: float,
        dtype: str = "float32",
    ) -> int:
        """Write and verify the (users, M) vectors of one chunk. Return the size of the stored values in bytes.

        Any process may write any chunk, and repeat it. Raises StoreError if the generation is not being written (any
        more), and redis-py's exceptions.
        """
        if len(set(users)) != len(users) or len(users) != len(vectors):
            raise ValueError("users must be different, and as many as vectors")
        size = self.put(generation, list(users), pack_many(vectors, generation, created_at, dtype), self.ttl_seconds)
        self.mark(generation, chunk, len(users), size)
        return size

    def mark(self, generation: int, chunk: int, users: int, size: int) -> None:
        """Record that a chunk is finished, with its numbers of users and bytes. Raises StoreError."""
        if not run_script(self.client, MARK, [self.writing_key], generation, f"chunk:{chunk}", f"{users} {size}"):
            raise StoreError(f"generation {generation} is not being written any more")

    def put(self, generation: int, users: list[str], values: list[bytes], ttl_seconds: int = 0) -> int:
        """Store values in the users' hashes, remove dead fields, and verify the values by reading them back.

        Return the size of the values in bytes. Raises StoreError.
        """
        current, dead = self.client.hmget(self.writing_key, "generation", "dead")
        if current is None or int(current) != generation:
            raise StoreError(f"generation {generation} is not being written")
        field = str(generation)
        fields = [d for d in dead.decode().split(",") if d]
        for first in range(0, len(users), BATCH):
            keys = [user_key(self.ranker, self.space, user) for user in users[first : first + BATCH]]
            batch = values[first : first + BATCH]
            pipe = self.client.pipeline(transaction=False)
            for key, value in zip(keys, batch, strict=True):
                pipe.hset(key, field, value)
                if fields:
                    pipe.hdel(key, *fields)
                if ttl_seconds:
                    pipe.expire(key, ttl_seconds)
                pipe.hget(key, field)
            answers = pipe.execute(raise_on_error=False)
            read = answers[len(answers) // len(keys) - 1 :: len(answers) // len(keys)]
            odd = [k for k, answer in enumerate(read) if is_wrong_type(answer)]
            for k in odd:  # not written by us, and it would stop every refresh
                self.client.delete(keys[k])
                self.put(generation, [users[first + k]], [batch[k]], ttl_seconds)
                read[k] = batch[k]
            raise_first(answers)
            if read != batch:
                raise StoreError(f"generation {generation} does not read back as it was written")
        return sum(map(len, values))

    def publish(
        self, writer: GenerationWriter, chunks: int, watermark: float = 0.0, over: list[int] | None = None
    ) -> list[int]:
        """Make the generation visible by one change of the pointer. Return the live list.

        chunks: number of chunks, which must all be written. watermark: time of the newest event that the vectors
        include. over: if given, the live list must still be equal to it. Releases the lock, and merges if the live list
        is long. Raises StoreError.
        """
        generation = writer.generation
        found = self.client.hgetall(self.writing_key)
        if int(found.get(b"generation", -1)) != generation:
            raise StoreError(f"generation {generation} was taken over by another writer")
        done = finished(found)
        if missing := set(range(chunks)) - done.keys():
            raise StoreError(f"generation {generation}: {len(missing)} of {chunks} chunks are not written")
        users, size = (sum(done[chunk][k] for chunk in range(chunks)) for k in (0, 1))
        if writer.full and not users:
            raise StoreError(f"generation {generation} is full and has no users")
        for user in self.client.smembers(self.deleted_key):
            self.client.delete(user_key(self.ranker, self.space, user.decode()))
        known = self.metadata()
        metadata = {
            "kind": "full" if writer.full else "incremental",
            "created_at": time.time(),
            "users": users,
            "bytes": size,
            "watermark": watermark,
        }
        self.client.hset(self.metadata_key, str(generation), json.dumps(metadata | {"plan": found[b"plan"].decode()}))
        full = {g for g, each in known.items() if each["kind"] == "full"} | ({generation} if writer.full else set())

        def with_this(live: list[int]) -> list[int]:
            if over is not None and live != over:
                raise StoreError(f"generation {generation} was made from {over}, live are {live}")
            return live_after(generation, live, full)

        live = self.pointer.swap(with_this, publishes=generation)
        self.client.delete(self.deleted_key)
        writer.release()
        if len(live) > MAX_LIVE - KEPT and not full & set(live[:KEPT]):
            with contextlib.suppress(StoreError):  # another process writes or rolls back: the next publish merges
                live = self.merge()
        return live

    def abort(self, writer: GenerationWriter) -> None:
        """Give the generation up and release the lock."""
        if int(self.client.hget(self.writing_key, "generation") or -1) == writer.generation:
            self.abandon(writer.generation)
        writer.release()

    def roll_back(self) -> list[int]:
        """Remove the newest generation from the live list. Return the new live list. Raises StoreError.

        The number of the removed generation is not assigned again.
        """

        def without_newest(live: list[int]) -> list[int]:
            if len(live) < 2:
                raise StoreError(
                    f"nothing to roll back to: {'one generation is' if live else 'no generations are'} live"
                )
            return live[1:]

        return self.pointer.swap(without_newest)

    def delete_user(self, user: str) -> bool:
        """Delete all vectors of a user, also from a generation being written. Return whether the user had vectors.

        The pointer changes too, so that replicas empty their caches.
        """
        if self.client.exists(self.writing_key):
            self.client.sadd(self.deleted_key, user)
        existed = bool(self.client.delete(user_key(self.ranker, self.space, user)))
        if self.client.exists(self.pointer.key):
            self.pointer.swap(lambda live: live, deleted_users=1)
        return existed

    def keys(self) -> Iterator[list[bytes]]:
        """Yield the keys of all users, in batches."""
        pattern = re.sub(r"([][*?\\])", r"\\\1", user_key(self.ranker, self.space, "")[:-1]) + "*"
        found = cast("Iterator[bytes]", self.client.scan_iter(match=pattern, count=BATCH))
        while batch := list(islice(found, BATCH)):
            yield batch

    def merge(self) -> list[int]:
        """Copy each user's newest live vector into a new full generation, ages unchanged, and publish it.

        Return the live list. Raises StoreError.
        """
        live = self.live()
        if not live:
            raise StoreError("no generations are live")
        prefix = len(user_key(self.ranker, self.space, "").encode()) - 1
        with self.begin(f"merge of {','.join(map(str, live))}", full=True) as writer:
            users = size = 0
            for keys in self.keys():
                pipe = self.client.pipeline(transaction=False)
                for key in keys:
                    pipe.hmget(key, live)
                answers = pipe.execute(raise_on_error=False)
                raise_first(answers)
                newest = {
                    key[prefix:-1].decode(): first_readable(answer, writer.generation)
                    for key, answer in zip(keys, answers, strict=True)
                    if isinstance(answer, list)
                }
                copies = {user: value for user, value in newest.items() if value is not None}
                users += len(copies)
                size += self.put(writer.generation, list(copies), list(copies.values()))
            with contextlib.suppress(StoreError):  # `publish` reports it
                self.mark(writer.generation, 0, users, size)
            metadata = self.metadata()
            watermark = max((metadata[g].get("watermark", 0.0) for g in live if g in metadata), default=0.0)
            try:
                return self.publish(writer, 1, watermark, over=live)
            except StoreError:  # after a concurrent roll-back the copies may hold vectors that were rolled back
                self.abort(writer)
                raise

    def sweep(self, wait_seconds: float = SWEEP_WAIT_SECONDS) -> int:
        """Remove the fields of dead generations, once no replica can still read them. Return their number."""
        while True:
            metadata = self.metadata()
            before = self.client.get(self.pointer.key)
            if not metadata.keys() - set(read_pointer(before)[0]):
                return 0
            time.sleep(wait_seconds)
            # read before the pointer: a generation that is published meanwhile is in one of the two
            writing = self.client.hget(self.writing_key, "generation")
            if self.client.get(self.pointer.key) == before:
                break
        dead = sorted(metadata.keys() - set(read_pointer(before)[0]) - {int(writing or -1)})
        removed = 0
        for keys in self.keys() if dead else ():
            pipe = self.client.pipeline(transaction=False)
            for key in keys:
                pipe.hdel(key, *dead)
            removed += sum(answer for answer in pipe.execute(raise_on_error=False) if isinstance(answer, int))
        if dead:
            self.client.hdel(self.metadata_key, *dead)
        return removed

    def status(self) -> dict[str, Any]:
        """Describe the live generations and the one being written, as JSON values."""
        live, deleted = self.pointer.read()
        metadata = self.metadata()
        now = time.time()
        found = self.client.hgetall(self.writing_key)
        held = self.client.get(self.lock_key)
        generations = [
            {
                "generation": g,
                **metadata.get(g, {"kind": "unknown"}),
                "age_seconds": round(max(0.0, now - metadata[g]["created_at"]), 1) if g in metadata else None,
            }
            for g in live
        ]
        writing = {
            "generation": int(found[b"generation"]),
            "kind": found[b"kind"].decode(),
            "plan": found[b"plan"].decode(),
            "age_seconds": round(max(0.0, now - float(found[b"started"])), 1),
            "chunks_done": len(finished(found)),
            "holder": json.loads(held)["holder"] if held else None,  # `None`: it was interrupted
        } if found else None  # fmt: skip
        return {
            "ranker": self.ranker,
            "space": self.space,
            "live": live,
            "generations": generations,
            "watermark": max((g.get("watermark", 0.0) for g in generations), default=0.0),
            "writing": writing,
            "dead": sorted(metadata.keys() - set(live)),
            "deleted_users": deleted,
        }


def raise_first(answers: list[Any]) -> None:
    """Raise the first exception among the answers of a pipeline, except WRONGTYPE errors."""
    for answer in answers:
        if isinstance(answer, Exception) and not is_wrong_type(answer):
            raise answer
