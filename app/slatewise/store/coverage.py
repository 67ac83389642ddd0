"""How many users the vectors of a new space cover, compared with those of the space that is served.

Called by: `main.py`, for `ranking/versions.py`. Calls: the redis-py client, `codec.py`.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from slatewise.bundle.manifest import Manifest
from slatewise.store.codec import metadata_key, pointer_key, read_pointer


async def covered_users(client: Any, ranker: str, space: str) -> int:
    """Return the users in the newest full generation of a space that is live; 0 without one.

    Incremental generations hold users that have changed, most of whom the full one has too. Raises redis-py's
    exceptions, and ValueError for metadata of another shape.
    """
    live = read_pointer(await client.get(pointer_key(ranker, space)))[0]
    about: dict[bytes, bytes] = await client.hgetall(metadata_key(ranker, space))
    for generation in live:
        found = json.loads(about.get(str(generation).encode(), b"{}"))
        if found.get("kind") == "full":
            return int(found["users"])
    return 0


async def lacking(client: Any, served: Manifest, new: Manifest, share: float, patience: float) -> str | None:
    """Return why the vectors of a new version's space do not suffice yet, or `None` if they do.

    share: least share of the served space's users that the new space must have. patience: seconds to wait for Redis. A
    version that reads no vectors, or those of the same space, lacks nothing.
    """
    if not new.meta_size or new.space == served.space:
        return None
    try:
        async with asyncio.timeout(patience):
            users = await covered_users(client, new.ranker, new.space)
            before = await covered_users(client, served.ranker, served.space) if served.meta_size else 0
    except Exception as error:  # includes errors of redis-py's parser on bytes that are not Redis' protocol
        return f"Redis does not say how many users space {new.space} covers ({type(error).__name__})"
    if users < share * before:
        return f"space {new.space} has vectors of {users} users, {share:g} of the {before} of {served.space} are needed"
    return None
