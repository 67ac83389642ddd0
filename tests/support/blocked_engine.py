from __future__ import annotations

import threading
from typing import Any

import pytest

from slatewise.inference.engine import Engine


class BlockedMethod:
    """Replaces a method of Engine: counts its calls, and blocks each one until `may_end` is set."""

    def __init__(self, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.begun = threading.Event()
        self.may_end = threading.Event()
        original = getattr(Engine, method)

        def blocked(engine: Engine, *arguments: Any, **options: Any) -> Any:
            self.calls += 1
            self.begun.set()
            assert self.may_end.wait(30)
            return original(engine, *arguments, **options)

        monkeypatch.setattr(Engine, method, blocked)
