"""The rules of one call, without a connection: address and headers, time budget, repeats, and reading of answers.

A call is repeated only if the server cannot have done its work: after a failed connection, and after 429 or 503 with
Retry-After. Never after 504, and never after a time-out. All tries and pauses share the time budget of the call.

Called by: `client.py` and `async_client.py`. Calls: httpx and `errors.py`.
"""

from __future__ import annotations

import json
import os
import random
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from slatewise.client.errors import (
    ConnectionFailed,
    ConnectionLost,
    Invalid,
    ServerFault,
    SlatewiseError,
    TimedOut,
    from_problem,
)

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
MOST_BYTES = 1 << 26  # of an answer
MOST_USER = 256  # characters of a user id, as the server has it
FIRST_PAUSE = 0.05  # seconds after a failed connection; doubles
KEEP_ALIVE = 4.0  # seconds; below uvicorn's 5, so that a request does not meet a connection that the server closes
REPEATED = (429, 503)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Target:
    """A server, and the rules of every call to it."""

    url: str
    headers: dict[str, str]
    timeout: float  # seconds of one call, repeats included
    retries: int

    def options(self) -> dict[str, Any]:
        """Arguments of httpx.Client and httpx.AsyncClient."""
        return {
            "base_url": self.url,
            "headers": self.headers,
            # A proxy of the environment is not asked for this machine.
            "trust_env": httpx.URL(self.url).host not in LOOPBACK,
            "limits": httpx.Limits(keepalive_expiry=KEEP_ALIVE),
        }

    def request_options(self, content: bytes | None, seconds: float, user: str | int | None = None) -> dict[str, Any]:
        headers = {} if content is None else {b"Content-Type": b"application/json"}
        return {"content": content, "headers": headers | user_header(user), "timeout": seconds}


def user_header(user: str | int | None) -> dict[bytes, bytes]:
    """Return the header X-User-ID, which load balancers hash so that a user stays with one replica.

    A name that a header cannot carry gets none: the body names the user too. The bytes are UTF-8.
    """
    text = "" if user is None else str(user)
    if not text or len(text) > MOST_USER or text != text.strip() or any(unicodedata.category(c) == "Cc" for c in text):
        return {}
    return {b"X-User-ID": text.encode()}


def make_target(url: str | None, api_key: str | None, timeout: float, retries: int) -> Target:
    """Read the address and the key from the arguments, or else from SLATEWISE_URL and SLATEWISE_API_KEY.

    Raises ValueError.
    """
    address = url or os.environ.get("SLATEWISE_URL") or DEFAULT_URL
    source = "url" if url else "SLATEWISE_URL"
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"{source} must start with http:// or https://, for example {DEFAULT_URL}")
    try:
        parsed = httpx.URL(address)
        valid = bool(parsed.host) and 0 < (parsed.port or 80) < 1 << 16
    except httpx.InvalidURL:
        valid = False
    if not valid:
        raise ValueError(f"{source} must be an address with a host and a valid port, for example {DEFAULT_URL}")
    if not timeout > 0:
        raise ValueError("timeout must be above 0 seconds")
    if retries < 0:
        raise ValueError("retries must be 0 or more")
    key = api_key or os.environ.get("SLATEWISE_API_KEY")
    headers = {"Accept": "application/json", "User-Agent": "slatewise-client"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return Target(address.rstrip("/"), headers, timeout, retries)


class Tries:
    """The tries of one call: how much time is left, and whether to try again."""

    def __init__(self, target: Target, timeout: float | None = None) -> None:
        self.target = target
        self.timeout = target.timeout if timeout is None else timeout
        self.end = time.monotonic() + self.timeout
        self.left = target.retries
        self.pause = FIRST_PAUSE

    def remaining(self) -> float:
        """Return the seconds left, at least a millisecond: the first try always runs."""
        return max(self.end - time.monotonic(), 1e-3)

    def check_time(self) -> None:
        """Raise TimedOut after the end, for an answer that arrives slowly."""
        if time.monotonic() > self.end:
            raise self.timed_out()

    def timed_out(self) -> TimedOut:
        return TimedOut(f"{self.target.url} did not answer within {self.timeout:g} s")

    def pause_after(self, error: SlatewiseError) -> float:
        """Return the seconds to wait before the next try. Raises the error if there is none."""
        wait = self.pause_of(error)
        if wait is None or self.left == 0 or wait >= self.end - time.monotonic():
            raise error
        self.left -= 1
        return wait

    def pause_of(self, error: SlatewiseError) -> float | None:
        if isinstance(error, ConnectionFailed) and not error.sent:
            self.pause *= 2
            return self.pause / 2 * random.uniform(0.5, 1.5)  # so that many clients do not return together
        if error.status in REPEATED and error.retry_after is not None:
            return error.retry_after * random.uniform(1, 1.1)
        return None

    def failed(self, error: httpx.RequestError) -> SlatewiseError:
        """Return the error of this package for an exception of httpx."""
        reason = str(error) or type(error).__name__
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)):
            return ConnectionFailed(f"cannot connect to {self.target.url}: {reason}")
        if isinstance(error, httpx.TimeoutException):
            return self.timed_out()
        return ConnectionLost(f"the connection to {self.target.url} broke: {reason}")


