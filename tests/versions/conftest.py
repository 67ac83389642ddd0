"""A folder with one version, and a server of it whose versions may change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.support.versions import publish, serving

if TYPE_CHECKING:
    from tests.conftest import Tiny


@pytest.fixture
def root(tiny: Tiny, tmp_path: Path) -> Path:
    """A folder with version 1."""
    publish(tiny.folder, tmp_path, 1)
    return tmp_path


@pytest.fixture
def server(root: Path) -> Iterator[httpx.Client]:
    with serving(root) as client:
        yield client
