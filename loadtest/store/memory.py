"""Bytes of a user in Redis, by data type and number of live generations.

Called by: `__main__.py`. Calls: `slatewise/store/push.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import redis

from slatewise.store.codec import DTYPES
from slatewise.store.generations import Generations
from slatewise.store.push import push

VALUE_BYTES = {"float32": 4, "float16": 2, "int8": 1}
LIST_LIMITS = {False: 64, True: 256}  # hash-max-ziplist-value; 64 is the default of Redis


def random_vectors(users: int, dim: int, seed: int) -> np.ndarray:
    """(users, dim) float32."""
    return np.random.default_rng(seed).normal(scale=0.3, size=(users, dim)).astype(np.float32)


def measure_memory(ranker: str, space: str, dim: int, users: list[str], port: int) -> dict[str, Any]:
    """Empties the Redis at `port` before each data type."""
    client = redis.Redis(port=port)
    store = Generations(client, ranker, space)
    result = {}
    for name in (*DTYPES, "float32, compact"):
        dtype = name.partition(",")[0]
        client.flushall()
        client.config_set("hash-max-ziplist-value", LIST_LIMITS["compact" in name])
        before = client.info("memory")["used_memory"]
        row = {}
        for live in (1, 2, 3):
            pushed = push(store, users, random_vectors(len(users), dim, live), dtype)
            row[f"live_{live}"] = (client.info("memory")["used_memory"] - before) / len(users)
            row[f"users_per_second_{live}"] = pushed["users_per_second"]
        result[name] = {"vector": dim * VALUE_BYTES[dtype], "value": pushed["bytes"] / len(users)} | row
    client.close()
    return result
