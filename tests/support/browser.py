"""The fixture `browser`: the machine's Chromium, driven by Playwright. Without a Chromium its tests are skipped.

Called by: `tests/conftest.py`, so that every test can take the fixture.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-background-networking"]


@pytest.fixture(scope="module")  # while Playwright runs, asyncio.run fails in this thread, so it ends with the module
def browser() -> Iterator[Browser]:
    """A headless Chromium. Each test opens a page of its own: `with browser.new_page() as page`."""
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip(f"no browser on the PATH: {', '.join(NAMES)}")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield running
        running.close()
