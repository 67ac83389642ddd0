"""The tests of `make test` that belong to a number of the list, run once more, so that the report names all of them.

Called by: `__main__.py`, and the command line: python -m loadtest.chaos.fast. Calls: pytest, `report.py`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

from loadtest.chaos.report import Row, conclude

ROOT = Path(__file__).parents[2]


class Covered(NamedTuple):
    """A criterion, and the tests that check it: files, or single tests."""

    test: str
    criterion: str
    tests: tuple[str, ...]


COVERED = (
    Covered(
        "R1",
        "no server error, no undocumented status or content type: requests generated from /openapi.json",
        ("tests/http/test_openapi.py",),
    ),
    Covered(
        "R2",
        "clients of other servers parse the answers, and rank as the native call",
        ("tests/http/calls/test_clients.py", "tests/http/calls/test_dialects.py"),
    ),
    Covered(
        "R3",
        "every error is a problem of RFC 9457, or of the shape of its call, without stack trace and sent values",
        ("tests/http/test_problems.py", "tests/http/test_mistakes.py", "tests/http/test_poison.py"),
    ),
    Covered(
        "R4",
        "poison in any place of any body, URL or header: an answer or a 4xx, and the next request is not affected",
        ("tests/http/test_poison.py",),
    ),
    Covered(
        "R10",
        "unreadable vectors and histories in Redis: counted, ignored, answered",
        (
            "tests/http/test_poison_values.py",
            "tests/store/test_codec.py",
            "tests/store/test_lookup.py",
            "tests/events/test_history_faults.py",
        ),
    ),
    Covered(
        "R11",
        "poison bundles (truncated, empty, huge, NaN, another digest, operator or input, links and paths out): "
        "refused, counted, and the old version serves",
        (
            "tests/versions/test_watch.py::test_poison_bundles_are_refused_and_the_old_one_serves",
            "tests/versions/test_watch.py::test_refused_folder_is_tried_again_when_it_changes_only",
            "tests/versions/test_admin.py::test_refused_version_keeps_the_old_one_and_says_why",
            "tests/bundle/test_loader.py",
            "tests/bundle/test_numbers.py",
            "tests/bundle/test_served_bytes.py",
            "tests/bundle/test_signature.py",
        ),
    ),
    Covered(
        "R12",
        "64 users at once: ids equal, scores within 1e-5 of the answers alone",
        ("tests/http/test_crowd.py::test_64_users_at_once_get_their_isolated_answers",),
    ),
    Covered(
        "R13",
        "order, padding and chunks change no score beyond the stated bounds",
        ("tests/train/test_parity.py", "tests/ranking/test_pipeline.py"),
    ),
    Covered(
        "R14",
        "clients leave and reads of Redis are cancelled: never another user's data, gauges back at 0",
        (
            "tests/http/test_crowd.py::test_a_cancel_storm_mixes_nothing_and_ends_at_rest",
            "tests/store/test_store_faults.py::test_many_cancellations_never_yield_another_users_vector",
            "tests/events/test_history_faults.py::test_a_cancelled_read_never_reaches_another_user",
        ),
    ),
    Covered(
        "R22",
        "every fault of Redis and its network: answered in time, the circuit opens within 1 s and closes within 5 s",
        ("tests/store/test_store_faults.py", "tests/store/test_store_topologies.py"),
    ),
    Covered(
        "R23",
        "a killed Redis that starts empty gives defaults, then vectors again; reads of one user are shared",
        (
            "tests/store/test_store_faults.py::test_a_redis_that_restarts_empty_gives_defaults_then_hits",
            "tests/store/test_lookup.py::test_a_redis_that_dies_and_restarts_is_used_again",
            "tests/store/test_node.py",
        ),
    ),
    Covered("R24", "the clock jumps by an hour: deadlines hold, ages are not negative", ("tests/http/test_clock.py",)),
    Covered(
        "R27",
        "closed, full and stalled outputs cost no answer",
        (
            "tests/test_process.py::test_a_free_number_of_a_stream_is_taken",
            "tests/loadtest/test_chaos.py::test_a_failing_output_costs_no_answer",
            "tests/http/test_request_log.py::test_stalled_reader_delays_no_request_and_drops_are_counted",
            "tests/http/test_request_log.py::test_full_disk_drops_the_line_and_tries_the_next_one",
            "tests/events/test_tap.py::test_a_full_disk_costs_the_tap_alone",
        ),
    ),
    Covered(
        "R31",
        "no code from data, pickle or torch in the server; keys in no log, compared in constant time; admin off by "
        "default; a user without rights, a read-only root",
        (
            "tests/test_security.py",
            "tests/test_imports.py::test_server_loads_nothing_of_training",
            "tests/test_imports.py::test_server_imports_nothing_of_training",
            "tests/http/test_keys.py",
            "tests/http/test_secrets_in_logs.py",
            "tests/versions/test_admin.py::test_without_its_key_nothing_of_admin_exists",
            "tests/versions/test_admin.py::test_only_the_admin_key_opens_admin",
            "tests/deploy/test_compose.py::test_own_image_is_built_once_and_runs_as_numeric_user",
        ),
    ),
)


def outcomes(report: Path) -> dict[str, bool | None]:
    """By node id without its parameters: whether all cases passed; None if they were skipped."""
    found: dict[str, bool | None] = {}
    for case in ET.parse(report).iter("testcase"):
        failed = case.find("failure") is not None or case.find("error") is not None
        file = case.get("classname", "").replace(".", "/") + ".py"
        node = f"{file}::{case.get('name', '').partition('[')[0]}"
        passed = None if case.find("skipped") is not None else not failed
        before = found.get(node, passed)
        found[node] = passed if before is None else before and passed is not False
    return found


def row(covered: Covered, found: dict[str, bool | None]) -> Row:
    """A test that was not found counts as failed."""
    results: list[bool | None] = []
    for name in covered.tests:
        results += [passed for node, passed in found.items() if node == name or node.startswith(f"{name}::")] or [False]
    number = f"{results.count(True)} tests passed, {results.count(False)} failed, {results.count(None)} skipped"
    return Row(covered.test, covered.criterion, number, False not in results and True in results)


def main() -> int:
    names = sorted({name for covered in COVERED for name in covered.tests})
    files = {name for name in names if "::" not in name}
    names = [name for name in names if name in files or name.partition("::")[0] not in files]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", *names]
        subprocess.run(words, cwd=ROOT, stdout=sys.stderr.fileno(), check=False)
        found = outcomes(report)
    listed = "\n".join(f"- {each.test}: {', '.join(f'`{name}`' for name in each.tests)}" for each in COVERED)
    return conclude([row(covered, found) for covered in COVERED], listed)


if __name__ == "__main__":
    sys.exit(main())
