"""R1. Requests generated from /openapi.json, many more than in `make test`, from a seed that is new in every run.

A request with valid data may be refused: a schema cannot express equal lengths of columns, or the names of a ranker.
To generate and check a request takes far longer than to answer it, so several processes do it.

Called by: `__main__.py`, and the command line: python -m loadtest.chaos.schema [--requests 100000] [--minutes 30]
[--seed 1]; CHAOS_MINUTES in the environment replaces the default of the minutes. Calls: Schemathesis, `bundle.py`,
`report.py`, `loadtest/server_process.py`.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import positive_data_acceptance

from loadtest.chaos.bundle import small_bundles
from loadtest.chaos.report import Row, conclude
from loadtest.server_process import ServerProcess, exit_on_sigterm
from slatewise.process import available_cpus

REQUESTS = 100_000
MINUTES = 30.0
EXAMPLES = 100  # of each operation in a round; a round is begun with another seed
MOST_ROUNDS = 10_000  # of a process; keeps the seeds of processes apart
REFUSED_IN_TIME = {503, 504}  # documented, and no defect: an overloaded server, and a deadline that a request names

Found = tuple[Counter[int], Counter[str], int]  # statuses, faults, operations


def check_operation(
    operation: APIOperation, session: requests.Session, number: int, examples: int, statuses: Counter[int]
) -> str:
    """Send generated requests to one operation. Return what is wrong with the first answer that is, or nothing."""

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def holds(case: schemathesis.Case) -> None:
        answer = case.call_and_validate(session=session, excluded_checks=[positive_data_acceptance, not_a_server_error])
        statuses[answer.status_code] += 1
        if answer.status_code >= 500 and answer.status_code not in REFUSED_IN_TIME:
            raise AssertionError(f"{answer.status_code}: {answer.text[:300]}")

    try:
        holds()
    except Exception as error:  # what the checks raise, in several classes
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{operation.method.upper()} {operation.path}: {' / '.join(lines[:4])[:600]}"
    return ""


def check_all(port: int, first_seed: int, number: int, until: float) -> Found:
    """Send `number` requests to all operations in turn, and no more after the time `until` (monotonic)."""
    statuses: Counter[int] = Counter()
    faults: Counter[str] = Counter()
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json", wait_for_schema=5)
    operations = [result.ok() for result in schema.get_all_operations()]
    with requests.Session() as session:
        for this_round in range(MOST_ROUNDS):
            for operation in operations:
                left = number - statuses.total()
                if not left or time.monotonic() > until:
                    return statuses, faults, len(operations)
                examples = min(EXAMPLES, left)
                if fault := check_operation(operation, session, first_seed + this_round, examples, statuses):
                    faults[fault] += 1
            print(f"schema: {statuses.total():,} of {number:,} of a process", file=sys.stderr, flush=True)
    return statuses, faults, len(operations)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.chaos.schema", description=__doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument(
        "--minutes",
        type=float,
        default=float(os.environ.get("CHAOS_MINUTES", MINUTES)),
        help="end after this time, whatever was sent",
    )
    parser.add_argument("--processes", type=int, default=available_cpus(), help="that send requests")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    args = parser.parse_args()
    exit_on_sigterm()
    statuses: Counter[int] = Counter()
    faults: Counter[str] = Counter()
    operations = 0
    quiet = {"LOG_LEVEL": "error"}  # else each refusal is a line
    settings_of_server = {"BUNDLES": str(small_bundles()), "DRAIN_SECONDS": "0"} | quiet
    begin = time.monotonic()
    with ServerProcess(settings_of_server) as server:
        share = -(-args.requests // args.processes)
        with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
            jobs = [
                pool.submit(check_all, server.port, args.seed + MOST_ROUNDS * k, share, begin + 60 * args.minutes)
                for k in range(args.processes)
            ]
            for job in jobs:
                some, wrong, operations = job.result()
                statuses += some
                faults += wrong
        alive = server.get("/livez")[0] == 200
    number = f"{statuses.total():,} requests to {operations} operations, {len(faults)} faults"
    criterion = "generated requests: no server error, no undocumented status or content type, nothing bad accepted"
    notes = [
        f"{args.requests:,} requests wanted, {time.monotonic() - begin:.0f} s. Seed {args.seed}, statuses "
        f"{dict(sorted(statuses.items()))}.",
        *(f"- {times} x {fault}" for fault, times in faults.items()),
    ]
    return conclude([Row("R1", criterion, number, alive and not faults)], "\n".join(notes))


if __name__ == "__main__":
    sys.exit(main())
