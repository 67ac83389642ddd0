"""Libraries of the caller: imported on call only, so that neither the client nor the server depends on them.

Called by: `results.py`, `frames.py`, `values.py` and `commands/batch.py`.
"""

from __future__ import annotations

import importlib
from typing import Any


class MissingLibrary(ImportError):
    """A method needs a library that is not installed. The message names the remedy."""


def library(name: str, purpose: str, package: str = "") -> Any:
    """Import a library. Raises MissingLibrary with the command that installs it, or the `package` that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingLibrary(f"{purpose} needs {name}; run: pip install {package or name}") from error


def library_of(value: object) -> str:
    """Return the top-level package of the value's type, for example "numpy", without importing it."""
    return type(value).__module__.partition(".")[0]


def is_frame(value: object) -> bool:
    """Whether the value is a data frame of pandas or polars."""
    return library_of(value) in ("pandas", "polars") and type(value).__name__ == "DataFrame"
