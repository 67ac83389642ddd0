"""Wrong keys by address: above a number of them, the answer is 429.

A right key is accepted at any time. Behind a balancer all clients have one address, and whoever sends wrong keys there
would shut out all others. So the length of a key is what protects it from being guessed.

Called by: `auth.py` and `admin.py`, for a key that is wrong. Calls: `errors.py`, `metrics.py`.
"""

from __future__ import annotations

import time

from slatewise import metrics
from slatewise.errors import RankingError, TooManyRequests, Unauthorized
from slatewise.http.door import RareLog, address_of

MOST_TRIES = 10
SECONDS = 10.0  # in which an address may send so many wrong keys
MOST_ADDRESSES = 10_000  # the table forgets that whose last wrong key is the oldest


class WrongKeys:
    """Lives on the event loop."""

    def __init__(self) -> None:
        self.tries: dict[str, tuple[float, int]] = {}  # address -> begin of its seconds, wrong keys since then
        self.log = RareLog()

    def refusal(self, peer: object, given: str, detail: str) -> RankingError:
        """Count a key that is wrong, and return the error with `detail`. A missing key is no try.

        peer: address and port of the client, as ASGI has them.
        """
        if given:
            address = address_of(peer)
            now = time.monotonic()
            begin, tries = self.tries.pop(address, (now, 0))
            if now - begin >= SECONDS:
                begin, tries = now, 0
            self.tries[address] = (begin, tries + 1)
            if len(self.tries) > MOST_ADDRESSES:
                del self.tries[next(iter(self.tries))]
            if tries >= MOST_TRIES:
                metrics.series(metrics.REJECTED, "key_tries").inc()
                self.log.warning("more than %d wrong keys within %g s came from %s", MOST_TRIES, SECONDS, address)
                reason = f"more than {MOST_TRIES} wrong keys came from this address within {SECONDS:g} seconds"
                return TooManyRequests(f"{reason}; {detail}", seconds=begin + SECONDS - now)
        metrics.series(metrics.REJECTED, "key").inc()
        return Unauthorized(detail)
