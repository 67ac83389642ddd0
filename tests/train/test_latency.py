"""Resident memory of a variant, on systems with and without /proc."""

from __future__ import annotations

from pathlib import Path

import pytest

from slatewise_train.evaluation import latency
from tests.conftest import Tiny


def test_resident_bytes_without_status_file_is_none(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "STATUS", tmp_path / "status")
    assert latency.resident_bytes(tiny.folder / "variants/fp32", tiny.folder / "items.npy", ["dot"]) is None


@pytest.mark.skipif(not latency.STATUS.exists(), reason="needs /proc/self/status, which only Linux has")
def test_resident_bytes_on_linux_is_positive(tiny: Tiny) -> None:
    exits = ["dot", "point", "set"]
    found = latency.resident_bytes(tiny.folder / "variants/fp32", tiny.folder / "items.npy", exits)
    assert found is not None and found > 0
