"""Item tables at load: each table that a served variant reads is in memory once, and no other one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from slatewise.bundle.loader import load_bundle
from slatewise.bundle.manifest import ManifestError
from slatewise.inference.item_table import Int8Items
from slatewise_train.compression.item_quantization import middle_max
from tests.support.bundle_copy import Copy, array_bytes

if TYPE_CHECKING:
    from tests.conftest import Tiny


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Copy:
    """A copy with the variants `tables8` and `student-tables8`, both with the graphs of fp32."""
    copy = Copy(tiny.folder, tmp_path)
    items = np.load(copy.folder / "items.npy")
    copy.write("items8.npy", array_bytes(middle_max(items), tmp_path / "items8.npy"))
    for name, table in (("tables8", "items8.npy"), ("student-tables8", "items8.npy")):
        copy.add_variant(name)
        change = {"items": table, "bound": 1.0}
        copy.change_manifest(
            lambda m, name=name, change=change: m["variants"].update({name: m["variants"]["fp32"] | change})
        )
    return copy


def test_variants_with_one_table_share_it_in_memory(copy: Copy) -> None:
    loaded = copy.load()
    assert loaded.refused == {}
    of = {name: engine.items for name, engine in loaded.engines.items()}
    assert of["fp32"] is loaded.items and of["tables8"] is of["student-tables8"]


def test_float32_rows_that_no_variant_reads_are_not_loaded(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = Path.read_bytes

    def reading(path: Path) -> bytes:
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", reading)
    loaded = load_bundle(copy.folder, ("tables8",))
    assert isinstance(loaded.items, Int8Items) and loaded.engines["tables8"].items is loaded.items
    assert "items8.npy" in read and "items.npy" not in read
    load_bundle(copy.folder, ("fp32",))
    assert "items.npy" in read


def test_rows_in_memory_are_the_bytes_of_the_file(copy: Copy) -> None:
    """They are not copied: a table would be in memory twice while it loads, and its pages would stay with malloc."""
    loaded = copy.load()
    tables = {name: engine.items for name, engine in loaded.engines.items()}
    assert isinstance(tables["tables8"], Int8Items)
    for array in (loaded.items, tables["tables8"].records):
        assert isinstance(array, np.ndarray) and not array.flags.owndata and not array.flags.writeable


def test_table_that_is_not_read_is_still_checked(copy: Copy) -> None:
    content = bytearray((copy.folder / "items.npy").read_bytes())
    content[-1] ^= 1
    (copy.folder / "items.npy").write_bytes(content)
    with pytest.raises(ManifestError, match=r"items\.npy does not have the manifest's sha256"):
        load_bundle(copy.folder, ("tables8",))
