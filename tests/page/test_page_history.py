"""The page of a user with stored events: what it ranks by, how one ranks without, and which clock a call has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from slatewise.settings import Settings
from tests.page.support import BUNDLE, ask, open_page, ranked, ready, search, shown_ids
from tests.support.application import serve

DISPLAY = json.loads((BUNDLE / "display.json").read_text())
STORED = ["1196", "858", "no-such-film"]  # not in the slate of any example


@pytest.fixture(scope="module")
def demo() -> Iterator[httpx.Client]:
    with serve(Settings(bundles=BUNDLE.parents[1], variants="int8")) as client:
        events = [{"user": "u42", "item_id": item, "action": "like"} for item in STORED]
        assert client.post("/events", json={"events": events}).json()["accepted"] == 3
        yield client


def choose_user(page: Page, user: str) -> dict[str, Any]:
    with ranked(page) as body:
        page.fill("#user", user)
        page.keyboard.press("Enter")
    return body


def test_stored_events_are_told_and_can_be_left_out(browser: Browser, demo: httpx.Client) -> None:
    with open_page(browser, demo) as page:
        ready(page)
        stored = choose_user(page, "u42")
        assert stored["user"] == "u42" and not {"history", "request_time"} & set(stored)
        expect(page.locator("#history-empty")).to_contain_text(
            "Ranked by 3 stored events of u42, 1 of an unknown item."
        )
        expect(page.locator("#events")).to_have_text("3 stored")
        expect(page.locator("#facts")).to_contain_text("history: 3 stored events, encoded")
        assert shown_ids(page) == ask(demo, stored)["results"]["item_ids"]

        with ranked(page) as empty:
            page.click("#clear")
        assert empty["history"] == {"item_ids": []} and empty["user"] == "u42"
        expect(page.locator("#history-empty")).to_have_text(
            "An empty history is sent: ranked without events. The 3 stored events of u42 are not read."
        )
        expect(page.locator("#events")).to_have_text("0")
        expect(page.locator("#facts")).to_contain_text("no events read")
        assert shown_ids(page) == ask(demo, empty)["results"]["item_ids"] != ask(demo, stored)["results"]["item_ids"]

        with ranked(page) as again:
            page.click("#stored")
        assert again == stored and page.locator("#stored").is_hidden()
        expect(page.locator("#events")).to_have_text("3 stored")


def test_added_event_says_what_it_replaces(browser: Browser, demo: httpx.Client) -> None:
    with open_page(browser, demo) as page:
        ready(page)
        choose_user(page, "u42")
        expect(page.locator("#history-empty")).to_contain_text("An event that you add is sent instead of them")
        search(page, "event", "2028", "Saving Private Ryan")
        with ranked(page) as body:
            page.keyboard.press("Enter")
        assert body["history"]["item_ids"] == ["2028"] and "request_time" not in body
        expect(page.locator("#history-note")).to_have_text(
            "Ranked by the events below. The 3 stored events of u42 are not read."
        )
        with ranked(page) as body:
            page.locator("#history .drop").click()
        assert body["history"] == {"item_ids": []}
        expect(page.locator("#history-note")).to_have_text("")
        expect(page.locator("#history-empty")).to_contain_text("An empty history is sent")


def test_user_without_stored_events_is_told_so(browser: Browser, demo: httpx.Client) -> None:
    with open_page(browser, demo) as page:
        ready(page)
        assert page.locator("#history-note").inner_text() == "", "a demo user's events are those on screen"
        assert "history" not in choose_user(page, "somebody-new")
        expect(page.locator("#history-empty")).to_contain_text("No stored events of somebody-new")
        expect(page.locator("#events")).to_have_text("0")
        assert not {"history", "user"} & set(choose_user(page, ""))
        expect(page.locator("#history-empty")).to_contain_text("Without a user and events")
        expect(page.locator("#stored")).to_be_hidden()


def test_explanation_of_stored_events_has_titles(browser: Browser, demo: httpx.Client) -> None:
    with open_page(browser, demo) as page:
        ready(page)
        choose_user(page, "u42")
        expect(page.locator("#why-legend")).to_be_hidden()
        with ranked(page) as body:
            page.click("#explain")
        named = {item for each in ask(demo, body)["explanations"] for item in each["events"]["item_ids"]}
        assert set(STORED) & named
        expect(page.locator("#why-legend")).to_contain_text("by so many places")
        expect(page.locator("#why-legend")).to_contain_text("in brackets by so much score")
        text = " ".join(page.locator("#cards .why").all_inner_texts())
        assert DISPLAY["1196"]["title"] in text or DISPLAY["858"]["title"] in text
        assert ") 1196" not in text and ") 858" not in text


def test_request_time_goes_with_the_events_of_the_example(browser: Browser, demo: httpx.Client) -> None:
    example = demo.get("/models/movielens/examples").json()["examples"][-1]
    assert len(example["history"]["item_ids"]) == 6
    with open_page(browser, demo) as page:
        ready(page)
        with ranked(page) as body:
            page.select_option("#demo", label=f"{example['user']} (6)")
        assert body["request_time"] == example["request_time"]
        for left in range(5, -1, -1):
            with ranked(page) as body:
                page.locator("#history .drop").first.click()
            assert ("request_time" in body) == (left > 0)
        assert body["history"] == {"item_ids": []} and '"request_time"' not in page.locator("#code").inner_text()
        with ranked(page) as body:
            page.click("#reset")
        assert body["request_time"] == example["request_time"]
