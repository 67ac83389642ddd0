"""Send the same requests to two servers, and compare the JSON text of their answers.

Called by: `__main__.py`. Calls: `requests.py`, `client.py`.
"""

from __future__ import annotations

import json
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from loadtest.client import ask, connect, post
from loadtest.compare.requests import CaseWriter
from loadtest.markdown import table

IGNORED = ("id", "version", "timings_ms")
STATES = ("cold", "kept", "extended")
SHOWN = 5


@dataclass
class Tally:
    """Counts for one variant and exit. `caches` is (state, `history.cache` of the first server's answer)."""

    answers: int = 0
    different: int = 0
    caches: Counter[tuple[str, str]] = field(default_factory=Counter)

    def cells(self) -> list[str]:
        return [
            ", ".join(f"{cache} {count}" for (of, cache), count in sorted(self.caches.items()) if of == state)
            for state in STATES
        ]


def read_answer(body: bytes) -> dict[str, Any]:
    """The answer with numbers as their JSON text, without the members that may differ between two servers."""
    answer: dict[str, Any] = json.loads(body, parse_float=str, parse_int=str)
    for name in IGNORED:
        answer.pop(name, None)
    if "meta_embedding" in answer:
        for name in ("version", "age_seconds"):
            answer["meta_embedding"].pop(name, None)
    return answer


def differing_members(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Names of the members that differ, those of `results` separately."""
    results = (answer.get("results") or {} for answer in (one, two))
    flat_one, flat_two = (
        {name: value for name, value in answer.items() if name != "results"}
        | {f"results.{name}": value for name, value in columns.items()}
        for answer, columns in zip((one, two), results)
    )
    return sorted(name for name in flat_one.keys() | flat_two.keys() if flat_one.get(name) != flat_two.get(name))


class Comparison:
    """Two servers at `ports`, and the counts so far by (variant, exit)."""

    def __init__(self, ports: tuple[int, int]) -> None:
        self.ports = ports
        self.tallies: dict[tuple[str, str], Tally] = {}
        self.members: Counter[str] = Counter()
        self.examples: list[str] = []

    @property
    def answers(self) -> int:
        return sum(tally.answers for tally in self.tallies.values())

    @property
    def different(self) -> int:
        return sum(tally.different for tally in self.tallies.values())

    def run(self, writer: CaseWriter, number: int) -> None:
        """Compare `number` requests for every variant and exit, each cold, kept and extended."""
        with connect(self.ports[0]) as one, connect(self.ports[1]) as two:
            for variant in writer.card.variants:
                for exit in writer.card.exits:
                    tally = self.tallies.setdefault((variant, exit), Tally())
                    for _ in range(number):
                        for state, body in writer.case(variant, exit).bodies().items():
                            self.compare(tally, state, body, (one, two))

    def compare(self, tally: Tally, state: str, body: bytes, connections: tuple[socket.socket, socket.socket]) -> None:
        """Raises ValueError if the first server refuses the request, because then there are no scores to compare."""
        (status, first), (other_status, second) = (ask(one, post("/score", body)) for one in connections)
        if status != 200:
            raise ValueError(f"status {status} for {body[:500].decode()}: {first[:500].decode()}")
        tally.answers += 1
        tally.caches[state, json.loads(first)["history"]["cache"]] += 1
        members = ["status"] if other_status != 200 else differing_members(read_answer(first), read_answer(second))
        if members:
            tally.different += 1
            self.members.update(members)
            if len(self.examples) < SHOWN:
                self.examples.append(
                    f"{state}, {', '.join(members)}: {body.decode()}\n{first.decode()}\n{second.decode()}"
                )

    def report(self) -> str:
        rows = [
            (variant, exit, tally.answers, *tally.cells(), tally.different)
            for (variant, exit), tally in self.tallies.items()
        ]
        titles = ("variant", "exit", "answers", *(f"history.cache, {state}" for state in STATES), "different")
        members = [f"differing members: {dict(self.members)}"] if self.members else []
        verdict = f"{self.answers} answers, {self.different} different"
        return "\n\n".join([table(titles, rows), *members, *self.examples, verdict])
