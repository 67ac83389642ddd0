"""Item tables at load: each table that a served variant reads is in memory once, and no other one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from slatewise.bundle.golden import score_request
from slatewise.bundle.loader import load_bundle
from slatewise.bundle.manifest import ManifestError
from slatewise.inference.item_table import CodedItems, Int8Items
from slatewise.schemas import RankRequest
from slatewise_train.compression.item_codes import code_items
from slatewise_train.compression.item_quantization import middle_max
from tests.support.bundle_copy import Copy, array_bytes

if TYPE_CHECKING:
    from tests.conftest import Tiny


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Copy:
    """A copy with the variants `tables8`, `student-tables8` and `codes`, all with the graphs of fp32."""
    copy = Copy(tiny.folder, tmp_path)
    items = np.load(copy.folder / "items.npy")
    copy.write("items8.npy", array_bytes(middle_max(items), tmp_path / "items8.npy"))
    copy.write("items_coded.npy", array_bytes(code_items(items, items), tmp_path / "items_coded.npy"))
    for name, table in (("tables8", "items8.npy"), ("student-tables8", "items8.npy"), ("codes", "items_coded.npy")):
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
    assert isinstance(of["codes"], CodedItems)


def test_float32_rows_that_no_variant_reads_are_not_loaded(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = Path.read_bytes

    def reading(path: Path) -> bytes:
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", reading)
    loaded = load_bundle(copy.folder, ("tables8", "codes"))
    assert isinstance(loaded.items, Int8Items) and loaded.engines["tables8"].items is loaded.items
    assert "items8.npy" in read and "items_coded.npy" in read and "items.npy" not in read
    load_bundle(copy.folder, ("fp32",))
    assert "items.npy" in read


def test_rows_in_memory_are_the_bytes_of_the_file(copy: Copy) -> None:
    """They are not copied: a table would be in memory twice while it loads, and its pages would stay with malloc."""
    loaded = copy.load()
    tables = {name: engine.items for name, engine in loaded.engines.items()}
    assert isinstance(tables["tables8"], Int8Items) and isinstance(tables["codes"], CodedItems)
    for array in (loaded.items, tables["tables8"].records, tables["codes"].codes):
        assert isinstance(array, np.ndarray) and not array.flags.owndata and not array.flags.writeable


def test_table_that_is_not_read_is_still_checked(copy: Copy) -> None:
    content = bytearray((copy.folder / "items.npy").read_bytes())
    content[-1] ^= 1
    (copy.folder / "items.npy").write_bytes(content)
    with pytest.raises(ManifestError, match=r"items\.npy does not have the manifest's sha256"):
        load_bundle(copy.folder, ("tables8",))


def test_codes_score_about_as_float32_rows(copy: Copy) -> None:
    loaded = copy.load()
    request = RankRequest.model_validate(loaded.manifest.example)
    exact, found = (score_request(loaded, loaded.engines[name], request)["set"] for name in ("fp32", "codes"))
    assert 0 < np.abs(found - exact).max() < 0.2


RECORDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "no codes": lambda a: a["basis"].astype(np.float32),
    "many records": lambda a: np.stack([a, a]),
    "too many bits": lambda a: changed(a, "bits", 9),
    "a step that is no number": lambda a: changed(a, "step", np.nan),
    "a mean without end": lambda a: changed(a, "mean", np.inf),
    "a huge basis": lambda a: changed(a, "basis", np.inf),
    "one row less": lambda a: fewer_rows(a),
}


def changed(record: np.ndarray, column: str, value: float) -> np.ndarray:
    record[column] = value
    return record


def fewer_rows(record: np.ndarray) -> np.ndarray:
    rows, size = record["codes"].shape
    fields = [(name, record.dtype[name].base.str, record.dtype[name].shape) for name in record.dtype.names or ()]
    shorter = np.zeros((), [*fields[:-1], ("codes", "u1", (rows - 1, size))])
    for name, *_ in fields[:-1]:
        shorter[name] = record[name]
    return shorter


@pytest.mark.parametrize("change", RECORDS)
def test_broken_codes_refuse_only_their_variant(copy: Copy, tmp_path: Path, change: str) -> None:
    record = RECORDS[change](np.load(copy.folder / "items_coded.npy"))
    copy.write("items_coded.npy", array_bytes(record, tmp_path / "changed.npy"))
    loaded = copy.load()
    assert list(loaded.engines) == ["fp32", "tables8", "student-tables8"]
    assert "items_coded.npy" in loaded.refused["codes"]
    with pytest.raises(ManifestError, match=r"items_coded\.npy"):
        load_bundle(copy.folder, ("codes",))
