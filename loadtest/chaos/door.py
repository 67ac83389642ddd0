"""R5 to R9: attacks on the door, with a good client beside each: python -m loadtest.chaos.door [--mutants 100000]

A server with the committed demo, and attackers in processes of their own, from another address. For each attack: p99 of
a good client before and during it, wrong answers, growth of the server's memory, and whether the attacker's connections
are closed. Prints a Markdown table. Exits with 1 if a bound is broken: p99 at most doubled (10 ms are always enough),
no wrong answer, memory within 61 MB, no open connection, no 5xx for a mutant. All bodies that are read share 15 MB;
at the most, a body is there twice (received, and joined), and the bound is twice that.

Called by: `make chaos`. Calls: `tests/support/attacks.py`, `mutants.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import multiprocessing
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.chaos.mutants import send_mutants
from loadtest.markdown import table
from loadtest.server_process import ServerProcess, exit_on_sigterm
from slatewise.process import cpu_name
from tests.support.attacks import ATTACKER, GET, GoodClient, connections, head, read_all, repeat, send

BUNDLES = Path(__file__).parents[2] / "models" / "bundles"
SECONDS = 5.0  # of an attack
TIMEOUT = 2.0  # of headers, bodies, idle connections and answers
BODY_BYTES = 1_000_000
MEMORY_MB = 4 * 16 * BODY_BYTES / 2**20
LEAST_P99 = 0.010  # below it, the neighbours on the machine decide
QUIET = ("sh", "-c", 'exec "$0" -m slatewise serve > /dev/null', sys.executable)  # each refusal is a line of the log
Attack = Callable[[int], bool]  # of a port; whether all connections were closed


def each(port: int, number: int, first: bytes, again: bytes = b"", pause: float = 0.2) -> bool:
    """Open connections, send on each, and again in a while. Returns whether the server closes them all."""
    with connections(port, number, ATTACKER) as opened:
        for one in opened:
            send(one, first)
        begin = time.monotonic()
        while time.monotonic() < begin + SECONDS:
            for one in opened if again else ():
                send(one, again)
            time.sleep(pause)
        return all(read_all(one, 4 * TIMEOUT)[1] for one in opened)


def anew(port: int, data: bytes, rate: float) -> bool:
    """Send on new connections, so many in a second. Returns whether each was answered."""
    answered = []

    def step() -> None:
        with connections(port, 1, ATTACKER) as (one,), contextlib.suppress(OSError):
            send(one, data)
            one.settimeout(4 * TIMEOUT)
            answered.append(bool(one.recv(4_096)))

    repeat(SECONDS, step, 1 / rate)
    return all(answered)


def unread(port: int) -> bool:
    """Ask for long answers and read none."""
    with connections(port, 20, ATTACKER) as opened:
        for one in opened:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            send(one, GET.replace(b"/livez", b"/openapi.json") * 100)
        time.sleep(SECONDS)
        return all(read_all(one, 4 * TIMEOUT)[1] for one in opened)


def small_lists() -> bytes:
    zipped = gzip.compress(b'{"candidates":{"item_ids":["1"],"fields":{"a":[' + b"[]," * 320_000 + b"[]]}}}")
    return head(headers=b"Content-Encoding: gzip\r\n", length=len(zipped)) + zipped


ATTACKS: dict[str, Attack] = {
    "20 headers that never end": lambda port: each(port, 20, GET[:-2] + b"A: ", b"a" * 100_000),
    "500 headers, 5 bytes a second": lambda port: each(port, 500, b"GET", b"a"),
    "500 bodies, 5 bytes a second": lambda port: each(port, 500, head(length=10_000), b" "),
    "256 bodies of one byte": lambda port: each(port, 256, head(length=10) + b"{"),
    "100 bodies that stop at 900,000 bytes": lambda port: each(port, 100, head(length=BODY_BYTES) + b" " * 900_000),
    "2,000 idle connections": lambda port: each(port, 2_000, b""),
    "2,000 idle connections after an answer": lambda port: each(port, 2_000, GET),
    "20 clients that read no answer": unread,
    "1,000 pipelined requests on 5 connections": lambda port: each(port, 5, GET * 1_000),
    "320,000 lists in gzip, 20 a second": lambda port: anew(port, small_lists(), 20),
    "10^6 brackets, 20 a second": lambda port: anew(port, head(length=BODY_BYTES) + b"[" * BODY_BYTES, 20),
    "64 MB of chunks": lambda port: each(port, 2, head() + b"4000000\r\n", b" " * 2**20, 0.01),
}


@dataclass(frozen=True)
class Result:
    name: str
    alone: float  # p99 of the good client, seconds
    beside: float
    wrong: int
    grown_mb: float
    closed: bool

    @property
    def passed(self) -> bool:
        is_fast = self.beside <= max(LEAST_P99, 2 * self.alone)
        return is_fast and not self.wrong and self.grown_mb <= MEMORY_MB and self.closed

    def row(self) -> tuple[object, ...]:
        verdict = "yes" if self.passed else "NO"
        closed = "yes" if self.closed else "NO"
        alone, beside = (f"{seconds * 1e3:.1f}" for seconds in (self.alone, self.beside))
        return self.name, alone, beside, self.wrong, f"{self.grown_mb:.0f}", closed, verdict


def run_attack(name: str, port: int, closed: Any) -> None:
    closed.value = ATTACKS[name](port)


def measure(server: ServerProcess, body: dict[str, Any], name: str) -> Result:
    with GoodClient(server.port, body) as good:
        time.sleep(SECONDS / 2)
    alone, memory = good.p99(), server.resident_mb()
    closed = multiprocessing.Value("b", False)
    attacker = multiprocessing.Process(target=run_attack, args=(name, server.port, closed))
    grown = 0.0
    with GoodClient(server.port, body) as good:
        attacker.start()
        while attacker.is_alive():
            attacker.join(0.2)
            grown = max(grown, server.resident_mb() - memory)
    return Result(name, alone, good.p99(), len(good.wrong), grown, bool(closed.value))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=100_000, help="number of mutated requests")
    parser.add_argument("--only", default="", help="part of the name of an attack")
    given = parser.parse_args()
    exit_on_sigterm()
    names = ("HEADER_TIMEOUT_S", "BODY_TIMEOUT_S", "KEEP_ALIVE_S", "WRITE_TIMEOUT_S")
    settings = {"BUNDLES": str(BUNDLES), "VARIANTS": "fp32", "THREADS": "1", "SLOW_MS": "0", "DRAIN_SECONDS": "0"}
    settings |= {name: f"{TIMEOUT:g}" for name in names}
    with ServerProcess(settings, QUIET) as server:
        example = server.get("/models/movielens")[1]["example"]
        results = [measure(server, example, name) for name in ATTACKS if given.only in name]
        print(f"{cpu_name()}; time-outs of {TIMEOUT:g} s\n")
        titles = ("attack", "p99 alone, ms", "p99 beside, ms", "wrong", "memory, MB", "closed", "passed")
        print(table(titles, [result.row() for result in results]))
        begin = time.monotonic()
        faults, counts = send_mutants(server.port, given.mutants)
        alive = server.get("/livez")[0] == 200
    answers = ", ".join(f"{status}: {number}" for status, number in sorted(counts.items()))
    print(f"\n{given.mutants} mutated requests in {time.monotonic() - begin:.0f} s. Answers by status: {answers}.")
    print("\n".join(faults) if faults else "None had a 5xx or no end.")
    return int(bool(faults) or not alive or not all(result.passed for result in results))


if __name__ == "__main__":
    sys.exit(main())
