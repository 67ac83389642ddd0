"""Pages of other origins: which ones may call is a setting. Errors and preflights, and a real browser."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from playwright.sync_api import Browser, Error
from pydantic import ValidationError
from starlette.testclient import TestClient

from slatewise.bundle.ranker import Ranker
from slatewise.main import build_app
from slatewise.ranking.pipeline import Pipeline
from slatewise.ranking.registry import Registry
from slatewise.settings import Settings
from tests.conftest import Tiny
from tests.support.application import serve

SHOP = "https://shop.example"
PREFLIGHT = {"Origin": SHOP, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
BODY = {"candidates": {"item_ids": ["1", "2"]}}


def app_of(ranker: Ranker, **settings: Any) -> FastAPI:
    return build_app(Settings(**settings), {ranker.name: ranker})


@pytest.mark.parametrize("origins", [SHOP, f" http://localhost:3000 ,{SHOP},", "*"])
def test_allowed_page_gets_answers_and_preflights(ranker: Ranker, origins: str) -> None:
    with TestClient(app_of(ranker, cors_origins=origins, api_keys="key")) as client:
        for path in ("/rerank", "/score", "/models", "/no-such-path"):
            answer = client.options(path, headers=PREFLIGHT)
            assert answer.status_code == 200, "no key is needed"
            assert answer.headers["Access-Control-Allow-Origin"] in (SHOP, "*")
            assert answer.headers["Access-Control-Allow-Headers"] == "authorization"
            assert "POST" in answer.headers["Access-Control-Allow-Methods"]
        for headers, status in (({}, 401), ({"Authorization": "Bearer key"}, 200)):
            answer = client.post("/rerank", json=BODY, headers={"Origin": SHOP, **headers})
            assert answer.status_code == status
            assert answer.headers["Access-Control-Allow-Origin"] in (SHOP, "*")
            exposed = answer.headers["Access-Control-Expose-Headers"]
            assert exposed.split(", ") == [
                *("Server-Timing", "X-Request-ID", "Retry-After"),
                *("X-Slatewise-Warnings", "x-amzn-ErrorType", "Inference-Header-Content-Length"),
            ]
            assert "Access-Control-Allow-Credentials" not in answer.headers


def test_every_error_carries_the_headers(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError

    app = app_of(ranker, cors_origins=SHOP)
    with TestClient(app, raise_server_exceptions=False, headers={"Origin": SHOP}) as client:
        answers = [
            client.post("/rerank", content=b"{"),
            client.post("/rerank", json={}),
            client.post("/rerank", data={"a": "b"}),
            client.get("/rerank"),
            client.get("/no-such-path"),
        ]
        monkeypatch.setattr(Pipeline, "rank", fail)
        monkeypatch.setattr(Registry, "serving", fail)
        answers += [client.post("/score", json=BODY), client.get("/models")]
    assert [answer.status_code for answer in answers] == [400, 422, 415, 405, 404, 500, 500]
    for answer in answers:
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.headers["Access-Control-Allow-Origin"] == SHOP
        assert "Origin" in answer.headers["Vary"]


@pytest.mark.parametrize("origin", ["https://other.example", "http://shop.example", "https://shop.example:444", "null"])
def test_other_pages_get_no_headers(ranker: Ranker, origin: str) -> None:
    with TestClient(app_of(ranker, cors_origins=SHOP)) as client:
        answer = client.options("/rerank", headers=PREFLIGHT | {"Origin": origin})
        assert answer.status_code == 400 and "Access-Control-Allow-Origin" not in answer.headers
        answer = client.post("/rerank", json=BODY, headers={"Origin": origin})
        assert answer.status_code == 200 and "Access-Control-Allow-Origin" not in answer.headers


def test_without_the_setting_nothing_is_added(ranker: Ranker) -> None:
    with TestClient(app_of(ranker)) as client:
        answer = client.options("/rerank", headers=PREFLIGHT)
        assert answer.status_code == 405 and "Access-Control-Allow-Origin" not in answer.headers
        answer = client.post("/rerank", json=BODY, headers={"Origin": SHOP})
        assert not [name for name in answer.headers if name.startswith("access-control") or name == "vary"]


@pytest.mark.parametrize(
    "origins",
    [
        "http://localhost:3000",
        "https://a.example,http://[::1]:8080",
        "*",
        "",
        "capacitor://localhost",
        "http://10.0.0.1",
    ],
)
def test_origins_as_browsers_send_them_are_taken(origins: str) -> None:
    assert Settings(cors_origins=origins).origins() == tuple(filter(None, origins.split(",")))


@pytest.mark.parametrize(
    "origins",
    [
        "https://shop.example/",
        "https://shop.example/app",
        "https://shop.example?a=b",
        "https://shop.example#top",
        "https://user@shop.example",
        "https://Shop.example",
        "https://shop.example:443",
        "http://shop.example:80",
        "https://shop.example:",
        "https://*.shop.example",
        "https://b\u00fccher.example",
        "https://",
        "shop.example",
        "localhost:3000",
        "//shop.example",
        "null",
        f"{SHOP} {SHOP}",
        f"*,{SHOP}",
        f"{SHOP},https://shop.example/app",
    ],
)
def test_origins_that_no_browser_sends_are_refused(origins: str) -> None:
    with pytest.raises(ValidationError, match=r"must be \* or a list of origins|list it alone"):
        Settings(cors_origins=origins)


PAGE = """<!doctype html><title>shop</title><script>
async function ask(url, headers, body) {
    const answer = await fetch(url, {method: "POST", headers, body: JSON.stringify(body)});
    const shown = ["Server-Timing", "X-Request-ID", "Retry-After"].map((name) => answer.headers.get(name));
    return {status: answer.status, shown, body: await answer.json()};
}
</script>"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[str]:
    """The origin of a page on another port."""
    (tmp_path / "index.html").write_text(PAGE)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask_from(browser: Browser, origin: str, client: httpx.Client, key: str) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", "X-Request-ID": "from-a-page"}
    with browser.new_page() as page:
        page.goto(f"{origin}/index.html")
        found: dict[str, Any] = page.evaluate("(given) => ask(...given)", [f"{client.base_url}/rerank", headers, BODY])
        return found


def test_page_of_another_origin_calls_in_a_browser(browser: Browser, shop: str, tiny: Tiny) -> None:
    with serve(Settings(bundles=tiny.root, api_keys="key", cors_origins=shop)) as client:  # type: ignore[arg-type]
        found = ask_from(browser, shop, client, "key")
        assert found["status"] == 200 and found["body"]["results"]["index"]
        assert "total;dur=" in found["shown"][0] and found["shown"][1] == "from-a-page"
        refused = ask_from(browser, shop, client, "wrong")
        assert refused["status"] == 401 and refused["body"]["title"] == "Unauthorized", "the page reads the error"


def test_page_of_another_origin_is_refused_in_a_browser(browser: Browser, shop: str, client: httpx.Client) -> None:
    with pytest.raises(Error, match="Failed to fetch"):
        ask_from(browser, shop, client, "key")
