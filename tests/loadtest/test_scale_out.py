"""Two real replicas behind the real HAProxy: a user's history is found where it was kept, and a death takes one replica's users only."""

from __future__ import annotations

import re
import shutil

import pytest

from loadtest import scale_out
from loadtest.dashboards import faster
from tests.conftest import DEMO

needs_haproxy = pytest.mark.skipif(not shutil.which("haproxy"), reason="needs haproxy (apt-get install haproxy)")


@needs_haproxy
def test_hashing_the_user_finds_every_history_and_going_round_encodes_more() -> None:
    hashed, around = (scale_out.hits(DEMO, balance) for balance in ("hdr(X-User-ID)", "roundrobin"))
    assert hashed["reused"] == (scale_out.VISITS - 1) / scale_out.VISITS, "all but the first visit"
    assert min(hashed["requests"]) > 0, "both have users"
    assert around["reused"] < hashed["reused"]
    assert around["encoded_per_request"] > 1.3 * hashed["encoded_per_request"]
    assert around["kept_mb"] > 1.3 * hashed["kept_mb"]


@needs_haproxy
def test_a_replicas_death_and_return_move_its_own_users_only() -> None:
    found = scale_out.death(DEMO, 3.0)
    assert found["failed"][0] == found["failed"][2] == 0
    assert found["failed"][1] <= scale_out.THREADS, "at most what it was answering when it died"
    assert 0 < found["moved_users"] < scale_out.USERS
    assert found["misses_of_others"] == 0
    assert found["misses_when_back"] >= 1 and found["share_of_the_one_that_came_back"] > 0


def test_faster_rules_have_shorter_windows_and_the_same_names() -> None:
    rules = "record: job:x:ratio_rate5m\nexpr: rate(x[5m]) / rate(x[1h]) > 0.05\nfor: 15m\nexpr: min_over_time(y[1m])"
    assert (
        faster(rules)
        == "record: job:x:ratio_rate5m\nexpr: rate(x[5000ms]) / rate(x[60000ms]) > 0.05\nfor: 15000ms\nexpr: min_over_time(y[2000ms])"
    )
    assert not re.search(r"\[\d+[mhd]\]", faster("[3d] [6h] [30m]"))
