"""The prose of code and documents: plain English, measured by `.ci/prose.py`."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 5.0  # per 1,000 words
CODE = ("app", "models/slatewise_train", "loadtest", "tests")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "models/LOG.md", "examples")

spec = importlib.util.spec_from_file_location("prose", ROOT / ".ci" / "prose.py")
assert spec is not None and spec.loader is not None
prose = importlib.util.module_from_spec(spec)
sys.modules["prose"] = prose  # dataclasses look their module up by name
spec.loader.exec_module(prose)


@pytest.mark.parametrize("folder", CODE)
def test_code_prose_is_below_the_limit(folder: str) -> None:
    assert prose.total([ROOT / folder]).rate <= LIMIT


def test_documents_are_below_the_limit() -> None:
    assert prose.total([ROOT / name for name in DOCUMENTS]).rate <= LIMIT


def test_the_readme_is_short() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 150
    lengths = [len(prose.WORD.findall(s)) for s in prose.sentences(prose.prose(readme))]
    assert statistics.median(length for length in lengths if length > 1) < 20


def test_only_prose_counts_in_markdown(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("# None here\n\n| who | where |\n\n`what` [one](what.md) two\n\n```\nnobody\n```\n")
    assert prose.count(path) == prose.Count(words=4, found=1)


def test_docstrings_and_comments_count_in_python(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text('"""What is."""\nwhat = None  # who asks\nNAME = "where"  # noqa: E501\n')
    assert prose.count(path) == prose.Count(words=4, found=2)


def test_long_sentences_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("One two three. Four five.\n\n- six seven eight nine\n")
    assert prose.long_sentences(path, 2) == ["One two three.", "six seven eight nine"]


@pytest.mark.parametrize(("limit", "code"), [("0", 1), ("1000", 0)])
def test_exit_code_follows_the_limit(tmp_path: Path, limit: str, code: int) -> None:
    path = tmp_path / "a.md"
    path.write_text("who\n")
    assert prose.main([str(path), "--limit", limit]) == code
