"""The words and small habits of the page: snippets that run, repeats, the address, the badge, explanations."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Route, expect

import slatewise
from slatewise.settings import Settings
from tests.page.support import BUNDLE, ask, compared, open_page, ranked, ready, search, write_bundle
from tests.support.application import serve

DISPLAY = json.loads((BUNDLE / "display.json").read_text())
REPORT = json.loads((BUNDLE / "report.json").read_text())


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The demo without a verdict, as "films" and "plain"; the second has no titles and no measured quality."""
    root = tmp_path_factory.mktemp("bundles")
    films = write_bundle(root, "films", DISPLAY, json.loads((BUNDLE / "examples.json").read_text()))
    plain = write_bundle(root, "plain", None)
    forget_verdict(films)
    (plain / "report.json").unlink()
    forget_verdict(plain, "report.json")
    with serve(Settings(bundles=root)) as client:
        yield client


def forget_verdict(folder: Path, *files: str) -> None:
    """Take the verdict and these files, which are gone, out of a manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["verdict"]
    for file in files:
        del manifest["files"][file]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("ranker", ["films", "plain"])
def test_python_on_screen_prints_what_it_asks_for(
    browser: Browser, both: httpx.Client, ranker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slatewise, "Client", partial(slatewise.Client, timeout=30), raising=False)  # a busy machine
    with open_page(browser, both, path=f"/?ranker={ranker}") as page:
        ready(page)
        with ranked(page) as body:
            page.click("#explain")
        page.get_by_role("tab", name="Python").click()
        code = page.locator("#code").inner_text()
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(code, "code on screen", "exec"), {})
    lines = printed.getvalue().splitlines()
    answer = ask(both, body)
    results, explained = answer["results"], answer["explanations"]
    assert len(lines) == 24 + len(explained) and len(explained) == 10
    for k, line in enumerate(lines[:24]):
        assert line.startswith(f"{k + 1} {results['item_ids'][k]} {results['scores'][k]}")
        if ranker == "films":
            assert results["fields"]["title"][k] in line
    for k, (line, why) in enumerate(zip(lines[24:], explained, strict=True)):
        assert results["index"][k] == why["index"] and line.startswith(f"{results['item_ids'][k]} places by event: {{")
        assert all(repr(item) in line for item in why["events"]["item_ids"])


def test_first_arrow_selects_the_first_match(browser: Browser, both: httpx.Client) -> None:
    with open_page(browser, both, path="/?ranker=films") as page:
        ready(page)
        search(page, "candidate", "matrix", "Matrix, The (1999)")
        assert page.locator(".search [aria-selected=true]").count() == 0
        page.keyboard.press("ArrowDown")
        with ranked(page) as body:
            page.keyboard.press("Enter")
        assert body["candidates"]["item_ids"][-1] == "2571"
        search(page, "candidate", "matrix", "Matrix, The (1999)")
        page.keyboard.press("ArrowUp")
        expect(page.locator(".search [aria-selected=true]")).to_have_text("Add the id matrix")


def test_candidate_that_is_added_again_is_named(browser: Browser, both: httpx.Client) -> None:
    with open_page(browser, both, path="/?ranker=films") as page:
        ready(page)
        expect(page.locator("#repeats")).to_have_text("")
        for times in (1, 2, 3):
            search(page, "candidate", "matrix", "Matrix, The (1999)")
            with ranked(page) as body:
                page.keyboard.press("Enter")
            assert body["candidates"]["item_ids"].count("2571") == times
            told = f"Matrix, The (1999) ({times} times). Each one is ranked." if times > 1 else ""
            expect(page.locator("#repeats")).to_have_text(f"More than once in the slate: {told}" if told else "")
        for _ in range(2):
            with ranked(page):
                page.locator("#cards > [data-id='2571'] .drop").first.click()
        expect(page.locator("#repeats")).to_have_text("")


def test_address_follows_the_ranker(browser: Browser, both: httpx.Client) -> None:
    with open_page(browser, both, path="/?other=1") as page:
        ready(page)
        expect(page.locator("#ranker")).to_have_value("films")
        with ranked(page):
            page.select_option("#ranker", "plain")
        assert page.url == f"{both.base_url}/?other=1&ranker=plain".replace("//?", "/?")
        page.reload()
        ready(page)
        expect(page.locator("#ranker")).to_have_value("plain")
    with open_page(browser, both, path="/?ranker=unknown") as page:
        ready(page)
        assert page.url.endswith("/?ranker=films")


def test_badge_without_a_verdict_is_the_quality(browser: Browser, both: httpx.Client) -> None:
    def figure(name: str) -> str:
        mean, low, high = REPORT["leave_one_out"]["set"][name]
        return f"{mean:.3f} ({low:.3f}\N{EN DASH}{high:.3f})"

    assert both.get("/models/films").json()["verdict"] is None
    with open_page(browser, both, path="/?ranker=films") as page:
        ready(page)
        expect(page.locator("#model .grade")).to_have_text(f"HR@10 {figure('hr10')}, NDCG@10 {figure('ndcg10')}")
        with ranked(page):
            page.select_option("#ranker", "plain")
        expect(page.locator("#model")).to_contain_text("The bundle has no measured quality.")
        expect(page.locator("#model .grade")).to_have_count(0)


def test_explanation_without_moved_places_has_scores(browser: Browser, both: httpx.Client) -> None:
    """Where no place changes, as for a single candidate, the score is what an event moved."""

    def explained(route: Route) -> None:
        body: dict[str, Any] = route.request.post_data_json
        answer = ask(both, body)
        for each in answer.get("explanations", []):
            each["events"] = {"position": [1, 0], "item_ids": ["1", "2"], "delta": [0.02, -0.0001], "places": [0, 0]}
            each["neighbours"] = {"index": [], "item_ids": [], "delta": [], "places": []}
        route.fulfill(json=answer)

    with open_page(browser, both, path="/?ranker=films") as page:
        ready(page)
        compared(page)
        page.route("**/rerank", explained)
        with ranked(page):
            page.click("#explain")
        expect(page.locator("#cards .why").first).to_have_text(f"Events: ▲(+0.020) {DISPLAY['1']['title']}")
