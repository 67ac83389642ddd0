"""Tries of wrong keys: bounded by address, in a bounded table, and never in the way of a right key."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client import REGISTRY

from slatewise.errors import RankingError, TooManyRequests, Unauthorized
from slatewise.http import wrong_keys
from slatewise.http.wrong_keys import MOST_TRIES, SECONDS, WrongKeys
from slatewise.settings import Settings
from tests.conftest import DEMO
from tests.http.support import assert_problem
from tests.support.application import serve
from tests.support.attacks import ATTACKER, HOST

ADMIN = "the-key-of-the-admin"


def rejected(reason: str) -> float:
    return REGISTRY.get_sample_value("slatewise_rejected_total", {"reason": reason}) or 0.0


def kinds(table: WrongKeys, address: str, tries: int, given: str = "wrong") -> list[type[RankingError]]:
    return [type(table.refusal((address, 1), given, "a key is needed")) for _ in range(tries)]


def test_eleventh_wrong_key_in_ten_seconds_is_429(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1e6
    monkeypatch.setattr(wrong_keys.time, "monotonic", lambda: now)
    table = WrongKeys()
    assert kinds(table, "10.0.0.1", MOST_TRIES) == [Unauthorized] * MOST_TRIES
    now += 3.5
    refusal = table.refusal(("10.0.0.1", 2), "wrong", "a key is needed")
    assert isinstance(refusal, TooManyRequests) and refusal.headers["Retry-After"] == "7"
    assert refusal.detail == "more than 10 wrong keys came from this address within 10 seconds; a key is needed"
    assert kinds(table, "10.0.0.2", 1) == [Unauthorized], "another address"
    assert kinds(table, "10.0.0.1", 1, "") == [Unauthorized], "no key is no try"
    now += SECONDS - 3.5
    assert kinds(table, "10.0.0.1", MOST_TRIES + 1) == [Unauthorized] * MOST_TRIES + [TooManyRequests]


def test_table_of_addresses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrong_keys, "MOST_ADDRESSES", 100)
    table = WrongKeys()
    kinds(table, "10.9.9.9", MOST_TRIES)
    for k in range(1_000):
        kinds(table, f"10.0.{k // 250}.{k % 250}", 1)
        if k % 50 == 0:
            assert kinds(table, "10.9.9.9", 1) == [TooManyRequests], "who goes on is not forgotten"
    assert len(table.tries) == 100


def test_addresses_of_one_ipv6_network_count_together() -> None:
    table = WrongKeys()
    for k in range(MOST_TRIES):
        kinds(table, f"2001:db8:1:2::{k:x}", 1)
    assert kinds(table, "2001:db8:1:2:ffff::1", 1) == [TooManyRequests]
    assert kinds(table, "2001:db8:1:3::1", 1) == [Unauthorized]


@pytest.mark.parametrize("path", ["/models", "/admin/rankers", "/metrics"])
def test_wrong_keys_of_one_address_shut_out_nobody(path: str) -> None:
    """Two clients from two addresses, with a right key and with wrong ones."""
    right = {"/models": "user-key", "/admin/rankers": ADMIN, "/metrics": "scrape-key"}[path]
    settings = Settings(
        bundles=DEMO,
        variants="fp32",
        api_keys="user-key",  # type: ignore[arg-type]
        admin_key=ADMIN,  # type: ignore[arg-type]
        metrics_key="scrape-key",  # type: ignore[arg-type]
    )
    with serve(settings) as server:

        def client_at(address: str) -> httpx.Client:
            transport = httpx.HTTPTransport(local_address=address)
            return httpx.Client(base_url=server.base_url, transport=transport, timeout=30)

        with client_at(HOST) as good, client_at(ATTACKER) as bad:

            def ask(client: httpx.Client, key: str) -> httpx.Response:
                return client.get(path, headers={"Authorization": f"Bearer {key}"})

            before = rejected("key_tries")
            codes = [ask(bad, f"guess-{k}").status_code for k in range(MOST_TRIES + 5)]
            assert codes == [401] * MOST_TRIES + [429] * 5
            assert rejected("key_tries") == before + 5
            refused = ask(bad, "guess")
            assert 1 <= int(refused.headers["Retry-After"]) <= SECONDS
            assert assert_problem(refused, 429)["type"] == "urn:slatewise:problem:too-many-requests"
            assert bad.get(path).status_code == 401, "without a key"
            assert ask(bad, right).status_code == 200
            assert ask(good, right).status_code == 200
            assert ask(good, "wrong").status_code == 401
            assert ask(bad, "guess").status_code == 429, "a right key clears no count"
