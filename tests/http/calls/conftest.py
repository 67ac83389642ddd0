"""Fixtures: the committed demo, served with a key."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from slatewise.settings import Settings
from tests.conftest import DEMO
from tests.http.calls.support import KEY
from tests.support.application import serve


@pytest.fixture(scope="package")
def demo() -> Iterator[httpx.Client]:
    """A client of the served demo that sends its key."""
    with serve(Settings(bundles=DEMO, api_keys=KEY)) as client:  # type: ignore[arg-type]
        client.headers["Authorization"] = f"Bearer {KEY}"
        yield client
