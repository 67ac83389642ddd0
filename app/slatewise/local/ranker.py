"""`slatewise.load`: a bundle as a ranker in this process, with the methods and the errors of the client.

A request takes the path of a server's request without HTTP: the same checks, pipeline and members of the answer, so
the scores are equal. Meta-embeddings come from the bundle; Redis is not asked.

Called by: users, and `commands/`. Calls: `background.py`, `bundle/loader.py`, `client/` for requests and results.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, Unpack

from pydantic import ValidationError

from slatewise.bundle.loader import load_bundle
from slatewise.bundle.manifest import ManifestError, bundle_folder
from slatewise.bundle.ranker import Ranker
from slatewise.bundle.trust import keys_of_environment
from slatewise.client.body import Members, Options, rank_body, to_json
from slatewise.client.errors import SlatewiseError, from_problem
from slatewise.client.results import Ranking
from slatewise.errors import RankingError
from slatewise.http.mistakes import wrong_request
from slatewise.http.models import model_card, model_name
from slatewise.http.problems import new_request_id
from slatewise.local.background import LIMITS, Background
from slatewise.process import cpu_quota
from slatewise.ranking.validation import unpruned
from slatewise.schemas import RankRequest
from slatewise.settings import default_bundles


def load(path: str | Path = "movielens", variant: str | None = None, *, threads: int = 0) -> LocalRanker:
    """Load a bundle as a ranker in this process.

    path: a bundle, a ranker's folder (its newest version), or the name of a ranker in the default folder of bundles,
    such as the demo "movielens". variant: the only one to load; default: all, as the server does. threads: that run the
    model; 0: the CPU quota. If the variable SLATEWISE_BUNDLE_KEYS is set, one of its keys must have signed the bundle.
    Raises ManifestError, or SettingsError for wrong keys.
    """
    keys = keys_of_environment()
    folder = find_bundle(path)
    return LocalRanker(load_bundle(folder, () if variant is None else (variant,), keys), threads or cpu_quota())


def find_bundle(path: str | Path) -> Path:
    """Return the folder of a bundle. Raises ManifestError if there is none."""
    given = Path(path).expanduser()
    named = default_bundles() / given
    if not given.is_dir() and len(given.parts) == 1 and named.is_dir():
        return bundle_folder(named)
    if not given.is_dir():
        names = ", ".join(sorted(each.name for each in default_bundles().glob("*") if each.is_dir()))
        raise ManifestError(f"{given}: no such folder, and no ranker of this name; known: {names or 'none'}")
    return bundle_folder(given)


class LocalRanker:
    """One ranker in this process. Several threads may share it, and it may be used inside a running event loop.

    `close()` or the end of its `with` block frees its threads; so does the garbage collector. The methods are those of
    `Client`, except for those that need a server: it keeps no events and no users.
    """

    def __init__(self, ranker: Ranker, threads: int = 1, history_cache_mb: float = 64.0) -> None:
        self._ranker = ranker
        self._background = Background(ranker, threads, int(history_cache_mb * 2**20))
        self._finalizer = weakref.finalize(self, self._background.stop)
        self._finalizer.atexit = False  # too late for asyncio's threads; the process ends them

    def __repr__(self) -> str:
        return f"LocalRanker({self._ranker.name!r} version {self._ranker.manifest.version})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the threads. Requests of other threads that are not answered yet raise ServerFault."""
        self._finalizer()
        self._background.join()

    def rerank(self, **members: Unpack[Members]) -> Ranking:
        """Rank the candidates, best first. The members are those of the request, all by name. Raises SlatewiseError."""
        return self._rank(members, by_score=True)

    def score(self, **members: Unpack[Members]) -> Ranking:
        """Score the candidates in input order; `ranks` has their places. Raises SlatewiseError."""
        return self._rank(members, by_score=False)

    def rank_many(
        self,
        frame: Any,
        *,
        histories: Any = None,
        user: str = "user",
        item_id: str = "item_id",
        concurrency: int = 2,
        **options: Unpack[Options],
    ) -> Any:
        """Rank many slates: one row per user and candidate. `Client.rank_many` describes the arguments."""
        from slatewise.client.frames import Slates

        slates = Slates(frame, user, item_id, histories)
        slates.rank_all(self.rerank, dict(options), concurrency)
        return slates.result()

    def models(self) -> list[dict[str, Any]]:
        """List the ranker: name, version, variants, verdict and limits."""
        return [model_name(self._ranker, LIMITS).model_dump(mode="json")]

    def model(self, name: str | None = None) -> dict[str, Any]:
        """Describe the ranker: limits, heads, features, fields, quality, and an example. Raises NotFound."""
        return model_card(self._resolve(name), LIMITS).model_dump(mode="json")

    def titles(self, ranker: str, item_ids: list[str]) -> dict[str, str]:
        """Return the known titles by item id."""
        shown = self._resolve(ranker).titles
        if "title" not in shown.names:
            return {}
        titles = shown.columns(["title"], item_ids)["title"]
        return {item: str(title) for item, title in zip(item_ids, titles, strict=True) if title is not None}

    def wait_until_ready(self, timeout: float = 30.0) -> None:
        """Return at once: a loaded ranker is warm."""

    def _resolve(self, name: str | None) -> Ranker:
        try:
            return self._background.pipeline.registry.resolve(name)
        except RankingError as error:
            raise client_error(error) from None

    def _rank(self, members: Mapping[str, Any], by_score: bool) -> Ranking:
        entered = time.perf_counter()
        body = to_json(rank_body(members))
        try:
            request = RankRequest.model_validate_json(body)
            request = request if by_score else unpruned(request)
            if request.id is None:
                request = request.model_copy(update={"id": new_request_id()})
            response = self._background.call(self._background.rank(request, by_score, entered))
        except ValidationError as error:
            raise client_error(wrong_request(error, body)) from None
        except RankingError as error:
            raise client_error(error) from error
        return Ranking.from_response(dict(response) | {"history": vars(response["history"])})


def client_error(error: RankingError) -> SlatewiseError:
    """Return the client's error for one of the pipeline: what the server's problem would become."""
    faults = [{"pointer": fault.pointer, "detail": fault.detail} for fault in error.faults]
    return from_problem(error.status, {"type": error.type, "detail": error.detail, "errors": faults})
