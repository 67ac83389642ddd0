"""Draw docs/page.png, the picture of the page in the README: `python -m tests.page.picture`.

A demo user's last event is dropped, so the picture shows the moves that follow. The milliseconds are those of the
machine and moment of the drawing.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from slatewise.settings import Settings
from tests.conftest import DEMO
from tests.page.support import compared, open_page, ranked, ready
from tests.support.application import serve
from tests.support.browser import FLAGS, NAMES

PICTURE = Path(__file__).parents[2] / "docs" / "page.png"
USER = "small:39"


def main() -> None:
    executable = next(filter(None, map(shutil.which, NAMES)))
    with serve(Settings(bundles=DEMO)) as client, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        with open_page(browser, client, viewport={"width": 1280, "height": 800}, color_scheme="light") as page:
            ready(page)
            users = page.locator("#demo option").all_inner_texts()
            with ranked(page):
                page.select_option("#demo", label=next(text for text in users if text.startswith(f"{USER} ")))
            with ranked(page):
                page.locator("#history > .chip .drop").last.click()
            compared(page)
            page.locator("#live b").first.filter(has_text="ms").wait_for()
            page.evaluate("() => document.activeElement.blur()")
            page.mouse.move(2, 2)
            page.wait_for_timeout(600)  # until the cards have arrived
            page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main()
