"""The page in a real browser: what it shows equals what the API answers, by mouse and by keyboard."""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from slatewise.settings import Settings
from tests.page.support import BUNDLE, ask, compared, open_page, ranked, ready, search, shown_ids
from tests.support.application import serve

DISPLAY = json.loads((BUNDLE / "display.json").read_text())
WIDE = {"width": 1280, "height": 800}
COUNT_MOVES = """
window.moves = 0;
const animate = Element.prototype.animate;
Element.prototype.animate = function (frames, ...rest) {
  if (frames[0].transform) window.moves += 1;
  return animate.call(this, frames, ...rest);
};"""


@pytest.fixture(scope="module")
def demo() -> Iterator[httpx.Client]:
    with serve(Settings(bundles=BUNDLE.parents[1])) as client:
        yield client


@pytest.fixture(scope="module")
def example(demo: httpx.Client) -> dict[str, Any]:
    body: dict[str, Any] = demo.get("/models/movielens/examples").json()["examples"][0]
    return body


def test_slate_and_comparison_equal_the_api(browser: Browser, demo: httpx.Client, example: dict[str, Any]) -> None:
    with open_page(browser, demo, viewport=WIDE) as page:
        ready(page)
        answer = ask(demo, example)
        assert shown_ids(page) == answer["results"]["item_ids"]
        first = page.locator("#cards > .card").first
        best = answer["results"]["item_ids"][0]
        expect(first).to_contain_text(DISPLAY[best]["title"])
        expect(first).to_contain_text(", ".join(DISPLAY[best]["genres"]))
        bars = first.locator(".bar .value").all_inner_texts()
        values = [answer["results"]["scores"][0], *(column[0] for column in answer["results"]["heads"].values())]
        assert bars == [f"{value:.3f}" for value in values]
        compared(page)
        heads = page.locator("#compare thead [data-exit]")
        columns = [(head.get_attribute("data-exit"), head.get_attribute("data-variant")) for head in heads.all()]
        variants = demo.get("/models/movielens").json()["variants"]
        assert columns == [*((exit, "int8") for exit in ("dot", "point", "set")), *(("set", name) for name in variants)]
        for text in page.locator("#compare thead .ms").all_inner_texts():
            assert float(text.removesuffix(" ms")) > 0
        page.click("#rows")
        rows = page.evaluate(
            "() => [...document.querySelectorAll('#compare tbody tr')].map("
            "row => [...row.querySelectorAll('td')].map(cell => [cell.dataset.place, cell.innerText]))"
        )
        assert len(rows) == 24
        for k, (exit, variant) in enumerate(columns):
            other = ask(demo, example | {"exit": exit, "variant": variant})["results"]["item_ids"]
            assert [int(row[k][0]) for row in rows] == [other.index(item) + 1 for item in answer["results"]["item_ids"]]
            for place, row in enumerate(rows):
                move = place + 1 - int(row[k][0])
                mark = f"{'▲' if move > 0 else '▼'}{abs(move)}" if move else ""
                assert row[k][1].split("\n")[0].split(" ")[0].startswith(row[k][0]) and mark in row[k][1]


