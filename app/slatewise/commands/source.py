"""The choice between a running server and a bundle in this process, for the commands that rank.

Called by: `rank.py` and `batch.py`. Calls: `client/client.py`, or `local/ranker.py`.
"""

from __future__ import annotations

import argparse
from typing import Any, Protocol, Self, Unpack

import slatewise
from slatewise.client.body import Members, Options
from slatewise.client.client import Client
from slatewise.client.results import Ranking


class Source(Protocol):
    """A client, or a ranker in this process."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def rerank(self, **members: Unpack[Members]) -> Ranking: ...
    def rank_many(
        self, frame: Any, *, histories: Any = None, concurrency: int = 1, **options: Unpack[Options]
    ) -> Any: ...
    def titles(self, ranker: str, item_ids: list[str]) -> dict[str, str]: ...


def add_source(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--url", help="server to ask; default: SLATEWISE_URL, or else http://127.0.0.1:8000. Key: SLATEWISE_API_KEY"
    )
    group.add_argument("--bundle", metavar="PATH", help="rank in this process, by this bundle (a folder or a name)")
    parser.add_argument("--ranker", help="name of the ranker; needed if the server has several")
    parser.add_argument("--variant", help="variant of the ranker; default: the bundle's")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds of one request; default: %(default)s")


def open_source(arguments: argparse.Namespace, threads: int = 0) -> Source:
    """Raises ManifestError or ValueError."""
    if arguments.bundle is not None:
        return slatewise.load(arguments.bundle, arguments.variant, threads=threads)
    return Client(arguments.url, timeout=arguments.timeout)


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the members of every request."""
    return {"ranker": arguments.ranker, "variant": arguments.variant}
