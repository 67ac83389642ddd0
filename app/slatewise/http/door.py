"""The places of connections: how many there are, which one goes first when all are taken, and their deadlines.

When all places are taken, a new connection gets the place of one that waits for a request: of the address that has most
of these, the one that has waited longest. So a client that opens many connections loses its own ones, and behind a
balancer, where all have one address, the oldest goes first. If no connection waits, a few places are left for probes.

Called by: `connection.py`; `server.py` makes the door. Calls: `metrics.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from slatewise import metrics

log = logging.getLogger("slatewise")

SWEEP_SECONDS = 0.1  # between two looks at the deadlines of all connections
IN_A_TURN = 20  # connections that get an answer to their deadline before others have their turn
LOG_SECONDS = 10.0
SPARE = 16  # places that only probes get, when all others are taken by requests that are being answered
AT_ONCE = 64  # one of so many connections goes when all places are taken: choosing costs time for each address
MAPPED = "::ffff:"  # an IPv4 client on an IPv6 socket


@dataclass(frozen=True)
class DoorLimits:
    """Limits of connections and of what arrives before a request is whole. See the settings of the same names."""

    max_connections: int
    max_connections_per_address: int  # 0: no limit
    max_header_bytes: int
    header_timeout_s: float
    keep_alive_s: float
    write_timeout_s: float


class Guest(Protocol):
    """A connection, as the door sees it."""

    address: str
    due: float  # time of the event loop at which `on_due` is called

    def on_due(self) -> None: ...

    def evict(self) -> None: ...


# Headers that say who asks, what, and how the body is to be read: twice with two values, one of them would be wrong.
SINGLE = frozenset(
    (
        b"host",
        b"authorization",
        b"content-type",
        b"content-encoding",
        b"content-length",
        b"transfer-encoding",
        b"expect",
        b"x-user-id",
        b"x-request-id",
        b"x-request-timeout-ms",
        b"x-envoy-expected-rq-timeout-ms",
        b"inference-header-content-length",
        b"traceparent",
    )
)

# Paths that a spare place serves.
PROBES = ("/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")

Waiting = dict[str, dict[Guest, None]]  # by address


class RareLog:
    """Writes at most one line in ten seconds, about what may happen thousands of times."""

    def __init__(self) -> None:
        self.next = 0.0  # time.monotonic() from which a line may be written
        self.left_out = 0

    def warning(self, message: str, *values: object) -> None:
        now = time.monotonic()
        if now < self.next:
            self.left_out += 1
            return
        if self.left_out:
            message += "; %d such lines were left out"
            values = (*values, self.left_out)
        self.next = now + LOG_SECONDS
        self.left_out = 0
        log.warning(message, *values)


class Door:
    """Lives on the event loop."""

    def __init__(self, limits: DoorLimits) -> None:
        self.limits = limits
        self.guests: dict[Guest, bool] = {}  # whether the place is a spare one
        self.of_address: Counter[str] = Counter()
        self.waiting: Waiting = {}  # those that wait for a request, longest first
        self.waiting_spare: Waiting = {}  # of those in spare places
        self.spare = 0
        self.full = RareLog()
        self.sweeping: asyncio.TimerHandle | None = None

    def enter(self, guest: Guest) -> str:
        """Give a place to a connection, as one that waits for a request.

        Returns `place`, `spare` (serve probes only), or why there is none: `address` or `full`.
        """
        most = self.limits.max_connections_per_address
        if most and self.of_address[guest.address] >= most:
            self.full.warning("connections are refused: an address has %d (max_connections_per_address)", most)
            return "address"
        is_spare = False
        if len(self.guests) - self.spare >= self.limits.max_connections:
            self.full.warning("all %d places of connections are taken (max_connections)", self.limits.max_connections)
            is_spare = not self.make_room(self.waiting, guest.address)
            if is_spare and self.spare >= SPARE and not self.make_room(self.waiting_spare, guest.address):
                return "full"
        self.guests[guest] = is_spare
        self.spare += is_spare
        self.of_address[guest.address] += 1
        self.wait(guest)
        metrics.CONNECTIONS.set(len(self.guests))
        if self.sweeping is None:
            self.sweeping = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self.sweep)
        return "spare" if is_spare else "place"

    def leave(self, guest: Guest) -> None:
        """Free the place of a connection. May be called twice."""
        if guest not in self.guests:
            return
        self.work(guest)
        self.spare -= self.guests.pop(guest)
        self.of_address[guest.address] -= 1
        if not self.of_address[guest.address]:
            del self.of_address[guest.address]
        metrics.CONNECTIONS.set(len(self.guests))

    def wait(self, guest: Guest) -> None:
        """Note that a connection begins to wait for a request, or for the rest of one. Its place may be taken."""
        if guest in self.guests:
            of_address = self.waiting_like(guest).setdefault(guest.address, {})
            of_address.pop(guest, None)
            of_address[guest] = None

    def work(self, guest: Guest) -> None:
        """Note that the request of a connection is whole. It keeps its place until `wait`."""
        if guest in self.guests:
            waiting = self.waiting_like(guest)
            waiting.get(guest.address, {}).pop(guest, None)
            if not waiting.get(guest.address, True):
                del waiting[guest.address]

    def waiting_like(self, guest: Guest) -> Waiting:
        return self.waiting_spare if self.guests[guest] else self.waiting

    def make_room(self, waiting: Waiting, newcomer: str) -> bool:
        """Close connections that wait, of the address that holds most. Returns whether there was one.

        No address loses a place to one that holds more: an attacker whose requests are all being answered would take
        those of everybody else.
        """
        held = {address: self.of_address[address] for address in waiting}
        most = max(held, key=held.__getitem__, default=None)
        if most is None or held[most] < self.of_address[newcomer]:
            return False
        of_address = waiting[most]
        for guest in list(of_address)[: 1 + len(of_address) // AT_ONCE]:
            metrics.CONNECTIONS_CLOSED.labels("evicted").inc()
            self.leave(guest)
            guest.evict()
        return True

    def sweep(self) -> None:
        """Call `on_due` of each connection whose deadline has passed. One timer for all costs a request nothing."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        late = [guest for guest in self.guests if guest.due <= now]
        for guest in late[:IN_A_TURN]:
            guest.on_due()
        wait = SWEEP_SECONDS if len(late) <= IN_A_TURN else 0.001
        self.sweeping = loop.call_later(wait, self.sweep) if self.guests else None


def address_of(peer: object) -> str:
    """Return the part of a peer's address that stands for one client: an IPv4 address, or 64 bits of an IPv6 one."""
    host = str(peer[0]) if isinstance(peer, tuple) and peer else ""
    if ":" not in host:
        return host
    host = host.lower()
    if host.startswith(MAPPED):
        return host.removeprefix(MAPPED)
    groups = host.partition("%")[0].partition("::")
    head = groups[0].split(":") if groups[0] else []
    return ":".join([*head, *["0"] * 4][:4])


def places(wanted: int, descriptors: int, used: int) -> int:
    """Return the number of connections that a process may hold: `wanted`, or fewer if its descriptors are fewer.

    descriptors: the limit of the process; negative: none. used: those that are open, or kept for other purposes.
    """
    return wanted if descriptors < 0 else max(1, min(wanted, descriptors - used - SPARE))
