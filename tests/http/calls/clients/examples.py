"""Runs the examples of docs/calls.md inside a child process that has their libraries."""

from __future__ import annotations

import io
from contextlib import redirect_stdout


def run_examples(examples: list[str]) -> list[str]:
    """Return what each example prints."""
    printed = []
    for example in examples:
        output = io.StringIO()
        with redirect_stdout(output):
            exec(compile(example, "docs/calls.md", "exec"), {"__name__": "example"})
        printed.append(output.getvalue().strip())
    return printed