def test_dropped_event_changes_the_order_as_in_the_api(
    browser: Browser, demo: httpx.Client, example: dict[str, Any]
) -> None:
    with open_page(browser, demo, viewport=WIDE) as page:
        ready(page)
        expect(page.locator("#history > .chip")).to_have_count(40)
        for dropped in range(3):
            with ranked(page) as body:
                page.locator("#history > .chip .drop").first.click()
            history = {name: column[dropped + 1 :] for name, column in example["history"].items()}
            assert {name: body[name] for name in ("user", "history", "candidates")} == {
                "user": example["user"], "history": history, "candidates": example["candidates"]
            }  # fmt: skip
            assert shown_ids(page) == ask(demo, body)["results"]["item_ids"]
        with ranked(page) as body:
            page.click("#clear")
        assert body["history"] == {"item_ids": []} and "request_time" not in body
        assert shown_ids(page) == ask(demo, body)["results"]["item_ids"]
        expect(page.locator("#history-empty")).to_be_visible()


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_cards_move_unless_less_motion_is_wanted(browser: Browser, demo: httpx.Client, motion: str) -> None:
    with open_page(browser, demo, reduced_motion=motion) as page:
        page.add_init_script(COUNT_MOVES)
        page.reload()
        ready(page)
        before = shown_ids(page)
        page.evaluate("() => { window.moves = 0; }")
        with ranked(page) as body:
            page.select_option("#exit", "dot")
        assert body["exit"] == "dot"
        after = shown_ids(page)
        moved = sum(a != b for a, b in zip(before, after, strict=True))
        assert moved > 10
        found = page.evaluate("() => window.moves")
        assert found >= moved if motion == "no-preference" else found == 0
        mark = page.locator("#cards .move").first.inner_text()
        assert mark[0] in "▲▼"


def test_without_a_neighbour_the_others_change(browser: Browser, demo: httpx.Client, example: dict[str, Any]) -> None:
    with open_page(browser, demo) as page:
        ready(page)
        answer = ask(demo, example)
        gone = answer["results"]["item_ids"][1]
        button = page.locator(f"#cards > [data-id='{gone}'] .gone")
        with ranked(page) as body:
            button.click()
        expect(page.locator("#without")).to_contain_text(f"Without {DISPLAY[gone]['title']}")
        assert gone not in body["candidates"]["item_ids"] and len(body["candidates"]["item_ids"]) == 23
        rest = ask(demo, body)["results"]
        shown = shown_ids(page)
        assert shown.index(gone) == 1 and [item for item in shown if item != gone] == rest["item_ids"]
        assert button.get_attribute("aria-pressed") == "true"
        before = dict(zip(answer["results"]["item_ids"], answer["results"]["scores"], strict=True))
        for item, score in list(zip(rest["item_ids"], rest["scores"], strict=True))[:5]:
            text = page.locator(f"#cards > [data-id='{item}'] .delta").inner_text()
            assert float(text.replace("\N{MINUS SIGN}", "-")) == pytest.approx(score - before[item], abs=6e-5)
        button.click()
        expect(page.locator("#without")).to_be_hidden()
        assert shown_ids(page) == answer["results"]["item_ids"]


def test_user_is_chosen_or_typed(browser: Browser, demo: httpx.Client) -> None:
    examples = demo.get("/models/movielens/examples").json()["examples"]
    with open_page(browser, demo) as page:
        ready(page)
        with ranked(page) as body:
            page.select_option("#demo", label="small:99 (6)")
        readme = next(each for each in examples if each["user"] == "small:99")
        assert {name: body[name] for name in readme} == readme
        assert shown_ids(page) == ask(demo, readme)["results"]["item_ids"]
        expect(page.locator("#cards > [data-id='no-such-film']")).to_contain_text("unknown id")
        with ranked(page) as body:
            page.fill("#user", "somebody-new")
            page.keyboard.press("Enter")
        assert body["user"] == "somebody-new" and "history" not in body
        expect(page.locator("#facts")).to_contain_text("user vector default")


