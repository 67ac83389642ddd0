"""All that writes the store of meta-embeddings: generations are written, published, rolled back, merged and swept here.

    slatewise:<ranker>:<space>:generations            the pointer (vectors.py); what is not in it is not read by anybody
    slatewise:<ranker>:<space>:generations:last       the last number given; none is given twice
    {slatewise:<ranker>:<space>:generations}:about    hash; generation -> when, full or incremental, users, watermark, plan
    {...}:writing, {...}:lock                         the generation at work and its finished chunks; who may write
    {...}:token, {...}:forgotten                      the last change of the pointer; users forgotten while a generation is at work

The braces put all of one space but the pointer's counter into the pointer's Cluster slot, so that a script can change them together.
Before: `models/` or `push.py` have vectors. After: `meta_embeddings.RedisStore` reads what the pointer names.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import islice
from typing import Any, cast

from redis.exceptions import RedisError, ResponseError

from slatewise.inference.arrays import Float32
from slatewise.store.client import Client
from slatewise.store.codec import Corrupt, metadata_key, pack_many, pointer_key, read_pointer, renumbered, user_key

BATCH = 1_000  # users in one round trip
KEPT = 3  # generations that stay live at least: the newest, and two to roll back to
MAX_LIVE = 16  # generations, above which they are merged: each costs a field of every look-up
MOST_DEAD = 64  # fields that a write removes at most; a sweep removes all
LOCK_SECONDS = 30
SWEEP_WAIT_SECONDS = 2.5  # longer than two polls of a replica: by then none reads what left the pointer

# The pointer is as it was read: change it. With the same token: this very change was made before, and its answer was lost.
SWAP = """
if redis.call('GET', KEYS[2]) == ARGV[3] then return 1 end
if ARGV[4] ~= '' and redis.call('HGET', KEYS[3], 'generation') ~= ARGV[4] then return -1 end
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[3], 'EX', 600)
if ARGV[4] ~= '' then redis.call('DEL', KEYS[3]) end
return 1
"""
MARK = "if redis.call('HGET', KEYS[1], 'generation') == ARGV[1] then redis.call('HSET', KEYS[1], ARGV[2], ARGV[3]) return 1 end return 0"
RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('EXPIRE', KEYS[1], ARGV[2]) end return 0"
RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class StoreError(RuntimeError):
    """Refused; the message says why."""


class Busy(StoreError):
    """Another writer is at work."""


def live_after(generation: int, live: Sequence[int], full: Container[int]) -> list[int]:
    """The live list once a generation is published on top of it.

    An incremental generation holds those that changed only, so a list is whole down to a full one. Two roll-backs must leave
    a whole list: the shortest beginning is kept that has a full generation behind its first two.
    """
    everything = [generation, *(g for g in live if g != generation)]
    for length in range(KEPT, len(everything) + 1):
        if any(g in full for g in everything[KEPT - 1 : length]):
            return everything[:length]
    return everything


class GenerationWriter:
    """A generation at work, and the right to write it, renewed by a thread. Leaving it unpublished keeps what is done, for `begin` to resume."""

    def __init__(self, store: Generations, lock: str) -> None:
        self.store = store
        self.lock = lock
        self.generation = 0
        self.full = False
        self.done = set[int]()
        self.ended = threading.Event()
        threading.Thread(target=self.renew, daemon=True).start()

    def renew(self) -> None:
        while not self.ended.wait(LOCK_SECONDS / 3):
            try:
                self.store.script(RENEW, [self.store.lock_key], self.lock, LOCK_SECONDS)
            except Exception:  # the next one may succeed; if none does, `publish` finds the lock gone
                continue

    def release(self) -> None:
        if not self.ended.is_set():
            self.ended.set()
            with contextlib.suppress(RedisError):  # then it ends by itself, and what went wrong before is what to tell
                self.store.script(RELEASE, [self.store.lock_key], self.lock)

    def __enter__(self) -> GenerationWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Generations:
    """The generations of one ranker's space. A process of its own makes a client of its own (`connect`)."""

    def __init__(self, client: Client, ranker: str, space: str, ttl_days: float = 0.0) -> None:
        self.client: Any = client  # redis-py's answers are typed for both of its halves at once
        self.ranker = ranker
        self.space = space
        self.ttl_seconds = int(ttl_days * 86_400)
        self.pointer = pointer_key(ranker, space)
        self.metadata_key = metadata_key(ranker, space)
        self.writing_key, self.lock_key, self.token_key, self.forgotten_key = (
            f"{{{self.pointer}}}:{name}" for name in ("writing", "lock", "token", "forgotten")
        )

    def script(self, text: str, keys: list[str], *arguments: object) -> int:
        return int(self.client.eval(text, len(keys), *keys, *arguments))

    def live(self) -> list[int]:
        """Newest first."""
        return read_pointer(self.client.get(self.pointer))[0]

    def metadata(self) -> dict[int, dict[str, Any]]:
        return {
            int(generation): json.loads(text) for generation, text in self.client.hgetall(self.metadata_key).items()
        }

    def begin(self, plan: str, full: bool) -> GenerationWriter:
        """Take the right to write, and a new generation; or resume the one that was left unfinished, if it had the same plan.

        The plan is a digest of all that the vectors and their chunks depend on. Raises Busy.
        """
        writing = self.take_lock()
        try:
            writing.full = full
            kind = "full" if full else "incremental"
            found = self.client.hgetall(self.writing_key)
            if found and (found[b"plan"].decode(), found[b"kind"].decode()) == (plan, kind):
                writing.generation = int(found[b"generation"])
                writing.done = finished(found).keys() | set()
                return writing
            if found:
                self.abandon(int(found[b"generation"]))
            writing.generation = int(self.client.incr(f"{self.pointer}:last"))
            live = self.live()
            dead = sorted((g for g in self.metadata() if g not in live), reverse=True)[:MOST_DEAD]
            self.client.delete(self.forgotten_key)
            state = {
                "generation": writing.generation,
                "plan": plan,
                "kind": kind,
                "started": time.time(),
                "dead": ",".join(map(str, dead)),
            }
            self.client.hset(self.writing_key, mapping=state)
            return writing
        except BaseException:
            writing.release()
            raise

    def take_lock(self) -> GenerationWriter:
        mine = json.dumps(
            {
                "holder": f"process {os.getpid()} on {socket.gethostname()}",
                "since": time.time(),
                "token": secrets.token_hex(8),
            }
        )
        if not self.client.set(self.lock_key, mine, nx=True, ex=LOCK_SECONDS):
            held = self.client.get(self.lock_key)
            if held is not None and held.decode() != mine:  # mine: it was set, and only the answer was lost
                who = json.loads(held)
                raise Busy(
                    f"{self.pointer} is being written by {who['holder']}, for {max(0.0, time.time() - who['since']):.0f} s"
                )
            if held is None:  # it ended just now
                return self.take_lock()
        return GenerationWriter(self, mine)

    def abandon(self, generation: int) -> None:
        """Its number is never published; its fields are dead from now on."""
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
        """Write and verify a part of the generation at work, from any process; bytes of the values. May be repeated.

        Raises StoreError where the generation is not at work (any more), and what redis-py raises.
        """
        if len(set(users)) != len(users) or len(users) != len(vectors):
            raise ValueError("users must be different, and as many as vectors")
        size = self.put(generation, list(users), pack_many(vectors, generation, created_at, dtype), self.ttl_seconds)
        if not self.script(MARK, [self.writing_key], generation, f"chunk:{chunk}", f"{len(users)} {size}"):
            raise StoreError(f"generation {generation} is not being written any more")
        return size

    def put(self, generation: int, users: list[str], values: list[bytes], ttl_seconds: int = 0) -> int:
        """Values of the generation at work into the users' hashes, dead fields out of them, and what is there now compared; their bytes."""
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
            for k in odd:  # whatever it is, it is not ours, and would stop every refresh
                self.client.delete(keys[k])
                self.put(generation, [users[first + k]], [batch[k]], ttl_seconds)
                read[k] = batch[k]
            if fault := next(
                (answer for answer in answers if isinstance(answer, Exception) and not is_wrong_type(answer)), None
            ):
                raise fault
            if read != batch:
                raise StoreError(f"generation {generation} does not read back as it was written")
        return sum(map(len, values))

    def publish(
        self, writing: GenerationWriter, chunks: int, watermark: float = 0.0, over: list[int] | None = None
    ) -> list[int]:
        """Make the generation visible, by one change of the pointer, once chunks 0 to `chunks` - 1 are all written; the live list.

        `watermark` is the time of the newest event that the generation has seen; `over` the live list that it must come on top of,
        if only one will do. Ends the writing; merges where the list gets long.
        """
        generation = writing.generation
        found = self.client.hgetall(self.writing_key)
        if int(found.get(b"generation", -1)) != generation:
            raise StoreError(f"generation {generation} was taken over by another writer")
        done = finished(found)
        if missing := set(range(chunks)) - done.keys():
            raise StoreError(f"generation {generation}: {len(missing)} of {chunks} chunks are not written")
        users, size = (sum(done[chunk][k] for chunk in range(chunks)) for k in (0, 1))
        if writing.full and not users:
            raise StoreError(f"generation {generation} is full and has no users")
        for user in self.client.smembers(self.forgotten_key):
            self.client.delete(user_key(self.ranker, self.space, user.decode()))
        known = self.metadata()
        metadata = {
            "kind": "full" if writing.full else "incremental",
            "created_at": time.time(),
            "users": users,
            "bytes": size,
            "watermark": watermark,
        }
        self.client.hset(self.metadata_key, str(generation), json.dumps(metadata | {"plan": found[b"plan"].decode()}))
        full = {g for g, each in known.items() if each["kind"] == "full"} | ({generation} if writing.full else set())

        def with_this(live: list[int]) -> list[int]:
            if over is not None and live != over:
                raise StoreError(f"generation {generation} was made from {over}, live are {live}")
            return live_after(generation, live, full)

        live = self.swap(with_this, publishes=generation)
        self.client.delete(self.forgotten_key)
        writing.release()
        if len(live) > MAX_LIVE - KEPT and not full & set(live[:KEPT]):
            with contextlib.suppress(StoreError):  # somebody else writes or rolls back: then the next one merges
                live = self.merge()
        return live

    def swap(
        self, change: Callable[[list[int]], list[int]], forgets: int = 0, publishes: int | None = None
    ) -> list[int]:
        """Change the pointer from what it is to what follows from that; nobody else's change is lost, and none is made twice."""
        token = secrets.token_hex(8)
        while True:
            before = self.client.get(self.pointer) or b""
            live, forgotten = read_pointer(before)
            live = change(live)
            forgotten = forgotten + forgets
            after = ",".join(map(str, live)) + (f"#{forgotten}" if forgotten else "")
            answer = self.script(
                SWAP,
                [self.pointer, self.token_key, self.writing_key],
                before,
                after,
                token,
                "" if publishes is None else publishes,
            )
            if answer < 0:
                raise StoreError(f"generation {publishes} was taken over by another writer")
            if answer:
                return live

    def abort(self, writing: GenerationWriter) -> None:
        """Give the generation up."""
        if int(self.client.hget(self.writing_key, "generation") or -1) == writing.generation:
            self.abandon(writing.generation)
        writing.release()

    def roll_back(self) -> list[int]:
        """Take back the newest generation, by one change of the pointer; its number does not come back. The live list."""

        def without_newest(live: list[int]) -> list[int]:
            if len(live) < 2:
                raise StoreError(
                    f"nothing to roll back to: {'one generation is' if live else 'no generations are'} live"
                )
            return live[1:]

        return self.swap(without_newest)

    def delete_user(self, user: str) -> bool:
        """Remove all that is stored of a user, and have replicas empty their caches; whether there was anything.

        Of a generation at work, too: it is removed again before that is published.
        """
        if self.client.exists(self.writing_key):
            self.client.sadd(self.forgotten_key, user)
        existed = bool(self.client.delete(user_key(self.ranker, self.space, user)))
        if self.client.exists(self.pointer):
            self.swap(lambda live: live, forgets=1)
        return existed

    def keys(self) -> Iterator[list[bytes]]:
        """All users' keys, in batches."""
        pattern = re.sub(r"([][*?\\])", r"\\\1", user_key(self.ranker, self.space, "")[:-1]) + "*"
        found = cast("Iterator[bytes]", self.client.scan_iter(match=pattern, count=BATCH))
        while batch := list(islice(found, BATCH)):
            yield batch

    def merge(self) -> list[int]:
        """Copy every user's newest live vector, with its age, into a new full generation; the live list. Raises StoreError."""
        live = self.live()
        if not live:
            raise StoreError("no generations are live")
        prefix = len(user_key(self.ranker, self.space, "").encode()) - 1
        with self.begin(f"merge of {','.join(map(str, live))}", full=True) as writing:
            users = size = 0
            for keys in self.keys():
                pipe = self.client.pipeline(transaction=False)
                for key in keys:
                    pipe.hmget(key, live)
                answers = pipe.execute(raise_on_error=False)
                if fault := next(
                    (answer for answer in answers if isinstance(answer, Exception) and not is_wrong_type(answer)), None
                ):
                    raise fault
                newest = {
                    key[prefix:-1].decode(): first_good(answer, writing.generation)
                    for key, answer in zip(keys, answers, strict=True)
                    if isinstance(answer, list)
                }
                copies = {user: value for user, value in newest.items() if value is not None}
                users = users + len(copies)
                size = size + self.put(writing.generation, list(copies), list(copies.values()))
            self.script(MARK, [self.writing_key], writing.generation, "chunk:0", f"{users} {size}")
            metadata = self.metadata()
            watermark = max((metadata[g].get("watermark", 0.0) for g in live if g in metadata), default=0.0)
            try:
                return self.publish(writing, 1, watermark, over=live)
            except StoreError:  # rolled back meanwhile: what was copied may be what was taken back
                self.abort(writing)
                raise

    def sweep(self, wait_seconds: float = SWEEP_WAIT_SECONDS) -> int:
        """Remove the fields of generations that are not live, once no replica can still read them; how many."""
        while True:
            metadata = self.metadata()
            before = self.client.get(self.pointer)
            if not metadata.keys() - set(read_pointer(before)[0]):
                return 0
            time.sleep(wait_seconds)
            writing = self.client.hget(
                self.writing_key, "generation"
            )  # before the pointer: what is published now is in one of them
            if self.client.get(self.pointer) == before:
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
        """What is live and what is at work, as JSON takes it."""
        live, forgotten = read_pointer(self.client.get(self.pointer))
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
            "holder": json.loads(held)["holder"] if held else None,  # none: it was interrupted
        } if found else None  # fmt: skip
        return {
            "ranker": self.ranker,
            "space": self.space,
            "live": live,
            "generations": generations,
            "watermark": max((g.get("watermark", 0.0) for g in generations), default=0.0),
            "writing": writing,
            "dead": sorted(metadata.keys() - set(live)),
            "forgotten": forgotten,
        }


def finished(writing: dict[bytes, bytes]) -> dict[int, tuple[int, int]]:
    """Chunk -> (users, bytes) of a generation at work."""
    return {
        int(key[6:]): (int(value.split()[0]), int(value.split()[1]))
        for key, value in writing.items()
        if key.startswith(b"chunk:")
    }


def is_wrong_type(answer: object) -> bool:
    return isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE")


def first_good(values: list[bytes | None], generation: int) -> bytes | None:
    """The first that is whole, renumbered."""
    for value in values:
        if value is not None:
            with contextlib.suppress(Corrupt):
                return renumbered(value, generation)
    return None
