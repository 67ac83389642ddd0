"""The page with hostile texts, with API keys, without titles, and when the server refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Route, expect

from slatewise.settings import Settings
from tests.page.support import BUNDLE, ask, compared, open_page, ranked, ready, search, shown_ids, write_bundle
from tests.support.application import serve

DISPLAY = json.loads((BUNDLE / "display.json").read_text())
HOSTILE = "<img src=x onerror=window.hit=1>"
SCRIPT = "<script>window.hit=1</script>"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rankers: one whose name, titles and fields are HTML, and one without titles."""
    folder = tmp_path_factory.mktemp("bundles")
    titles = {item: {"title": f"{HOSTILE} {item}", "genres": [SCRIPT]} for item in DISPLAY}
    example = json.loads((BUNDLE / "examples.json").read_text())[-1]
    write_bundle(folder, HOSTILE, titles, [example | {"user": f"{SCRIPT}\"'"}])
    write_bundle(folder, "plain", None)
    return folder


@pytest.fixture(scope="module")
def both(root: Path) -> Iterator[httpx.Client]:
    with serve(Settings(bundles=root)) as client:
        yield client


def test_texts_of_the_server_stay_texts(browser: Browser, both: httpx.Client) -> None:
    with open_page(browser, both) as page:
        ready(page)
        expect(page.locator("#ranker")).to_have_value(HOSTILE)
        expect(page.locator("#cards h3").first).to_contain_text(HOSTILE)
        expect(page.locator("#cards .meta").first).to_contain_text(SCRIPT)
        expect(page.locator("#model")).to_contain_text(HOSTILE)
        search(page, "candidate", SCRIPT, SCRIPT)
        with ranked(page) as body:
            page.keyboard.press("Enter")
        assert body["candidates"]["item_ids"][-1] == SCRIPT
        expect(page.locator("#cards h3", has_text=SCRIPT)).to_be_visible()
        with ranked(page):
            page.select_option("#demo", "1")
        expect(page.locator("#code")).to_contain_text(SCRIPT)
        assert page.locator("#main img, #main script, #main style").count() == 0
        assert page.evaluate("() => window.hit") is None


def test_markup_in_an_error_stays_text(browser: Browser, both: httpx.Client) -> None:
    problem = {"title": HOSTILE, "status": 422, "detail": SCRIPT, "errors": [{"pointer": f"/{HOSTILE}", "detail": "x"}]}
    with open_page(browser, both, errors=1) as page:  # the browser itself logs the status 422
        ready(page)
        compared(page)
        page.route(
            "**/rerank", lambda route: route.fulfill(status=422, content_type="application/problem+json", json=problem)
        )
        page.select_option("#exit", "dot")
        expect(page.locator("#problem")).to_contain_text(f"{HOSTILE} (422)")
        expect(page.locator("#problem")).to_contain_text(SCRIPT)
        assert page.evaluate("() => window.hit") is None
        page.unroute("**/rerank")
        page.locator("#problem button").click()
        expect(page.locator("#problem")).to_be_hidden()


def test_bundle_without_titles_shows_ids(browser: Browser, both: httpx.Client) -> None:
    with open_page(browser, both, path="/?ranker=plain") as page:
        ready(page)
        example = both.get("/models/plain").json()["example"]
        assert shown_ids(page) == ask(both, example)["results"]["item_ids"]
        assert page.locator("#cards h3").all_inner_texts() == shown_ids(page)
        assert page.locator("#history .name").all_inner_texts() == example["history"]["item_ids"]
        search(page, "candidate", "2028", "2028")
        with ranked(page) as body:
            page.keyboard.press("Enter")
        assert body["candidates"]["item_ids"][-1] == "2028" and "return_fields" not in body
        with ranked(page) as body:
            page.select_option("#ranker", HOSTILE)
        assert body["ranker"] == HOSTILE


def test_key_is_asked_for_and_stays_in_the_tab(browser: Browser, root: Path) -> None:
    with serve(Settings(bundles=root, api_keys="secret-key")) as client, open_page(browser, client, errors=2) as page:
        expect(page.locator("#key-form")).to_be_visible()
        expect(page.locator("#main")).to_be_hidden()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#notice")).to_contain_text("valid key is needed")
        page.fill("#key", "secret-key")
        page.keyboard.press("Enter")
        ready(page)
        expect(page.locator("#key-form")).to_be_hidden()
        expect(page.locator("#notice")).to_be_hidden()
        expect(page.locator("#code")).to_contain_text("Bearer $SLATEWISE_API_KEY")
        assert "secret-key" not in page.locator("body").inner_text()
        assert "secret-key" not in page.evaluate("() => JSON.stringify(localStorage) + document.cookie")
        page.reload()
        ready(page)


def test_refusal_is_shown_with_its_limit(browser: Browser, root: Path) -> None:
    settings = Settings(bundles=root, max_candidates=7)
    with serve(settings) as client, open_page(browser, client, errors=2, path="/?ranker=plain") as page:
        expect(page.locator("#problem")).to_contain_text("Invalid request (422)")
        expect(page.locator("#problem")).to_contain_text("24 candidates, limit 7")
        with ranked(page):
            page.select_option("#ranker", HOSTILE)
        page.select_option("#demo", "1")
        ready(page, 7)
        expect(page.locator("#problem")).to_be_hidden()