def test_keyboard_alone_reaches_everything(browser: Browser, demo: httpx.Client) -> None:
    with open_page(browser, demo, viewport=WIDE) as page:
        ready(page)
        with ranked(page):
            page.select_option("#demo", label="small:99 (6)")  # few cards to walk through
        reached = set()
        page.evaluate("() => document.activeElement.blur()")
        for _ in range(100):
            page.keyboard.press("Tab")
            found = page.evaluate(
                "() => { const e = document.activeElement, s = getComputedStyle(e);"
                " return [e.id || e.className, e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.innerText,"
                " s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) > 0 && e.matches(':focus-visible')]; }"
            )
            assert found[1] and (found[2] or found[0] == ""), f"{found} has no name or no visible focus"
            reached.add(found[0].split(" ")[-1])
            if "code" in reached:
                break
        assert {"demo", "user", "clear", "history", "exit", "variant", "gone", "drop", "up", "down", "compare"} <= (
            reached | {"history"}
        )
        with ranked(page):
            page.select_option("#demo", "0")
        page.get_by_placeholder("Add a candidate").focus()
        page.keyboard.type("toy story")
        expect(page.get_by_role("option", name="Toy Story (1995)")).to_be_visible()
        expect(page.locator(".search [aria-selected=true]")).to_have_count(0)
        page.keyboard.press("ArrowDown")
        expect(page.locator(".search [aria-selected=true]")).to_contain_text("Toy Story (1995)")
        page.keyboard.press("ArrowDown")
        expect(page.locator(".search [aria-selected=true]")).to_contain_text("Toy Story 2")
        with ranked(page) as body:
            page.keyboard.press("Enter")
        assert body["candidates"]["item_ids"][-1] == "3114"
        expect(page.locator("#announce")).to_contain_text("New order: 1 ")
        chip = page.locator("#history > .chip").nth(1)
        name = chip.locator(".name").inner_text()
        chip.locator(".drop").focus()
        with ranked(page) as moved:
            page.keyboard.press("Alt+ArrowUp")
        ids = body["history"]["item_ids"]
        assert moved["history"]["item_ids"] == [ids[1], ids[0], *ids[2:]]
        assert moved["history"]["timestamps"] == body["history"]["timestamps"]
        assert page.evaluate("() => document.activeElement.getAttribute('aria-label')") == f"Drop {name}"
        with ranked(page) as dropped:
            page.keyboard.press("Delete")
        assert dropped["history"]["item_ids"] == [ids[0], *ids[2:]]
        assert page.evaluate("() => document.activeElement.closest('.chip') !== null")


def test_added_event_is_the_newest(browser: Browser, demo: httpx.Client) -> None:
    with open_page(browser, demo) as page:
        ready(page)
        page.select_option("#new-action", "love")
        search(page, "event", "2028", "Saving Private Ryan")
        with ranked(page) as body:
            page.keyboard.press("Enter")
        assert body["history"]["item_ids"][-1] == "2028" and body["history"]["actions"][-1] == "love"
        times = body["history"]["timestamps"]
        assert times == sorted(times) and times[-1] > times[-2] and body["request_time"] >= times[-1]
        assert ask(demo, body)["history"]["reordered"] == 0


