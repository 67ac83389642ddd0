"""Run every test of this folder and write docs/chaos.md: python -m loadtest.chaos [--only NAME] [--again]

A module's result is kept below build/chaos/ with its commit, so a stopped run continues with the modules that have none
for this commit. `--only` runs the named module anew, whatever is kept; `--again` runs all anew. The report shows the
kept results of all modules, each with its commit and date. The exit code is 0 if every row of the report passes.

Called by: `make chaos`. Calls: each module of this folder that has a function `main`, in a process of its own.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from loadtest.chaos.report import Row, as_table, numbers_in, rows_in
from loadtest.commit import commit
from loadtest.server_process import exit_on_sigterm
from slatewise.process import cpu_name

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KEPT = ROOT / "build" / "chaos"
DOCUMENT = ROOT / "docs" / "chaos.md"
HEAD = """# Tests to the point of failure

`make chaos` runs these tests and writes this report. `make chaos ONLY=soak` runs one module of `loadtest/chaos` and
keeps the results of the others. The fast tests are part of `make test`; the module `fast` runs them here once more.

{about}

{rows}

{missing}
"""
MOST = 31  # number of the last test that needs no container
ELSEWHERE = {28}  # `make compose-check`


def module_names(folder: Path = HERE) -> list[str]:
    """The modules with a function `main`, but for this one."""
    found = []
    for path in sorted(folder.glob("*.py")):
        functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        if "main" in functions and path.stem != "__main__":
            found.append(path.stem)
    return found


def run_module(name: str, folder: Path = KEPT) -> dict[str, Any]:
    """Run a module, and keep and return its result. Its standard error, with its progress, goes through."""
    begin = time.monotonic()
    at = commit(DOCUMENT)
    process = subprocess.run([sys.executable, "-m", f"loadtest.chaos.{name}"], stdout=subprocess.PIPE, text=True)
    result = {
        "name": name,
        "commit": at,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": cpu_name(),
        "seconds": round(time.monotonic() - begin),
        "code": process.returncode,
        "about": ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or "",
        "markdown": process.stdout.strip(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result))
    return result


def kept_results(names: list[str], folder: Path = KEPT) -> dict[str, dict[str, Any]]:
    """The results of earlier runs, by module."""
    found = {}
    for name in names:
        if (path := folder / f"{name}.json").exists():
            found[name] = json.loads(path.read_text())
    return found


def rows_of(result: dict[str, Any]) -> list[Row]:
    """The rows that a module printed, and a failed one if the exit code contradicts them.

    A module that prints none has one for each number in its docstring, which passes if the exit code is 0.
    """
    name, passes = result["name"], result["code"] == 0
    rows = rows_in(result["markdown"])
    if not rows:
        numbers = numbers_in(result["about"]) or ["-"]
        return [Row(number, f"see the report of `{name}`", f"exit code {result['code']}", passes) for number in numbers]
    if passes != all(row.passed for row in rows):
        number = f"exit code {result['code']}, {len(rows)} rows"
        rows.append(Row("-", f"rows and exit code of `{name}` agree", number, False))
    return rows


def report(results: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    """(the report, whether every row passes)."""
    rows = [(row, result) for result in results.values() for row in rows_of(result)]
    rows.sort(key=lambda pair: int(pair[0].test.removeprefix("R") if pair[0].test != "-" else 0))
    shown = [Row(row.test, row.criterion, f"{row.number} (`{result['name']}`)", row.passed) for row, result in rows]
    failed = [row for row, _ in rows if not row.passed]
    machines = sorted({result["machine"] for result in results.values()})
    about = f"{len(rows)} criteria, {len(failed)} of them failed. Machine: {'; '.join(machines)}, shared by all parts."
    named = {row.test for row, _ in rows}
    missing = [f"R{k}" for k in range(1, MOST + 1) if f"R{k}" not in named and k not in ELSEWHERE]
    without = f"Without a result: {', '.join(missing)}." if missing else "Every test has a result."
    parts = [HEAD.format(about=about, rows=as_table(shown), missing=without)]
    for name, result in results.items():
        when = f"{result['date']}, commit {result['commit']}, {result['seconds']} s, exit code {result['code']}"
        shown_below = re.sub(r"^#+ ", "### ", result["markdown"], flags=re.MULTILINE)
        parts.append(f"## {name}\n\n`python -m loadtest.chaos.{name}`, {when}\n\n{shown_below}\n")
    return "\n".join(parts), not failed


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = module_names()
    parser.add_argument("--only", choices=names, action="append", help="run this module; may be repeated")
    parser.add_argument("--again", action="store_true", help="run all modules, also those that have a result")
    args = parser.parse_args()
    exit_on_sigterm()
    results = kept_results(names)
    now = commit(DOCUMENT)
    passes = False
    wanted = args.only or [
        name for name in names if args.again or results.get(name, {}).get("commit") != now or now.endswith("+")
    ]
    for place, name in enumerate(wanted, 1):
        print(f"chaos: {name}, {place} of {len(wanted)}", file=sys.stderr, flush=True)
        results[name] = run_module(name)
        print(as_table(rows_of(results[name])), flush=True)
        text, passes = report({name: results[name] for name in names if name in results})
        DOCUMENT.write_text(text)  # after each module: a stopped run leaves what it has
    return 0 if passes else 1


if __name__ == "__main__":
    sys.exit(main())