class Body:
    """Collects the answer's bytes within the limits of size and time. Raises ServerFault or TimedOut."""

    def __init__(self, tries: Tries) -> None:
        self.tries = tries
        self.parts: list[bytes] = []
        self.size = 0

    def add(self, part: bytes) -> None:
        self.tries.check_time()
        self.size += len(part)
        if self.size > MOST_BYTES:
            raise ServerFault(f"the answer is longer than {MOST_BYTES} bytes", slug="")
        self.parts.append(part)


def read_answer(response: httpx.Response, content: bytes, read: Callable[[Any], T]) -> T:
    """Return the result of an answer. Raises the error that the answer describes, or ServerFault for a foreign one."""
    parsed = parse(content)
    if response.is_success and (parsed is not None or not content):
        try:
            return read(parsed)
        except (KeyError, TypeError, AttributeError):
            raise ServerFault("the answer has another form than expected", status=response.status_code) from None
    wait = retry_after(response.headers.get("retry-after"))
    if isinstance(parsed, dict):
        identifier = response.headers.get("x-request-id")
        raise from_problem(response.status_code, {"request_id": identifier} | parsed, wait)
    raise from_problem(response.status_code, {"detail": describe_foreign(response, content)}, wait)


def parse(content: bytes) -> Any:
    """Return the JSON value, or `None` if the content is none."""
    try:
        return json.loads(content)
    except ValueError:
        return None


def describe_foreign(response: httpx.Response, content: bytes) -> str:
    """Describe an answer that no Slatewise server gave: a proxy's page, a redirect, another service."""
    kind = response.headers.get("content-type", "without a type").partition(";")[0]
    text = f"status {response.status_code} ({kind}) is not an answer of Slatewise"
    if response.is_redirect:
        return f"{text}: it redirects to {response.headers.get('location', '?')}; use that address as url"
    start = " ".join(content[:200].decode(errors="replace").split())[:100]
    return f"{text} but of a proxy or another service at this address" + (f": {start}" if start else "")


def retry_after(value: str | None) -> float | None:
    """Return the seconds of the header Retry-After, which holds seconds or a date; `None` for any other text."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (moment - datetime.now(UTC)).total_seconds()) if moment.tzinfo else None


def name_of(name: str | None, served: list[dict[str, Any]]) -> str:
    """Return the ranker's name, or with `None` the name of the only one. Raises Invalid."""
    if name is not None:
        return name
    if len(served) != 1:
        raise Invalid.at("/ranker", f"must be one of {', '.join(str(each['name']) for each in served)}")
    return str(served[0]["name"])
