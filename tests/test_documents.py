"""The documents: links lead somewhere, and generated tables are those of the committed bundle."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from slatewise_train.evaluation.report import quality_table

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"), ROOT / "models/LOG.md"]
)
DEMO = max((ROOT / "models/bundles/movielens").glob("[0-9]*"), key=lambda folder: int(folder.name))


def text_of(path: Path) -> str:
    """Markdown without fenced code."""
    return re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text_of(path)) if not link.startswith(("http", "mailto"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path: Path) -> None:
    broken = []
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_installs_work_without_a_release() -> None:
    """No release is on PyPI, so documents install from a clone. The torch that they name is that of pyproject.toml."""
    texts = [path.read_text() for path in (*DOCUMENTS, *(ROOT / "examples").glob("*.ipynb"))]
    installs = [line for text in texts for line in re.findall(r"pip install .*", text)]
    assert any("'.[serve]'" in line for line in installs)
    assert [line for line in installs if re.search(r"install '?slatewise\b", line)] == []
    pinned = re.search(r'"(torch==[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned is not None
    assert {name for line in installs for name in re.findall(r"torch==[\d.]+", line)} == {pinned[1]}


def test_the_index_names_every_document() -> None:
    named = {(ROOT / "docs" / link).resolve() for link in links(ROOT / "docs/index.md")}
    written = {path for path in (ROOT / "docs").glob("*.md") if path.name != "index.md"}
    assert written <= named


def test_quality_tables_are_those_of_the_demo() -> None:
    report = json.loads((DEMO / "report.json").read_text())
    for table in quality_table(report).split("\n\n"):
        assert table in (ROOT / "docs/quality.md").read_text()
