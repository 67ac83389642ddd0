"""Requests of every kind and size, and threads that send them at the speed of the server.

Requests are made before the run. Only the user differs between two uses of one, so sending costs little.

Called by: `soak.py`. Calls: `loadtest/client.py`, `workload.py`.
"""

from __future__ import annotations

import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loadtest.client import ask, connect, post
from loadtest.workload import START_TIME, Workload

USER = b"user-00000000"  # in the requests; replaced by texts of the same length
KNOWN_USERS = 500  # half of the requests come from one of the last users
UNAVAILABLE = 503  # what events and deletions get while Redis fails


@dataclass(frozen=True)
class Sent:
    """A request, and the statuses that may answer it. `abandon`: the client leaves without reading the answer."""

    request: bytes
    allowed: frozenset[int]
    abandon: bool = False


def get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def foreign(ids: list[str], user: str, ranker: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, body) of one call of each other server, with these items."""
    tensors = {"user": [user], "candidates.item_ids": ids}
    yield "/v2/rerank", {"model": ranker, "query": user, "documents": ids}
    yield "/tei/rerank", {"query": user, "texts": ids}
    yield "/personalize-ranking", {"campaignArn": f"a/{ranker}", "userId": user, "inputList": ids}
    yield f"/rank/{ranker}", {"id": "r", "user": user, "items": [{"id": item} for item in ids]}
    yield (
        f"/v2/models/{ranker}/infer",
        {
            "inputs": [
                {"name": name, "shape": [len(column)], "datatype": "BYTES", "data": column}
                for name, column in tensors.items()
            ]
        },
    )


class Deck:
    """A shuffled list of requests to draw from, with a new user in half of the draws."""

    def __init__(self, workload: Workload, most_history: int, most_candidates: int, seed: int = 0) -> None:
        self.workload = workload
        self.rng = random.Random(seed)
        self.most = most_history, most_candidates
        self.cards = [card for number in range(150) for card in self.hand(number)]
        self.rng.shuffle(self.cards)

    def hand(self, number: int) -> Iterator[Sent]:
        """Twenty requests: rankings of both forms, foreign calls, events, wrong bodies, and clients that leave."""
        user = USER.decode()
        ok = frozenset({200})
        writes = frozenset({200, 202, 204, UNAVAILABLE})
        for k in range(9):
            body = self.ranking(user)
            yield Sent(post(("/rerank", "/score")[k % 2], body), ok, abandon=k == 8)
        ids = self.rng.choices(self.workload.ids, k=self.size(self.most[1]) + 1)
        for path, content in foreign(ids, user, self.workload.folder.parent.name):
            yield Sent(post(path, json.dumps(content).encode()), ok)
        stored = {"user": user, "candidates": {"item_ids": ids}}  # no history: the stored one is read
        yield Sent(post("/rerank", json.dumps(stored).encode()), ok)
        for count in (1, 4):
            events = [
                {"user": user, "item_id": self.rng.choice(ids), "timestamp": START_TIME + k} for k in range(count)
            ]
            yield Sent(post("/events", json.dumps({"events": events}).encode()), writes)
        yield Sent(post("/rerank", self.wrong()), frozenset({400, 422}))
        if not number % 4:  # a deletion empties the cache of vectors
            yield Sent(get(f"/users/{user}", "DELETE"), writes)
        yield Sent(
            get(self.rng.choice(["/livez", "/models", "/v2/health/ready", "/no-such-path"])), frozenset({200, 404})
        )

    def size(self, most: int) -> int:
        return int((most + 1) ** self.rng.random()) - 1

    def ranking(self, user: str) -> bytes:
        history = self.workload.history(self.size(self.most[0]))
        return self.workload.body(user, history, self.size(self.most[1]) + 1)

    def wrong(self) -> bytes:
        kinds = (b"{", b"[]", b'{"candidates": {"item_ids": []}}', b'{"candidates": {"item_ids": [true]}, "x": 1}')
        return self.rng.choice(kinds)


class Traffic:
    """Sends a number of requests over some connections: `start`, then `join`. `done` counts as it goes."""

    def __init__(self, port: int, deck: Deck, requests: int, connections: int = 4) -> None:
        self.port = port
        self.deck = deck
        self.requests = requests
        self.left = iter(range(requests))
        self.statuses: Counter[int] = Counter()
        self.wrong: Counter[str] = Counter()  # answers with a status that the request does not allow
        self.failures: list[Exception] = []
        self.counts = [0] * connections  # each thread has its own number
        self.left_early = 0  # answers that nobody read
        self.threads = [threading.Thread(target=self.work, args=(k,), daemon=True) for k in range(connections)]

    @property
    def done(self) -> int:
        return sum(self.counts)

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self.threads)

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def join(self) -> None:
        """Raises the first error of a connection."""
        for thread in self.threads:
            thread.join()
        if self.failures:
            raise self.failures[0]

    def work(self, place: int) -> None:
        connection = connect(self.port)
        rng = random.Random(place)
        cards = self.deck.cards
        try:
            for number in self.left:  # `next` of a range is atomic
                if self.failures:
                    return
                card = cards[number % len(cards)]
                user = number if rng.random() < 0.5 else max(0, number - rng.randrange(KNOWN_USERS))
                request = card.request.replace(USER, b"user-%08d" % user)
                self.counts[place] += 1
                if card.abandon:
                    connection = leave(connection, request, self.port)
                    self.left_early += 1
                    continue
                status, body = ask(connection, request)
                self.statuses[status] += 1
                if status not in card.allowed:
                    self.wrong[f"{status} for {request[:40]!r}: {body[:200]!r}"] += 1
        except Exception as error:  # raised again by `join`
            self.failures.append(error)
        finally:
            connection.close()


def leave(connection: socket.socket, request: bytes, port: int) -> socket.socket:
    """Send a request, close the connection without reading, and return a new one."""
    with suppress(OSError):
        connection.sendall(request)
    connection.close()
    return connect(port)
