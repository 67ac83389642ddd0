#!/usr/bin/env python3
"""Measures the prose of the repository: .ci/prose.py [--limit 5] [--longest 35] [--show] PATH...

Prose is the docstrings and comments of Python files and the text of Markdown files. Code, inline code, tables and the
targets of links do not count. For each PATH (a file or a folder) the script prints how often the words in WORDS occur
per 1,000 words. Many of them are a sign of free relatives ("what is kept"), which a stranger reads slowly.

Exit code 1: a PATH is above the limit.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WORDS = re.compile(r"\b(?:what|who|whom|where|nobody|none)\b", re.IGNORECASE)
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
DIRECTIVE = re.compile(r"#\s*(?:noqa|type:|fmt:|pragma|!)")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")


@dataclass(frozen=True)
class Count:
    """Counted words of some prose."""

    words: int = 0
    found: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.words + other.words, self.found + other.found)

    @property
    def rate(self) -> float:
        """Found words per 1,000 words."""
        return 1_000 * self.found / max(1, self.words)


def files_below(path: Path) -> list[Path]:
    """Python and Markdown files: the path itself, or those below a folder, without hidden folders and test data."""
    if path.is_file():
        return [path]
    found = (file for file in path.rglob("*") if file.suffix in (".py", ".md"))
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))


def prose(path: Path) -> str:
    """The prose of one file, without inline code."""
    text = path.read_text()
    parts = [*docstrings(text), *comments(text)] if path.suffix == ".py" else [markdown(text)]
    return re.sub(r"`[^`\n]*`", " ", "\n\n".join(parts))


def docstrings(source: str) -> list[str]:
    nodes = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [text for node in nodes if (text := ast.get_docstring(node))]


def comments(source: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT and not DIRECTIVE.match(t.string)]


def markdown(text: str) -> str:
    """Headings, paragraphs and lists: no fenced code, tables, HTML or targets of links."""
    text = re.sub(r"```.*?```", "\n", text, flags=re.DOTALL)
    text = re.sub(r"<[^>\n]+>", " ", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("|"))


def count(path: Path) -> Count:
    text = prose(path)
    return Count(len(WORD.findall(text)), len(WORDS.findall(text)))


def total(paths: list[Path]) -> Count:
    """All files of several paths together."""
    return sum((count(file) for path in paths for file in files_below(path)), Count())


def sentences(text: str) -> Iterator[str]:
    """Sentences on one line each; a list item or a heading is one as well."""
    lines = re.sub(r"^\s*(?:[-*] |\d+\. |#+ )", "\n\n", text, flags=re.MULTILINE)
    for sentence in SENTENCE_END.split(lines):
        if sentence.strip():
            yield " ".join(sentence.split())


def long_sentences(path: Path, longest: int) -> list[str]:
    return [s for s in sentences(prose(path)) if len(WORD.findall(s)) > longest]


def contexts(text: str) -> Iterator[str]:
    """Each found word with the text around it."""
    for match in WORDS.finditer(text):
        yield " ".join(text[max(0, match.start() - 50) : match.end() + 40].split())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", help="files or folders; the limit holds for each of them")
    parser.add_argument("--limit", type=float, default=5.0, help="found words per 1,000 words; default: %(default)s")
    parser.add_argument("--longest", type=int, default=0, help="list sentences with more words than this; 0: no list")
    parser.add_argument("--show", action="store_true", help="print each found word with the text around it")
    args = parser.parse_args(argv)
    above = False
    for path in args.paths:
        whole = Count()
        for file in files_below(path):
            counted = count(file)
            whole += counted
            if counted.found:
                print(f"{file}: {counted.found} in {counted.words} words, {counted.rate:.1f} per 1,000")
            for context in contexts(prose(file)) if args.show else ():
                print(f"    ...{context}...")
            for sentence in long_sentences(file, args.longest) if args.longest else ():
                print(f"{file}: {len(WORD.findall(sentence))} words: {sentence}")
        print(f"{path}: {whole.found} in {whole.words} words, {whole.rate:.1f} per 1,000 (limit {args.limit:g})")
        above |= whole.rate > args.limit
    return int(above)


if __name__ == "__main__":
    sys.exit(main())
