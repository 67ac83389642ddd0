"""The page's files: headers, caching, keys, and the setting that switches the page off."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from slatewise.bundle.loader import load_bundle
from slatewise.bundle.ranker import Ranker
from slatewise.http.page import FOLDER, TYPES
from slatewise.main import build_app
from slatewise.settings import Settings
from tests.page.support import write_bundle


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    return load_bundle(write_bundle(tmp_path_factory.mktemp("bundle"), "movies", None))


def get(ranker: Ranker, *paths: str, settings: dict[str, Any] | None = None, **headers: str) -> list[httpx.Response]:
    app = build_app(Settings(**(settings or {})), {ranker.name: ranker})

    async def ask() -> list[httpx.Response]:
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            return [await client.get(f"http://here{path}", headers=headers) for path in paths]

    return asyncio.run(ask())


def paths_in(index: str) -> list[str]:
    return [f"/{path}" for path in sorted(set(re.findall(r'"(page/[^"]+)"', index)))]


def test_index_is_asked_for_each_time_and_names_its_files(ranker: Ranker) -> None:
    (index,) = get(ranker, "/")
    assert index.status_code == 200 and index.headers["content-type"].startswith("text/html")
    assert index.headers["cache-control"] == "no-cache"
    (again,) = get(ranker, "/", **{"If-None-Match": index.headers["etag"]})
    assert again.status_code == 304 and not again.content
    files = get(ranker, *paths_in(index.text))
    assert len(files) == 3
    for file in files:
        assert file.status_code == 200 and "immutable" in file.headers["cache-control"]


def test_every_file_has_its_type_and_the_policy(ranker: Ranker) -> None:
    (index,) = get(ranker, "/")
    folder = paths_in(index.text)[0].rsplit("/", 1)[0]
    names = [path.name for path in FOLDER.iterdir() if path.name != "index.html"]
    assert {"main.js", "style.css"} <= set(names)
    for name, file in zip(names, get(ranker, *(f"{folder}/{name}" for name in names)), strict=True):
        assert file.headers["content-type"].startswith(TYPES[Path(name).suffix])
        assert file.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.strip().partition(" ")[::2] for part in index.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'" and policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in index.headers["content-security-policy"]


def test_files_name_no_other_host() -> None:
    for path in FOLDER.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|DOMParser", text), (
            path.name
        )


@pytest.mark.parametrize(
    "path", ["/page", "/page/", "/page/x/main.js", "/page/{}/../../auth.py", "/page/{}/index.html", "/page/{}/x"]
)
def test_other_paths_are_404(ranker: Ranker, path: str) -> None:
    (index,) = get(ranker, "/")
    digest = paths_in(index.text)[0].split("/")[2]
    (answer,) = get(ranker, path.format(digest))
    assert answer.status_code == 404


def test_page_is_open_and_its_data_needs_the_key(ranker: Ranker) -> None:
    keys = {"api_keys": "key"}
    index, models, items, examples = get(
        ranker, "/", "/models", "/models/movies/items?ids=1", "/models/movies/examples", settings=keys
    )
    assert [index.status_code, models.status_code, items.status_code, examples.status_code] == [200, 401, 401, 401]
    assert all(file.status_code == 200 for file in get(ranker, *paths_in(index.text), settings=keys))
    found = get(ranker, "/models", "/models/movies/items?ids=1", settings=keys, Authorization="Bearer key")
    assert [answer.status_code for answer in found] == [200, 200]


def test_page_can_be_switched_off(ranker: Ranker) -> None:
    (index,) = get(ranker, "/")
    for answer in get(ranker, "/", *paths_in(index.text), settings={"page": False}):
        assert answer.status_code == 404