def test_degraded_answer_has_its_reasons(browser: Browser, root: Path) -> None:
    with (
        serve(Settings(bundles=root, deadline_ms=0.001)) as client,
        open_page(browser, client, path="/?ranker=plain") as page,
    ):
        ready(page)
        expect(page.locator("#facts")).to_contain_text("degraded: deadline")
        expect(page.locator("#facts")).to_contain_text("exit input_order")
        expect(page.locator("#cards > .card").first).to_contain_text("not scored")
        assert shown_ids(page) == client.get("/models/plain").json()["example"]["candidates"]["item_ids"]


def test_explanations_are_shown_where_the_server_has_them(browser: Browser, both: httpx.Client) -> None:
    """The answers are changed on their way, so the test holds for a server with and without explanations."""
    document = both.get("/openapi.json").json()
    document["components"]["schemas"]["RankRequest"]["properties"]["explain"] = {"type": "boolean"}
    asked = []

    def explained(route: Route) -> None:
        body = route.request.post_data_json
        asked.append(body.pop("explain", None))
        answer = ask(both, body)
        if asked[-1]:
            effects = {"item_ids": ["595", "1", HOSTILE], "delta": [0.1, 0.0, -0.2], "places": [1.25, 0.04, -2.0]}
            none = {"item_ids": [], "delta": [], "places": []}
            events, neighbours = effects | {"position": [0, 1, 2]}, none | {"index": []}
            best = answer["results"]["index"][0]
            answer["explanations"] = [{"index": best, "events": events, "neighbours": neighbours}]
        route.fulfill(json=answer)

    with open_page(browser, both, path="/?ranker=plain") as page:
        ready(page)
        compared(page)
        page.route("**/openapi.json", lambda route: route.fulfill(json=document))
        page.route("**/rerank", explained)
        page.reload()
        ready(page)
        with ranked(page) as body:
            page.click("#explain")
        assert body["explain"] is True and asked[0] is None
        expect(page.locator("#cards .why").first).to_have_text(
            f"Events: ▲1.3 (+0.100) 595, ▼2.0 (\N{MINUS SIGN}0.200) {HOSTILE}"
        )
        expect(page.locator("#cards .why").nth(1)).to_be_hidden()


def test_late_answer_without_a_neighbour_is_dropped(browser: Browser, both: httpx.Client) -> None:
    """The slate changes while the answer without one of its items is on its way."""
    late: list[Route] = []
    with open_page(browser, both, path="/?ranker=plain") as page:
        ready(page)
        compared(page)
        page.route("**/rerank", lambda route: route.continue_() if late else late.append(route))
        page.locator("#cards .gone").first.click()
        expect(page.locator("#cards")).to_have_attribute("aria-busy", "true")
        page.wait_for_timeout(50)
        assert len(late) == 1
        page.select_option("#exit", "point")
        expect(page.locator("#without")).to_contain_text("At the exit point")
        text = page.locator("#without").inner_text()
        late[0].fulfill(json=ask(both, late[0].request.post_data_json))
        page.wait_for_timeout(200)
        assert page.locator("#without").inner_text() == text
        compared(page)


def test_neighbour_put_back_before_its_answer(browser: Browser, both: httpx.Client) -> None:
    late: list[Route] = []
    with open_page(browser, both, path="/?ranker=plain") as page:
        ready(page)
        compared(page)
        page.route("**/rerank", lambda route: late.append(route))
        page.locator("#cards .gone").first.click()
        expect(page.locator("#cards")).to_have_attribute("aria-busy", "true")
        page.locator("#cards .gone").first.click()
        expect(page.locator("#cards")).to_have_attribute("aria-busy", "false")
        expect(page.locator("#without")).to_be_hidden()


def test_last_ranker_chosen_is_shown(browser: Browser, both: httpx.Client) -> None:
    """The card of the first ranker arrives after that of the second."""
    late: list[Route] = []
    with open_page(browser, both, path="/?ranker=plain") as page:
        ready(page)
        compared(page)
        page.route("**/models/plain", lambda route: late.append(route))
        page.select_option("#ranker", HOSTILE)
        expect(page.locator("#model")).to_contain_text(HOSTILE)
        page.select_option("#ranker", "plain")
        page.wait_for_timeout(50)
        with ranked(page) as body:
            page.select_option("#ranker", HOSTILE)
        assert body["ranker"] == HOSTILE
        late[0].fulfill(json=both.get("/models/plain").json())
        page.wait_for_timeout(300)
        expect(page.locator("#model")).to_contain_text(HOSTILE)
        compared(page)


def test_server_that_stops_is_named(browser: Browser, root: Path) -> None:
    with serve(Settings(bundles=root)) as client, open_page(browser, client, errors=1, path="/?ranker=plain") as page:
        ready(page)
        compared(page)
        page.route("**/rerank", lambda route: route.abort())
        page.select_option("#exit", "dot")
        expect(page.locator("#problem")).to_contain_text("The server does not answer.")


def test_slate_without_candidates_asks_for_some(browser: Browser, both: httpx.Client) -> None:
    with open_page(browser, both, path=f"/?ranker={HOSTILE}") as page:
        ready(page)
        with ranked(page):
            page.select_option("#demo", "1")
        page.evaluate("() => document.querySelectorAll('#cards .drop').forEach(button => button.click())")
        expect(page.locator("#cards-empty")).to_be_visible()
        expect(page.locator("#copy")).to_be_disabled()
        with ranked(page):
            search(page, "candidate", "2028", "2028")
            page.keyboard.press("Enter")
        expect(page.locator("#cards > .card")).to_have_count(1)
