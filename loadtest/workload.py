"""Request bodies, drawn at random from a seed, with the item ids of a bundle.

Called by: every measurement over HTTP. Calls: a bundle's manifest.json and ids.json. `client.py` sends the bodies.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_TIME = 1_700_000_000


@dataclass(frozen=True)
class Shape:
    history: int = 256
    candidates: int = 200


W = Shape()  # the reference request of docs/performance.md
STEADY = 300  # requests of shape W that fill the history cache at its default size


class Workload:
    """Draws requests for the newest version of `ranker`, by default the first ranker below `bundles`."""

    def __init__(self, bundles: Path, ranker: str | None = None, seed: int = 0) -> None:
        folder = bundles / ranker if ranker else next(path for path in sorted(bundles.iterdir()) if path.is_dir())
        self.folder = max((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
        manifest = json.loads((self.folder / "manifest.json").read_text())
        self.ids: list[str] = json.loads((self.folder / "ids.json").read_text())
        self.actions = manifest["actions"]
        self.features = manifest["features"]
        self.rng = random.Random(seed)
        self.seed = seed
        self.users = 0

    def new_user(self) -> str:
        self.users += 1
        return f"load-{self.seed}-{self.users}"

    def history(self, events: int) -> dict[str, list[Any]]:
        """The columns of a history: item_ids, actions, timestamps."""
        history: dict[str, list[Any]] = {"item_ids": self.rng.choices(self.ids, k=events)}
        if self.actions:
            history["actions"] = self.rng.choices(self.actions, k=events)
        history["timestamps"] = sorted(self.rng.randrange(START_TIME, START_TIME + 10**7) for _ in range(events))
        return history

    def candidates(self, n: int) -> dict[str, Any]:
        features = {name: [round(self.rng.gauss(0, 1), 3) for _ in range(n)] for name in self.features}
        return {"item_ids": self.rng.choices(self.ids, k=n), "features": features}

    def body(self, user: str, history: dict[str, Any], candidates: int, **members: Any) -> bytes:
        content = {
            "user": user,
            "history": history,
            "candidates": self.candidates(candidates),
            "request_time": START_TIME + 2 * 10**7,
        }
        return json.dumps(content | members).encode()

    def distinct(self, shape: Shape, count: int, **members: Any) -> list[bytes]:
        """`count` requests, each from a new user."""
        return [
            self.body(self.new_user(), self.history(shape.history), shape.candidates, **members) for _ in range(count)
        ]

    def returning(self, shape: Shape, users: int, rounds: int) -> tuple[list[bytes], list[bytes]]:
        """(first requests of the users, then requests with the same histories and new candidates)."""
        known = [(self.new_user(), self.history(shape.history)) for _ in range(users)]
        first = [self.body(user, history, shape.candidates) for user, history in known]
        return first, [self.body(user, history, shape.candidates) for _ in range(rounds) for user, history in known]

    def growing(self, shape: Shape, users: int, rounds: int) -> tuple[list[bytes], list[bytes]]:
        """(first requests of the users, then requests with one more event each)."""
        known = [(self.new_user(), self.history(shape.history + rounds)) for _ in range(users)]
        requests = [
            [self.body(user, window(history, 0, shape.history + k), shape.candidates) for user, history in known]
            for k in range(rounds + 1)
        ]
        return requests[0], [body for one in requests[1:] for body in one]

    def sliding(self, shape: Shape, users: int, rounds: int, offset: bool) -> tuple[list[bytes], list[bytes]]:
        """As `growing`, from clients that send only the last `shape.history` events, with or without `offset`.

        The first offsets differ by user: the server's window moves every 64 events, so about one user in 64 moves in
        each round.
        """
        known = [(self.new_user(), self.rng.randrange(64), self.history(shape.history + rounds)) for _ in range(users)]

        def slid(begin: int, history: dict[str, list[Any]], k: int) -> dict[str, Any]:
            return window(history, k, k + shape.history) | ({"offset": begin + k} if offset else {})

        requests = [
            [self.body(user, slid(begin, history, k), shape.candidates) for user, begin, history in known]
            for k in range(rounds + 1)
        ]
        return requests[0], [body for one in requests[1:] for body in one]

    def endless(self, most_history: int, most_candidates: int, known_users: int = 50) -> Iterator[bytes]:
        """Endless requests of log-uniform sizes: 0 to `most_history` events and 1 to `most_candidates` candidates.

        Half of them come from one of the last `known_users` new users, with the first 50 to 100 % of its history.
        """
        known: deque[tuple[str, dict[str, list[Any]]]] = deque(maxlen=known_users)
        while True:
            candidates = int((most_candidates + 1) ** self.rng.random())
            if not known or self.rng.random() < 0.5:
                known.append((self.new_user(), self.history(int((most_history + 2) ** self.rng.random()) - 1)))
                user, history = known[-1]
            else:
                user, history = self.rng.choice(known)
                events = len(history["item_ids"])
                history = window(history, 0, self.rng.randint(events // 2, events))
            yield self.body(user, history, candidates)


def window(history: dict[str, list[Any]], begin: int, end: int) -> dict[str, Any]:
    return {name: column[begin:end] for name, column in history.items()}
