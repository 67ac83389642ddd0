"""R1. Requests generated from /openapi.json, many more than in `make test`, from a seed that is new in every run.

A request with valid data may be refused: a schema cannot express equal lengths of columns, or the names of a ranker.

Called by: `__main__.py`, and the command line: python -m loadtest.chaos.schema [--examples 300] [--seed 1]. Calls:
Schemathesis, `bundle.py`, `report.py`, `loadtest/server_process.py`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

from loadtest.chaos.bundle import small_bundles
from loadtest.chaos.report import Row, conclude
from loadtest.server_process import ServerProcess, exit_on_sigterm

EXAMPLES = 300  # of each operation
REFUSED_IN_TIME = {503, 504}  # documented, and no defect: an overloaded server, and a deadline that a request names


def check_operation(result: object, number: int, examples: int, statuses: Counter[int]) -> str:
    """Send generated requests to one operation. Return what is wrong with the first answer that is, or nothing."""
    operation = result.ok()  # type: ignore[attr-defined]

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
        answer = case.call_and_validate(excluded_checks=[positive_data_acceptance, not_a_server_error])
        statuses[answer.status_code] += 1
        if answer.status_code >= 500 and answer.status_code not in REFUSED_IN_TIME:
            raise AssertionError(f"{answer.status_code}: {answer.text[:300]}")

    try:
        holds()
    except Exception as error:  # what the checks raise, in several classes
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{operation.method.upper()} {operation.path}: {' / '.join(lines[:4])[:600]}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.chaos.schema", description=__doc__)
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    args = parser.parse_args()
    exit_on_sigterm()
    statuses: Counter[int] = Counter()
    faults = []
    settings_of_server = {"BUNDLES": str(small_bundles()), "DRAIN_SECONDS": "0"}
    with ServerProcess(settings_of_server) as server:
        begin = time.monotonic()
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json", wait_for_schema=5)
        operations = list(schema.get_all_operations())
        for place, operation in enumerate(operations, 1):
            if fault := check_operation(operation, args.seed, args.examples, statuses):
                faults.append(fault)
            seconds = time.monotonic() - begin
            print(f"schema: {place} of {len(operations)} operations, {seconds:.0f} s", file=sys.stderr, flush=True)
        alive = server.get("/livez")[0] == 200
    number = f"{sum(statuses.values()):,} requests to {len(operations)} operations, {len(faults)} faults"
    criterion = "generated requests: no server error, no undocumented status or content type, nothing bad accepted"
    notes = [f"Seed {args.seed}, statuses {dict(sorted(statuses.items()))}.", *(f"- {fault}" for fault in faults)]
    return conclude([Row("R1", criterion, number, alive and not faults)], "\n".join(notes))


if __name__ == "__main__":
    sys.exit(main())
