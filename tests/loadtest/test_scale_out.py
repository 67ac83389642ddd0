"""Two real replicas behind the real HAProxy: cached histories are found, and a killed replica moves its users only."""

from __future__ import annotations

import shutil

import pytest

from loadtest.server import scale_out
from tests.conftest import DEMO

needs_haproxy = pytest.mark.skipif(not shutil.which("haproxy"), reason="needs haproxy (apt-get install haproxy)")


@needs_haproxy
def test_user_hash_reuses_more_histories_than_round_robin() -> None:
    hashed, around = (scale_out.hits(DEMO, balance) for balance in (scale_out.BY_USER, "roundrobin"))
    assert hashed["reused"] == (scale_out.VISITS - 1) / scale_out.VISITS, "only the first visit misses"
    assert min(hashed["requests"]) > 0, "one replica has no users"
    assert around["reused"] < hashed["reused"]
    assert around["encoded_per_request"] > 1.3 * hashed["encoded_per_request"]
    assert around["kept_mb"] > 1.3 * hashed["kept_mb"]


@needs_haproxy
def test_killed_replica_moves_only_its_own_users() -> None:
    found = scale_out.death(DEMO, 3.0)
    assert found["failed"][0] == found["failed"][2] == 0
    assert found["failed"][1] <= scale_out.THREADS, "more failures than requests in flight"
    assert 0 < found["moved_users"] < scale_out.USERS
    assert found["misses_of_others"] == 0
    assert found["misses_when_back"] >= 1 and found["share_of_the_one_that_came_back"] > 0
