"""The commit of the working tree, for reports of measurements.

Called by: `chaos/__main__.py`, `peers/__main__.py`. Calls: git.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHANGED = "+"


def commit(*reports: Path) -> str:
    """The short name of the commit, with a plus sign if tracked files other than the reports differ from it."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    excluded = [f":(exclude){report.relative_to(ROOT).as_posix()}" for report in reports]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", *excluded], check=False).returncode
    return name.strip() + CHANGED * bool(changed)
