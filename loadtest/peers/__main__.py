"""Slatewise and other servers with the same model, side by side: python -m loadtest.peers

    check        the scores of every peer, on every graph, equal those of Slatewise
    choice       short runs find each peer's best number of workers and threads: req/s at 4 connections, p50 at 1
    measurement  all contenders in rounds; each is restarted in every round, in random order
    cross-check  one cell measured with wrk too, if the machine has it

`--variants fp32,demo:int8` adds a variant of the demo: a trained and smaller ranker, which gets requests of the same
shape with its own ids.

All contenders have the same allocator, and the peers serve the graph `rank`: the arithmetic of Slatewise, fused in the
same way. `--graphs rank,straightforward` adds the graph of an ordinary export.

No round begins that would end after `--minutes`. The same command continues a stopped run of the same commit: with the
servers' choices, and after its last complete round.

Called by: the command line. Calls: `environments.py` installs missing parts. Output: build/peers/report/ with
report.md, report.png and cells.jsonl.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

from loadtest.commit import commit
from loadtest.peers import allocator, cross_check
from loadtest.peers.choice import best_setup
from loadtest.peers.contenders import OURS, PEERS, Setup
from loadtest.peers.environments import BUILD, GRAPHS, prepare, site_packages
from loadtest.peers.kept import Kept
from loadtest.peers.measurements import (
    BOUND,
    EXACT,
    Batch,
    Cell,
    Entry,
    our_scores,
    sample_bodies,
    worst_difference,
)
from loadtest.peers.plot import plot
from loadtest.peers.report import Cells, choices, cross_checked, name_of, ratios, side_by_side
from loadtest.server_process import exit_on_sigterm
from slatewise.process import cpu_name

CHOICE_RUNS = 2  # runs of each set-up; the better one counts


class Run:
    """One comparison. Prints its cells as soon as they are measured. `count`: requests of a cell at 4 connections."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.peers: list[str] = options.only
        self.quick: bool = options.quick
        self.count: int = options.requests or (40 if self.quick else 300)
        self.ours = [Entry(OURS, variant) for variant in options.variants]
        self.entries = [Entry(name, graph) for graph in options.graphs for name in self.peers]
        self.labels = {
            "commit": commit(),
            "machine": cpu_name(),
            "allocator": allocator.title(),
            "contenders": [name_of(entry) for entry in (*self.ours, *self.entries)],
            "requests": self.count,
            "quick": self.quick,
        }
        self.kept = Kept(self.out, self.labels)

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

    def measured(self, batch: Batch, connections: Sequence[int]) -> list[Cell]:
        cells = []
        for cell in batch.cells(connections):
            print(cell.line(), flush=True)
            cells.append(cell)
        return cells

    def choose(self) -> dict[tuple[Entry, int], Setup]:
        """The best set-up by (entry, connections)."""
        chosen: dict[tuple[Entry, int], Setup] = {}
        for entry in self.entries:
            setups = {str(setup): setup for setup in PEERS[entry.name].setups()[: 1 if self.quick else None]}
            for turn in range(1 if self.quick else CHOICE_RUNS):
                for name, setup in setups.items():
                    if not self.kept.has(phase="choice", round=turn, name=entry.name, graph=entry.graph, setup=name):
                        batch = Batch(entry, setup, "choice", turn, max(40, self.count // 4), self.out)
                        self.kept.add(self.measured(batch, (4, 1)))
            for connections in (4, 1):
                chosen[entry, connections] = setups[best_setup(self.kept.cells, entry, connections)]
        return chosen

    def measure_round(self, chosen: dict[tuple[Entry, int], Setup], turn: int) -> None:
        order = [*self.ours, *self.entries]
        random.Random(turn).shuffle(order)
        cells: list[Cell] = []
        for entry in order:
            plan: list[tuple[Setup | None, tuple[int, ...]]]
            if entry in self.ours:
                plan = [(None, (4, 1))]
            elif chosen[entry, 4] == chosen[entry, 1]:
                plan = [(chosen[entry, 4], (4, 1))]
            else:
                plan = [(chosen[entry, connections], (connections,)) for connections in (4, 1)]
            for setup, connections in plan:
                cells += self.measured(Batch(entry, setup, "measurement", turn, self.count, self.out), connections)
        self.kept.add(cells)

    def cross_check(self) -> None:
        if not cross_check.installed():
            print("no cross-check: the machine has no wrk", flush=True)
        elif not self.kept.has(phase="wrk"):
            self.kept.add(cross_check.cross_check(self.count, self.out))

    def report(self) -> str:
        cells = Cells(self.kept.cells, self.ours, self.entries)
        rounds = len({cell.round for cell in cells.cells})
        versions = ", ".join(f"{PEERS[name].title} {version(name)}" for name in self.peers)
        about = (
            f"Commit {self.labels['commit']}, {self.kept.date}, {cpu_name()}, allocator of all: {allocator.title()}. "
            f"{versions}. Medians of {rounds} rounds of {self.count} requests (least to greatest)."
        )
        parts = [f"`{' '.join(['python -m loadtest.peers', *sys.argv[1:]])}`", about, side_by_side(cells)]
        parts += [ratios(cells), choices(self.kept.cells, self.entries), cross_checked(self.kept.cells)]
        text = "\n\n".join([*parts, "![side by side](report.png)"])
        (self.out / "report.md").write_text(text + "\n")
        plot(cells, self.out / "report.png")
        return text


def version(peer: str) -> str:
    return next(found.version for found in distributions(name=peer, path=[str(site_packages(peer))]))


def another_round_fits(elapsed: float, rounds: Sequence[float], limit: float) -> bool:
    """Whether a round that takes as long as the longest one ends within the limit; all in seconds."""
    return elapsed + max(rounds, default=0.0) <= limit


def names(allowed: Sequence[str], text: str) -> list[str]:
    found = text.split(",")
    if unknown := set(found) - set(allowed):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(allowed)}")
    return found


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "(default: %(default)s)"
    parser.add_argument(
        "--only",
        type=lambda text: names(tuple(PEERS), text),
        default=",".join(PEERS),
        help=f"comma-separated peers; Slatewise always takes part {default}",
    )
    parser.add_argument(
        "--graphs",
        type=lambda text: names(tuple(GRAPHS), text),
        default="rank",
        help=f"comma-separated graphs of the peers, of {', '.join(GRAPHS)} {default}",
    )
    parser.add_argument(
        "--variants",
        type=lambda text: text.split(","),
        default=f"{EXACT.graph},int8,student",
        help=f"comma-separated variants of Slatewise {default}",
    )
    parser.add_argument("--requests", type=int, help="requests in a cell (default: 300, or 40 with --quick)")
    parser.add_argument("--rounds", type=int, help="rounds of the measurement (default: 3, or 1 with --quick)")
    parser.add_argument("--minutes", type=float, default=10.0, help=f"no round begins that would end later {default}")
    parser.add_argument("--quick", action="store_true", help="a smoke test with one set-up for each peer")
    parser.add_argument("--out", type=Path, default=BUILD / "report")
    return parser.parse_args(argv)


def main() -> None:
    options = arguments()
    exit_on_sigterm()
    for name in [name for name in os.environ if name.startswith("SLATEWISE_")]:  # Slatewise runs with its defaults
        del os.environ[name]
    prepare(options.only, options.graphs, options.variants)
    begin = time.monotonic()
    run = Run(options)
    if not run.kept.cells:
        run.check()
    chosen = run.choose()
    durations: list[float] = []
    for turn in range(options.rounds or (1 if options.quick else 3)):
        if run.kept.has(phase="measurement", round=turn):
            continue
        if not another_round_fits(time.monotonic() - begin, durations, options.minutes * 60):
            print(f"no time for round {turn + 1}: run the same command again", flush=True)
            break
        started = time.monotonic()
        run.measure_round(chosen, turn)
        durations.append(time.monotonic() - started)
    if not run.kept.has(phase="measurement"):
        raise SystemExit("no round was measured: run the same command again, or with more --minutes")
    run.cross_check()
    print(run.report())


if __name__ == "__main__":
    main()
