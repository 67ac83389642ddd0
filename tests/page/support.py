"""Pages that watch what the browser does, and bundles with other titles."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from playwright.sync_api import Browser, Page, expect

from tests.conftest import DEMO

BUNDLE = max((DEMO / "movielens").glob("[0-9]*"), key=lambda folder: int(folder.name))
WAIT = 20_000  # milliseconds: the machine may be busy


@contextmanager
def open_page(
    browser: Browser, client: httpx.Client, *, errors: int = 0, path: str = "/", **options: Any
) -> Iterator[Page]:
    """Open the page of a server. At the end, no other host was asked and the console has `errors` errors."""
    page = browser.new_page(**options)
    page.set_default_timeout(WAIT)
    expect.set_options(timeout=WAIT)
    found: list[str] = []
    hosts: set[str] = set()
    page.on("console", lambda message: found.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    try:
        page.goto(f"{client.base_url}{path}")
        yield page
    finally:
        page.close()
    assert hosts == {urlsplit(str(client.base_url)).netloc}
    assert len(found) == errors, found


def ready(page: Page, cards: int = 24) -> None:
    """Wait until the slate is ranked and the comparison is complete."""
    expect(page.locator("#cards > .card")).to_have_count(cards)
    expect(page.locator("#cards")).to_have_attribute("aria-busy", "false")


def compared(page: Page) -> None:
    expect(page.locator("#compare")).to_have_attribute("aria-busy", "false")


def shown_ids(page: Page) -> list[str]:
    ids: list[str] = page.evaluate(
        "() => [...document.querySelectorAll('#cards > .card')].map(card => card.dataset.id)"
    )
    return ids


def search(page: Page, kind: str, text: str, found: str) -> None:
    """Type into the search box of a "candidate" or an "event", and wait until the first option has a text."""
    page.get_by_placeholder(f"Add {'an' if kind == 'event' else 'a'} {kind}").fill(text)
    expect(page.locator(".search [role=option]").first).to_contain_text(found)


@contextmanager
def ranked(page: Page) -> Iterator[dict[str, Any]]:
    """Do something that ranks again; afterwards the dictionary is the body that was sent, and the cards show it."""
    body: dict[str, Any] = {}
    compared(page)  # so that no request of the comparison is taken for the one that follows
    with page.expect_response("**/rerank") as response:
        yield body
    body |= response.value.request.post_data_json
    expect(page.locator("#cards")).to_have_attribute("aria-busy", "false")


def ask(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    answer = client.post("/rerank", json=body)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def write_bundle(root: Path, name: str, titles: dict[str, Any] | None, examples: list[Any] | None = None) -> Path:
    """Write the demo under another name, with other titles and examples; `None`: without them."""
    folder = root / name / "1"
    shutil.copytree(BUNDLE, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"ranker": name, "version": 1, "variants": {"int8": manifest["variants"]["int8"]}}
    manifest["files"] = {
        path: digest
        for path, digest in manifest["files"].items()
        if not path.startswith("variants/") or "/int8/" in path
    }
    for file, content in (("display.json", titles), ("examples.json", examples)):
        if content is None:
            (folder / file).unlink()
            del manifest["files"][file]
        else:
            (folder / file).write_text(json.dumps(content))
            manifest["files"][file] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
