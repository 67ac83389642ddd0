"""Random requests that cover the request format, in three states of the server's history cache.

Called by: `equality.py`. Calls: `workload.py`.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from loadtest.workload import START_TIME, Workload

MOST_CANDIDATES = 300
MOST_NEW_EVENTS = 5
REQUEST_TIME = START_TIME + 2 * 10**7  # fixed, so an answer does not depend on the time of the run


@dataclass(frozen=True)
class Card:
    """The parts of GET /models/NAME that decide which requests are valid."""

    variants: list[str]
    exits: list[str]
    heads: list[str]
    fields: dict[str, list[str]]
    history_used: int
    max_history: int
    max_candidates: int

    @classmethod
    def read(cls, variants: list[str], card: dict[str, Any]) -> Card:
        limits = card["limits"]
        return cls(
            variants,
            card["exits"],
            list(card["heads"]),
            card["fields"],
            limits["history_used"],
            limits["max_history"],
            limits["max_candidates"],
        )


@dataclass(frozen=True)
class Case:
    """One request as bodies for POST /score, by state of the history cache: cold, kept, extended."""

    cold: bytes
    extended: bytes

    def bodies(self) -> dict[str, bytes]:
        return {"cold": self.cold, "kept": self.cold, "extended": self.extended}


class CaseWriter:
    """Draws cases from a seed. Every case has a random history of its own, so its first request is cold."""

    def __init__(self, workload: Workload, card: Card, seed: int) -> None:
        self.workload = workload
        self.card = card
        self.rng = random.Random(seed)
        users = workload.folder / "users.json"
        self.known_users: list[str] = json.loads(users.read_text()) if users.exists() else []

    def maybe(self, probability: float) -> bool:
        return self.rng.random() < probability

    def log_uniform(self, most: int) -> int:
        """1 to `most`, small values as often as large ones."""
        return int((most + 1) ** self.rng.random())

    def case(self, variant: str, exit: str) -> Case:
        rng = self.rng
        more = rng.randint(1, MOST_NEW_EVENTS)
        events = self.log_uniform(min(3 * self.card.history_used, self.card.max_history - more)) - 1
        history = self.history(events + more)
        content: dict[str, Any] = {"variant": variant, "exit": exit, "request_time": REQUEST_TIME}
        content["candidates"] = self.candidates(self.log_uniform(min(MOST_CANDIDATES, self.card.max_candidates)))
        if self.maybe(0.8):
            known = bool(self.known_users) and self.maybe(0.5)
            content["user"] = rng.choice(self.known_users) if known else f"new-{rng.randrange(10**9)}"
        if self.maybe(0.3):
            content["head_weights"] = {
                name: round(rng.uniform(-1, 2), 3) for name in self.card.heads if self.maybe(0.8)
            }
        if not content.get("head_weights"):
            content.pop("head_weights", None)
        if self.maybe(0.2):
            history["offset"] = rng.randrange(1_000)
        first = {name: column[:events] if name != "offset" else column for name, column in history.items()}
        return Case(*(json.dumps(content | {"history": events}).encode() for events in (first, history)))

    def history(self, events: int) -> dict[str, Any]:
        """Some unknown items, missing actions and times, or no such column at all."""
        history: dict[str, Any] = self.workload.history(events)
        history["item_ids"] = self.with_unknown(history["item_ids"])
        for column in ("actions", "timestamps"):
            if column not in history:
                continue
            if self.maybe(0.1):
                del history[column]
            elif self.maybe(0.3):
                history[column] = [None if self.maybe(0.1) else value for value in history[column]]
        return history

    def candidates(self, number: int) -> dict[str, Any]:
        """Some unknown items, missing features, and fields that describe the items."""
        candidates = self.workload.candidates(number)
        candidates["item_ids"] = self.with_unknown(candidates["item_ids"])
        features = candidates["features"]
        for name in list(features):
            if self.maybe(0.15):
                del features[name]
            elif self.maybe(0.3):
                features[name] = [None if self.maybe(0.1) else value for value in features[name]]
        if self.card.fields and self.maybe(0.4):
            candidates["fields"] = {name: self.field(values, number) for name, values in self.card.fields.items()}
        return candidates

    def field(self, values: list[str], number: int) -> list[Any]:
        """One value, several values, an unknown value, or null for each candidate."""
        choices = [*values, "no such value"]
        column: list[Any] = []
        for _ in range(number):
            kind = self.rng.randrange(3)
            several = self.rng.sample(choices, min(3, len(choices)))
            column.append((None, self.rng.choice(choices), several)[kind])
        return column

    def with_unknown(self, ids: list[str]) -> list[str]:
        if self.maybe(0.5):
            return ids
        return [f"unknown-{k}" if self.maybe(0.1) else one for k, one in enumerate(ids)]
