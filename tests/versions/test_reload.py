"""R15 for five seconds: versions change under load, and no answer mixes two of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadtest.chaos.reload import checks, run

if TYPE_CHECKING:
    from tests.conftest import Tiny


def test_reload_under_load_fails_nothing_and_mixes_nothing(tiny: Tiny) -> None:
    seconds = 5.0
    tally, text = run(tiny.folder, seconds)
    assert not [what for what, good in checks(tally, seconds).items() if not good], text
    assert len(tally.switches) >= 3 and tally.other[200] >= 1 and sum(tally.statuses.values()) > 100, text
