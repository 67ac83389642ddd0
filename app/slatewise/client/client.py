"""The client: `with Client() as client: client.rerank(user=..., candidates=[...])`.

Called by: users, and `commands/`. Calls: `calls.py`, `exchange.py` and httpx.
"""

from __future__ import annotations

import ssl
import time
from typing import Any, Self, TypeVar, Unpack

import httpx

from slatewise.client import calls
from slatewise.client.body import Members, Options
from slatewise.client.calls import Call
from slatewise.client.errors import NotFound, SlatewiseError, TimedOut
from slatewise.client.exchange import Body, Tries, make_target, name_of, read_answer
from slatewise.client.results import Ranking

T = TypeVar("T")

READY_PAUSE = 0.1  # seconds between two looks at /readyz


class Client:
    """Asks one server. It reuses its connections, and several threads may share it.

    url: default: SLATEWISE_URL, or else http://127.0.0.1:8000. api_key: default: SLATEWISE_API_KEY.
    timeout: seconds of one call, repeats included. retries: most repeats of one call, which exchange.py describes.
    verify: authorities and certificate for https, see `ssl.create_default_context`; default: those of httpx.
    Every method raises SlatewiseError.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        timeout: float = 1.0,
        retries: int = 1,
        verify: ssl.SSLContext | None = None,
    ) -> None:
        """Raises ValueError for a wrong argument. No connection is made yet."""
        self._target = make_target(url, api_key, timeout, retries)
        self._http = httpx.Client(**self._target.options(), verify=verify or True)

    def __repr__(self) -> str:
        return f"Client({self._target.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def rerank(self, **members: Unpack[Members]) -> Ranking:
        """Rank the candidates, best first. The members are those of the request, all by name."""
        return self._send(calls.rerank(members))

    def score(self, **members: Unpack[Members]) -> Ranking:
        """Score the candidates in input order; `ranks` has their places. `top_n` is ignored."""
        return self._send(calls.score(members))

    def rank_many(
        self,
        frame: Any,
        *,
        histories: Any = None,
        user: str = "user",
        item_id: str = "item_id",
        concurrency: int = 8,
        **options: Unpack[Options],
    ) -> Any:
        """Rank many slates: one row per user and candidate. Returns the frame with the columns `score` and `rank`.

        frame: of pandas or polars, or a list of mappings; its numeric columns are features, all other columns fields.
        histories: a frame of events with a column `user`, or histories by user. concurrency: requests in flight.
        """
        from slatewise.client.frames import Slates  # needs numpy

        slates = Slates(frame, user, item_id, histories)
        slates.rank_all(self.rerank, dict(options), concurrency)
        return slates.result()

    def models(self) -> list[dict[str, Any]]:
        """List the rankers that are served: name, version, variants, verdict and limits."""
        return self._send(calls.models())

    def model(self, name: str | None = None) -> dict[str, Any]:
        """Describe one ranker: limits, heads, features, fields, quality, and an example. Default: the only one."""
        return self._send(calls.model(name_of(name, self.models() if name is None else [])))

    def titles(self, ranker: str, item_ids: list[str]) -> dict[str, str]:
        """Return the known titles by item id. A server that has none gives an empty result."""
        found: dict[str, str] = {}
        try:
            for first in range(0, len(item_ids), calls.MOST_TITLES):
                part = self._send(calls.titles(ranker, item_ids[first : first + calls.MOST_TITLES]))
                found |= part
        except NotFound:
            pass
        return found

    def event(self, *, user: Any, item_id: Any, **members: Any) -> dict[str, Any]:
        """Send one event. members: action, timestamp, request_id (of the answer that it follows), event_id."""
        return self.events([{"user": user, "item_id": item_id} | members])

    def events(self, rows: Any) -> dict[str, Any]:
        """Send events: a list of mappings, or a frame, with the members of `event`."""
        return self._send(calls.events(rows))

    def encode(self, user: Any, history: Any = None, ranker: str | None = None) -> dict[str, Any]:
        """Encode a history ahead of the ranking call: the given one, or the stored one."""
        return self._send(calls.encode(user, history, ranker))

    def delete_user(self, user: Any) -> None:
        """Delete all that the server keeps of a user."""
        self._send(calls.delete_user(user))

    def wait_until_ready(self, timeout: float = 30.0) -> None:
        """Wait until the server answers /readyz with 200. Raises TimedOut with the last reason."""
        end = time.monotonic() + timeout
        while True:
            try:
                self._once(calls.ready(), Tries(self._target, max(end - time.monotonic(), 0.001)))
                return
            except SlatewiseError as error:
                if error.status is not None and error.status < 500:  # another service, or a wrong address
                    raise
                if time.monotonic() + READY_PAUSE >= end:
                    raise TimedOut(f"not ready after {timeout:g} s: {error}") from None
            time.sleep(READY_PAUSE)

    def _send(self, call: Call[T]) -> T:
        tries = Tries(self._target)
        while True:
            try:
                return self._once(call, tries)
            except SlatewiseError as error:
                pause = tries.pause_after(error)
            time.sleep(pause)

    def _once(self, call: Call[T], tries: Tries) -> T:
        """Make one try, within the time that is left."""
        body = Body(tries)
        options = self._target.request_options(call.content, tries.remaining(), call.user)
        try:
            with self._http.stream(call.method, call.path, **options) as response:
                for part in response.iter_bytes():
                    body.add(part)
        except httpx.RequestError as error:
            raise tries.failed(error) from error
        return read_answer(response, b"".join(body.parts), call.read)
