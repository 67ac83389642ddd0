"""Item tables at load: each table that a served variant reads is in memory once, and no other one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from slatewise.bundle.loader import load_bundle
from slatewise.bundle.manifest import ManifestError
from slatewise.inference.item_table import Int8Items, PackedItems, packed_record
from slatewise_train.compression.item_codes import code_items
from slatewise_train.compression.item_quantization import middle_max
from tests.support.bundle_copy import Copy, array_bytes

if TYPE_CHECKING:
    from tests.conftest import Tiny


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Copy:
    """A copy with the variants `tables8`, `student-tables8` and `tables4`, all with the graphs of fp32."""
    copy = Copy(tiny.folder, tmp_path)
    items = np.load(copy.folder / "items.npy")
    copy.write("items8.npy", array_bytes(middle_max(items), tmp_path / "items8.npy"))
    copy.write("items4.npy", array_bytes(code_items(items, items), tmp_path / "items4.npy"))
    for name, table in (("tables8", "items8.npy"), ("student-tables8", "items8.npy"), ("tables4", "items4.npy")):
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
    assert isinstance(tables["tables4"], PackedItems)
    for array in (loaded.items, tables["tables8"].records, tables["tables4"].codes):
        assert isinstance(array, np.ndarray) and not array.flags.owndata and not array.flags.writeable


def test_table_that_is_not_read_is_still_checked(copy: Copy) -> None:
    content = bytearray((copy.folder / "items.npy").read_bytes())
    content[-1] ^= 1
    (copy.folder / "items.npy").write_bytes(content)
    with pytest.raises(ManifestError, match=r"items\.npy does not have the manifest's sha256"):
        load_bundle(copy.folder, ("tables8",))


def with_column(record: np.ndarray, name: str, value: float) -> np.ndarray:
    changed = record.copy()
    changed[name] = value
    return changed


BROKEN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one row less": lambda record: np.zeros((), packed_record(len(record["codes"]) - 1, len(record["base"]), 4)),
    "one column less": lambda record: np.zeros((), packed_record(len(record["codes"]), len(record["base"]) - 1, 4)),
    "no bytes": lambda record: np.zeros((), packed_record(len(record["codes"]), len(record["base"]), 0)),
    "two records": lambda record: np.stack([record, record]),
    "float32 rows": lambda record: np.zeros(record["codes"].shape, np.float32),
    "other columns": lambda record: np.zeros((), [("codes", "u1", 4)]),
    "a step that is no number": lambda record: with_column(record, "steps", np.nan),
    "a base without end": lambda record: with_column(record, "base", -np.inf),
    "codes of nine bits": lambda record: with_column(record, "bits", 9),
    "more bits than bytes": lambda record: with_column(record, "bits", 8),
}


@pytest.mark.parametrize("change", BROKEN)
def test_broken_packed_table_refuses_only_its_variant(copy: Copy, tmp_path: Path, change: str) -> None:
    record = np.load(copy.folder / "items4.npy")
    copy.write("items4.npy", array_bytes(BROKEN[change](record), tmp_path / "changed.npy"))
    loaded = copy.load()
    assert list(loaded.engines) == ["fp32", "tables8", "student-tables8"]
    assert "items4.npy" in loaded.refused["tables4"]


def test_packed_table_that_no_variant_names_is_not_read(copy: Copy) -> None:
    (copy.folder / "items4.npy").write_bytes(b"no table")
    assert copy.load().refused.keys() == {"tables4"}
    assert list(load_bundle(copy.folder, ("fp32", "tables8")).engines) == ["fp32", "tables8"]
