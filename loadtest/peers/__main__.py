"""Slatewise and other servers with the same model, side by side: python -m loadtest.peers

    check        the scores of every peer, on every graph, equal those of Slatewise
    choice       short runs find each peer's best number of workers and threads: req/s at 4 connections, p50 at 1
    measurement  all contenders in rounds; each is restarted in every round, in random order

Called by: the command line. Calls: `environments.py` installs missing parts. Output: build/peers/report/ with
report.md, report.png and cells.jsonl.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

from loadtest.peers.contenders import OURS, PEERS, Setup
from loadtest.peers.environments import BUILD, GRAPHS, prepare, site_packages
from loadtest.peers.measurements import (
    BOUND,
    Batch,
    Cell,
    Entry,
    our_scores,
    sample_bodies,
    worst_difference,
)
from loadtest.peers.report import Cells, choices, plot, ratios, side_by_side
from loadtest.server_process import exit_on_sigterm

CHOICE_RUNS = 2  # runs of each set-up; the better one counts


class Run:
    """One comparison. Prints its cells, and appends them to a file, as soon as they are measured."""

    def __init__(self, out: Path, peers: Sequence[str], variants: Sequence[str]) -> None:
        self.out = out
        self.peers = peers
        self.ours = [Entry(OURS, variant) for variant in variants]
        self.entries = [Entry(name, graph) for graph in GRAPHS for name in peers]
        self.cells: list[Cell] = []
        out.mkdir(parents=True, exist_ok=True)
        for path in (out / "cells.jsonl", *out.glob("*.log")):
            path.unlink(missing_ok=True)

    def add(self, cells: Sequence[Cell]) -> None:
        self.cells += cells
        with (self.out / "cells.jsonl").open("a") as file:
            for cell in cells:
                print(cell.line(), flush=True)
                print(cell.line(), file=file)

    def check(self) -> None:
        bodies = sample_bodies()
        expected = our_scores(bodies, self.out)
        for entry in self.entries:
            worst = worst_difference(entry, bodies, expected, self.out)
            print(
                f"{entry.title}, {entry.graph}: scores within {worst:.1e} of ours over {len(bodies)} requests",
                flush=True,
            )
            if not worst <= BOUND:
                raise SystemExit(f"the bound is {BOUND:.0e}")

    def choose(self, count: int, quick: bool) -> dict[tuple[Entry, int], Setup]:
        """The best set-up by (entry, connections)."""
        chosen: dict[tuple[Entry, int], Setup] = {}
        for entry in self.entries:
            setups = PEERS[entry.name].setups()[: 1 if quick else None]
            rates = dict.fromkeys(setups, 0.0)
            waits = dict.fromkeys(setups, float("inf"))
            for turn in range(1 if quick else CHOICE_RUNS):
                for setup in setups:
                    cells = list(Batch(entry, setup, "choice", turn, count, self.out).measure_distinct((4, 1)))
                    rates[setup] = max(rates[setup], cells[0].per_second)
                    waits[setup] = min(waits[setup], cells[1].p50_ms)
                    self.add(cells)
            chosen[entry, 4] = max(setups, key=rates.__getitem__)
            chosen[entry, 1] = min(setups, key=waits.__getitem__)
        return chosen

    def measure(self, chosen: dict[tuple[Entry, int], Setup], count: int, turn: int) -> None:
        """One round of the measurement."""
        order = [*self.ours, *self.entries]
        random.Random(turn).shuffle(order)
        for entry in order:
            plan: list[tuple[Setup | None, tuple[int, ...]]]
            if entry in self.ours:
                plan = [(None, (4, 1))]
            elif chosen[entry, 4] == chosen[entry, 1]:
                plan = [(chosen[entry, 4], (4, 1))]
            else:
                plan = [(chosen[entry, connections], (connections,)) for connections in (4, 1)]
            for setup, connections in plan:
                batch = Batch(entry, setup, "measurement", turn, count, self.out)
                self.add(list(batch.measure_distinct(connections)))
            if entry in self.ours:
                self.add(list(Batch(entry, None, "measurement", turn, count, self.out).measure_known()))

    def report(self) -> None:
        cells = Cells(self.cells, self.ours, self.entries)
        versions = ", ".join(f"{PEERS[name].title} {version(name)}" for name in self.peers)
        text = "\n\n".join(
            [versions, side_by_side(cells), ratios(cells), choices(self.cells), "![side by side](report.png)"]
        )
        (self.out / "report.md").write_text(text + "\n")
        plot(cells, self.out / "report.png")
        print(text)


def version(peer: str) -> str:
    return next(found.version for found in distributions(name=peer, path=[str(site_packages(peer))]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Slatewise and other servers with the same model, side by side.")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated peers (default: %(default)s)")
    parser.add_argument(
        "--variants", default="fp32", help="comma-separated variants of Slatewise (default: %(default)s)"
    )
    parser.add_argument("--requests", type=int, help="requests in a cell (default: 400, or 40 with --quick)")
    parser.add_argument("--rounds", type=int, help="rounds of the measurement (default: 5, or 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="a smoke test with one set-up for each peer")
    parser.add_argument("--out", type=Path, default=BUILD / "report")
    options = parser.parse_args()
    peers = options.peers.split(",")
    if unknown := set(peers) - PEERS.keys():
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    exit_on_sigterm()
    for name in [name for name in os.environ if name.startswith("SLATEWISE_")]:  # Slatewise runs with its defaults
        del os.environ[name]
    count = options.requests or (40 if options.quick else 400)
    rounds = options.rounds or (1 if options.quick else 5)
    prepare(peers)
    run = Run(options.out, peers, options.variants.split(","))
    run.check()
    chosen = run.choose(max(40, count // 4), options.quick)
    for turn in range(rounds):
        run.measure(chosen, count, turn)
    run.report()


if __name__ == "__main__":
    main()