def test_no_width_scrolls_sideways(browser: Browser, demo: httpx.Client) -> None:
    with open_page(browser, demo, viewport={"width": 360, "height": 800}) as page:
        ready(page)
        compared(page)
        for width in (320, 360, 768, 1024, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("() => document.documentElement.scrollWidth") <= width
            for selector in ("#slate", "#compare", "#code", ".chip", ".card"):
                box = page.locator(selector).first.bounding_box()
                assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width


CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255)).reduce(
    (sum, v, k) => sum + v * [.2126, .7152, .0722][k], 0);
  const over = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const low = [];
  for (const element of document.querySelectorAll('body *')) {
    const text = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    const hidden = !element.checkVisibility({opacityProperty: true}) || element.closest('.sr, .skip, :disabled, svg');
    if (!text || hidden) continue;
    const grounds = [];
    for (let each = element; each; each = each.parentElement) grounds.unshift(getComputedStyle(each).backgroundColor);
    const style = getComputedStyle(element);
    const ground = over(['#fff', ...grounds]), ink = over(['#fff', ...grounds, style.color]);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) low.push([element.className || element.tagName, element.textContent, ratio]);
  }
  return low;
}"""


def test_both_colour_schemes_have_contrast(browser: Browser, demo: httpx.Client) -> None:
    def ground(page: Page) -> float:
        red: float = page.evaluate(
            "() => Number(getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/))"
        )
        return red

    with open_page(browser, demo, color_scheme="light", viewport=WIDE) as page:
        ready(page)
        compared(page)
        assert ground(page) > 128 and page.evaluate(CONTRAST) == []
        page.emulate_media(color_scheme="dark")
        assert ground(page) < 128 and page.evaluate(CONTRAST) == []
        page.emulate_media(color_scheme="light")
        page.click("#theme")
        assert ground(page) < 128
        page.reload()
        ready(page)
        assert ground(page) < 128, "the choice is kept"
        page.click("#theme")
        assert ground(page) > 128


def test_calls_on_screen_work_as_they_stand(browser: Browser, demo: httpx.Client) -> None:
    with open_page(browser, demo, permissions=["clipboard-read", "clipboard-write"]) as page:
        ready(page)
        search(page, "candidate", 'it\'s "a\\b" ü😀', "it's")
        with ranked(page) as body:
            page.keyboard.press("Enter")
        page.click("#copy")
        expect(page.locator("#copy")).to_have_text("Copied")
        command = shlex.split(page.evaluate("() => navigator.clipboard.readText()"))
        assert command[:3] == ["curl", "-s", f"{demo.base_url}/rerank".replace("//rerank", "/rerank")]
        assert json.loads(command[command.index("-d") + 1]) == body
        page.get_by_role("tab", name="curl").focus()
        page.keyboard.press("ArrowRight")
        tree = ast.parse(page.locator("#code").inner_text())
        call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.keywords)
        assert {each.arg: ast.literal_eval(each.value) for each in call.keywords} == body


def test_model_card_and_live_latency(browser: Browser, demo: httpx.Client) -> None:
    with open_page(browser, demo, viewport=WIDE) as page:
        ready(page)
        report = json.loads((BUNDLE / "report.json").read_text())
        mean, low, high = report["slates"]["set"]["ndcg10"]
        row = page.locator("#model .quality").nth(1).locator("tr", has_text="set")
        expect(row).to_contain_text(f"{mean:.3f} {low:.3f}\N{EN DASH}{high:.3f}")
        expect(page.locator("#live-details")).to_contain_text("in the last", timeout=15_000)
        assert float(page.locator("#live b").first.inner_text().split(" ")[0]) > 0


def test_quantiles_of_a_histogram(browser: Browser, demo: httpx.Client) -> None:
    """Against numpy on the values themselves: within one bucket of the truth."""
    edges = [0.001, 0.002, 0.005, 0.01, 0.05]
    values = np.random.default_rng(0).lognormal(-6, 1, 500)
    lines = [
        f'slatewise_request_duration_seconds_bucket{{endpoint="/rerank",le="{edge}",ranker="a\\"b",'
        f'variant="{variant}"}} '
        f"{(values[variant::2] <= edge).sum()}"
        for edge in [*edges, "+Inf"]
        for variant in (0, 1)
        if edge != "+Inf"
    ]
    lines += [
        f'slatewise_request_duration_seconds_bucket{{endpoint="/rerank",le="+Inf",ranker="a\\"b",variant="{v}"}} 250.0'
        for v in (0, 1)
    ]
    with open_page(browser, demo) as page:
        source = page.locator("script[type=module]").get_attribute("src") or ""
        found = page.evaluate(
            "async ([source, text]) => { const m = await import(new URL(source, document.baseURI).href);"
            " const b = m.bucketsOf(text, 'a\\\\\"b'); return [...[0, .5, .9, .99].map(q => m.quantile(b, q)),"
            " m.quantile(new Map(), .5), m.quantile(m.bucketsOf(text, 'other'), .5)]; }",
            [source.replace("main.js", "model.js"), "\n".join(lines)],
        )
    assert found[4:] == [None, None]
    for share, quantile in zip((0.5, 0.9, 0.99), found[1:4], strict=True):
        truth = np.quantile(values, share)
        above = min((edge for edge in edges if edge >= truth), default=edges[-1])
        below = max((edge for edge in [0, *edges] if edge <= truth), default=0)
        assert below <= quantile <= above
