"""The servers behind one Redis URL: a single one, or the primaries of a Cluster, each with its own circuit.

Called by: `lookup.py` (the node of a key), `poll.py` (probes). Calls: `node.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import redis.asyncio as aioredis
from redis.exceptions import RedisError

from slatewise.store.node import CLOSED, OPEN, RedisNode

SINGLE = ""  # name of the node of a server that is not a Cluster
UNOWNED = "none"  # name of the node for slots that no server of the Cluster owns


class Nodes(dict[str, RedisNode]):
    """The nodes by name. The node of a Cluster's primary is added when the first of its keys is looked up."""

    def __init__(self, client: Any, timeout_seconds: float, patience_seconds: float) -> None:
        super().__init__()
        self.client = client
        self.timeout = timeout_seconds
        self.patience = patience_seconds
        self.is_cluster = isinstance(client, aioredis.RedisCluster)

    def add_single(self) -> None:
        """Add the node of a server that is not a Cluster. Its circuit starts open; the first probe closes it."""
        if not self.is_cluster:
            self.named(SINGLE, OPEN)

    async def close(self) -> None:
        await asyncio.gather(*(node.close() for node in self.values()))

    @property
    def all_closed(self) -> bool:
        return all(node.circuit == CLOSED for node in self.values())

    @property
    def worst(self) -> int:
        """The state of the circuit that is furthest from closed; closed if there are no nodes."""
        return max((node.circuit for node in self.values()), default=CLOSED)

    def of_key(self, key: str) -> RedisNode:
        """Return the node of the server that holds the key. In a Cluster, a hung server affects only its own users."""
        if not self.is_cluster:
            return self[SINGLE]
        try:
            return self.named(self.client.get_node_from_key(key).name, CLOSED)
        except RedisError:
            return self.named(UNOWNED, CLOSED)

    def named(self, name: str, circuit: int) -> RedisNode:
        """Return the node `name`. A new node is added with its circuit in the given state."""
        if name not in self:
            self[name] = RedisNode(name, self.client, self.timeout, circuit)
        return self[name]

    async def probe(self, ask_single: Callable[[], Awaitable[object]]) -> None:
        """Probe every node whose circuit is not closed: with `ask_single`, or in a Cluster with PING.

        The topology of a Cluster is refreshed first, and nodes that are no longer primaries are removed.
        """
        broken = [node for node in self.values() if node.circuit != CLOSED]
        if not self.is_cluster:
            await asyncio.gather(*(node.probe(ask_single) for node in broken))
        elif broken:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(self.patience / 2):
                    await self.client.nodes_manager.initialize()
            primaries = {primary.name: primary for primary in self.client.get_primaries()}
            for node in broken:
                if node.name not in primaries:  # it became a replica, or left the Cluster
                    del self[node.name]
                    await node.close()
            await asyncio.gather(
                *(
                    node.probe(partial(self.client.ping, target_nodes=primaries[node.name]))
                    for node in broken
                    if node.name in primaries
                )
            )
