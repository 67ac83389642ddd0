"""Fill a Redis store with a bundle's meta-embeddings: python -m app.push BUNDLE --redis-url redis://127.0.0.1:6379/0

Writes a new generation, then makes it visible with one SET; the one before stays live beneath it.
Before: a bundle. After: `meta_embeddings.RedisStore` reads what this wrote.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import redis

from app.features import Float32
from app.manifest import read_manifest
from app.meta_embeddings import pack, pointer_key, user_key

LIVE_GENERATIONS = 3  # the newest, and two to roll back to
CHUNK = 1_000  # users in one round trip


def push(client: redis.Redis, ranker: str, space: str, users: list[str], vectors: Float32) -> int:
    """Write one generation and make it visible; its number."""
    pointer = pointer_key(ranker, space)
    current = client.get(pointer)
    live = [int(g) for g in current.decode().split(",")] if isinstance(current, bytes) and current else []
    generation = int(client.incr(f"{pointer}:last"))  # never given twice, also after a roll-back
    dead = [str(g) for g in range(max(1, generation - 2 * LIVE_GENERATIONS), generation) if g not in live]
    now = time.time()
    for first in range(0, len(users), CHUNK):
        pipe = client.pipeline(transaction=False)
        for user, vector in zip(users[first : first + CHUNK], vectors[first : first + CHUNK], strict=True):
            key = user_key(ranker, space, user)
            pipe.hset(key, str(generation), pack(vector, generation, now))
            if dead:
                pipe.hdel(key, *dead)
        pipe.execute()
    client.set(pointer, ",".join(map(str, [generation, *live][:LIVE_GENERATIONS])))
    return generation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="<root>/<ranker>/<version>")
    parser.add_argument("--redis-url", default=os.environ.get("SLATEWISE_REDIS_URL", "redis://127.0.0.1:6379/0"))
    args = parser.parse_args()
    manifest = read_manifest(args.bundle)
    users = json.loads((args.bundle / "users.json").read_text())
    vectors = np.load(args.bundle / "meta_embeddings.npy", allow_pickle=False)
    with redis.Redis.from_url(args.redis_url) as client:
        generation = push(client, manifest.ranker, manifest.space, users, vectors)
    print(f"{manifest.ranker}: generation {generation}, {len(users)} users")


if __name__ == "__main__":
    main()
