"""Overload: python -m loadtest.chaos.overload [--seconds 20] [--only R16]

R16: 0.5 to 10 times the capacity, open loop. R17: recovery after it. R18: deadlines under overload. R19: large requests
beside small ones, and priorities. R20: clients that try again at once. R21: /livez meanwhile, and the event loop at
capacity.

The ranker is the reference one with random weights (`make reference-bundle`), and all users are new: 256 events and
1,300 candidates, so that the capacity is at most 60 requests a second on two cores. A request counts as *ranked* if the
model scored it, with whatever exit; refused ones get the input order, 429 or 503.

Called by: `__main__.py`, and the command line. Calls: `bench.py`, `flood.py`, `report.py`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys

from loadtest.chaos.bench import COLUMNS, SHAPE, Bench
from loadtest.chaos.flood import Flood, percentile
from loadtest.chaos.report import Row, conclude
from loadtest.client import closed_loop, limit_time
from loadtest.markdown import table
from loadtest.server_process import exit_on_sigterm
from loadtest.workload import Shape, W

LARGEST = Shape(256, 4_096)
SMALL = Shape(50, 20)
FACTORS = (0.5, 0.8, 1.0, 1.5, 3.0, 10.0)
RECOVERY_SECONDS = 5.0
DEADLINE_MS = 50.0
LATE_MS = 10.0  # that an answer may come after its deadline
SLOW_MS = 200
LAG_SECONDS = 0.01  # of the event loop; a bound of its metric
LOW = 10  # priority
SHARE_OF_LARGE = 0.25  # of all cores


def sweep(bench: Bench) -> list[Row]:
    """R16, R20 and R21."""
    with bench.server() as server:
        capacity = bench.capacity(server, bench.requests)
        steps = {
            factor: bench.at_rate(server, f"{factor:g} x capacity", factor * capacity, bench.requests)
            for factor in FACTORS
        }
        again = bench.at_rate(server, "10 x capacity, again", 10 * capacity, bench.requests)
        retries = Flood([bench.requests], [(3 * capacity, bench.seconds)], retry=True)
        retried = bench.flood(server, "3 x capacity, tried again", retries)
    with bench.server(MAX_QUEUE_MS="0.001") as server:
        nearly_all = bench.at_rate(server, "5 x, limit of 1 us", 5 * capacity, bench.requests)
    cores = os.cpu_count() or 1
    lone = cores / capacity * len(nearly_all.ranked)  # at most: a full answer takes all cores for 1 / capacity
    refusal = max(0.0, nearly_all.server_cpu - lone) / len(nearly_all.refused)
    peak = max(one.goodput for one in steps.values())  # more is ranked than by full answers alone: exits give way
    at_8, at_3, at_10 = steps[0.8], steps[3.0], steps[10.0]
    share = len(at_10.refused) / at_10.seconds * refusal / cores
    least = 0.9 * peak * (1 - share)
    memory = again.resident_mb / at_10.resident_mb - 1
    probes = [probe for one in steps.values() for probe in one.livez]
    livez = 1e3 * percentile([seconds for seconds, _ in probes], 0.99)
    bad = sum(status != 200 for _, status in probes)
    kept = retried.goodput / at_3.goodput
    return [
        Row("R16", "the capacity is at most 60 requests/s", f"{capacity:.0f}", capacity <= 60),
        Row(
            "R16",
            "at 3 times capacity at least 90 % of the peak is ranked, or of what is sent",
            f"{at_3.goodput:.0f} of {peak:.0f}/s, {len(at_3.answers) / at_3.seconds:.0f} sent",
            at_3.goodput >= 0.9 * min(peak, len(at_3.answers) / at_3.seconds),
        ),
        Row(
            "R16",
            "at 10 times capacity at least 90 % of the peak is ranked, less the CPU of refusing",
            f"{at_10.goodput:.0f} of {peak:.0f}/s, at least {least:.0f}; a refusal takes {1e6 * refusal:.0f} us",
            at_10.goodput >= least,
        ),
        *(
            Row(
                "R16",
                f"p99 of ranked answers at {one.name} at most twice that at 0.8",
                f"{one.p(0.99):.0f} and {at_8.p(0.99):.0f} ms",
                one.p(0.99) <= 2 * at_8.p(0.99),
            )
            for one in (at_3, at_10)
        ),
        Row("R16", "a refusal takes at most 5 ms of CPU", f"{1e3 * refusal:.2f} ms", refusal <= 0.005),
        Row(
            "R16",
            "memory after a second time at 10 times capacity at most 5 % above that of the first",
            f"{memory:+.1%}",
            memory <= 0.05,
        ),
        Row(
            "R20",
            "clients that try again at once: at least 80 % of R16's at 3 times capacity is ranked",
            f"{kept:.0%} with {len(retried.answers) / retried.seconds:.0f} tries/s",
            kept >= 0.8,
        ),
        Row(
            "R21",
            "/livez: p99 below 50 ms, never false",
            f"{livez:.1f} ms, {bad} of {len(probes)} bad",
            livez < 50 and not bad,
        ),
    ]


def recovery(bench: Bench) -> list[Row]:
    """R17."""
    with bench.server() as server:
        capacity = bench.capacity(server, bench.requests)
        alone = bench.at_rate(server, "0.5 x, before", 0.5 * capacity, bench.requests)
        rates = [(10 * capacity, bench.seconds), (0.5 * capacity, max(bench.seconds, 2 * RECOVERY_SECONDS))]
        after = bench.flood(server, "10 x, then 0.5 x", Flood([bench.requests], rates))
        queue = server.sample("slatewise_queue_seconds ")
    late = [one for one in after.answers if one.due >= bench.seconds + RECOVERY_SECONDS]
    p99 = 1e3 * percentile([one.latency for one in late], 0.99)
    refused = sum(not one.is_good for one in late)
    found = f"p99 {p99:.0f} ms, {alone.p(0.99):.0f} before; {refused} of {len(late)} not ranked"
    return [
        Row(
            "R17",
            "5 s after 10 times capacity, p99 is at most twice that before",
            found,
            p99 <= 2 * alone.p(0.99) and not refused,
        ),
        Row("R17", "no work is left", f"{queue} s", queue == 0),
    ]


def deadlines(bench: Bench) -> list[Row]:
    """R18."""
    w = bench.of(W, deadline_ms=DEADLINE_MS)
    large = bench.of(LARGEST, deadline_ms=DEADLINE_MS)
    with bench.server() as server:
        rate = bench.capacity(server, bench.of(W))
        at = {f: bench.at_rate(server, f"W, deadline 50 ms, {f:g} x", f * rate, w) for f in (0.8, 1.0, 3.0)}
        slow = bench.work(server, bench.of(LARGEST))
        many = bench.at_rate(server, f"{LARGEST.candidates} candidates, 50 ms, 3 x", 3 / slow, large)
    with bench.slow_server(SLOW_MS) as server:
        threads = os.cpu_count() or 1
        rates = [(3e3 * threads / SLOW_MS / 2, 3 * bench.seconds)]  # longer: the costs learn from the first calls
        held = bench.flood(server, f"calls of {SLOW_MS} ms, 50 ms, 3 x", Flood([w], rates))
        dead = server.sample("slatewise_dead_inference_seconds_total ") / held.seconds / threads
    peak = max(one.goodput for one in at.values())
    found = f"{at[3.0].goodput:.0f} of {peak:.0f}/s"
    good = "W, deadline of 50 ms, 3 times capacity: at least 90 % of the peak is ranked"
    rows = [Row("R18", good, found, at[3.0].goodput >= 0.9 * peak)]
    for one in (at[3.0], many, held):
        late = [1e3 * percentile([answer.latency for answer in one.answers], q) for q in (0.95, 0.99)]
        criterion = f"{one.name}: answered within 10 ms of the deadline (p95)"
        rows.append(Row("R18", criterion, f"{late[0]:.0f} ms, p99 {late[1]:.0f} ms", late[0] <= DEADLINE_MS + LATE_MS))
    criterion = f"calls of {SLOW_MS} ms: at most 10 % of the threads' time goes into requests that have ended"
    return [*rows, Row("R18", criterion, f"{dead:.1%}", dead <= 0.1)]


def mixture(bench: Bench) -> list[Row]:
    """R19."""
    small, largest = bench.of(SMALL), bench.of(LARGEST, priority=LOW)
    important, low = bench.requests, bench.of(SHAPE, priority=LOW)
    with bench.server() as server:
        rate = SHARE_OF_LARGE / bench.work(server, bench.of(LARGEST))
        many = rate * 19
        alone = bench.flood(server, "small alone", Flood([small], [(many, bench.seconds)]))
        both = bench.flood(
            server, "5 % with 4,096 candidates", Flood([small, largest], [(many + rate, bench.seconds)], (0.95, 0.05))
        )
        capacity = bench.capacity(server, bench.requests)
        three = bench.flood(
            server,
            "3 x, half of them of priority 10",
            Flood([important, low], [(3 * capacity, bench.seconds)], (0.5, 0.5)),
        )
    mixed = 1e3 * percentile([one.latency for one in both.ranked if one.kind == 0], 0.99)
    shed = []
    for kind in (0, 1):
        of_kind = [one for one in three.answers if one.kind == kind]
        shed.append(sum(not one.is_good or "overload" in one.degraded for one in of_kind) / len(of_kind))
    unranked = [sum(not one.is_good for one in three.answers if one.kind == kind) for kind in (0, 1)]
    found = f"degraded or refused {shed[0]:.0%} and {shed[1]:.0%}; not ranked {unranked[0]} and {unranked[1]}"
    return [
        Row(
            "R19",
            "small requests beside 5 % large ones of priority 10: p99 at most twice that alone",
            f"{mixed:.1f} and {alone.p(0.99):.1f} ms",
            mixed <= 2 * alone.p(0.99),
        ),
        Row(
            "R19",
            "priority 10 is degraded first, and refused first",
            found,
            shed[1] > shed[0] and unranked[1] >= unranked[0],
        ),
    ]


def event_loop(bench: Bench) -> list[Row]:
    """R21: W as fast as four connections ask for it."""
    endless = itertools.cycle(bench.of(W))
    names = [f'slatewise_event_loop_lag_seconds_bucket{{le="{bound}"}}' for bound in (LAG_SECONDS, "+Inf")]
    with bench.server() as server:
        bench.capacity(server, bench.of(W))
        before = [server.sample(name) for name in names]
        outcome = closed_loop(server.port, limit_time(3 * bench.seconds, endless), 4)
        fast, all_times = (server.sample(name) - was for name, was in zip(names, before, strict=True))
    number = f"{fast / all_times:.1%} of {all_times:.0f} times at {outcome.per_second:.0f} requests/s"
    criterion = f"W at capacity: the event loop is late by at most {1e3 * LAG_SECONDS:g} ms in 99 % of the times"
    return [Row("R21", criterion, number, fast >= 0.99 * all_times)]


PARTS = {"R16": sweep, "R17": recovery, "R18": deadlines, "R19": mixture, "R21": event_loop}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.chaos.overload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each step")
    parser.add_argument("--only", choices=PARTS, action="append")
    args = parser.parse_args()
    exit_on_sigterm()
    bench = Bench(args.seconds)
    rows = [row for name, part in PARTS.items() if name in (args.only or PARTS) for row in part(bench)]
    return conclude(rows, table(COLUMNS, [one.cells for one in bench.steps]))


if __name__ == "__main__":
    sys.exit(main())
