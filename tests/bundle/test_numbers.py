"""Bundles whose numbers fit the schema and break requests are refused at load, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from slatewise.bundle import probe as probe_module
from slatewise.bundle.manifest import ManifestError
from slatewise.bundle.probe import MOST, check_numbers, extreme_rows
from tests.support.bundle_copy import Copy, array_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Tiny


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Copy:
    return Copy(tiny.folder, tmp_path / "bundles")


def change_row(copy: Copy, tmp_path: Path, name: str, value: float) -> None:
    """Write `value` over row 5, or the first row, of an array."""
    array = np.load(copy.folder / name).copy()
    array[min(5, len(array) - 1)] = value
    copy.write(name, array_bytes(array, tmp_path / "changed.npy"))


@pytest.mark.parametrize("name", ["items.npy", "fields.npy", "default_meta.npy", "meta_embeddings.npy"])
@pytest.mark.parametrize("value", [3e38, -3e38, np.nan, np.inf, 2 * MOST])
def test_number_that_no_product_survives_is_refused(copy: Copy, tmp_path: Path, name: str, value: float) -> None:
    change_row(copy, tmp_path, name, value)
    with pytest.raises(ManifestError, match=rf"{name}: .* holds .*, a number that is (above 1e\+12|not finite)"):
        copy.load()


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-30, 50.0])
def test_odd_row_that_scores_are_finite_for_is_served(copy: Copy, tmp_path: Path, value: float) -> None:
    change_row(copy, tmp_path, "items.npy", value)
    copy.change_manifest(lambda m: m["variants"]["fp32"].update(golden_bound=1))
    assert list(copy.load().engines) == ["fp32"]


def test_rare_row_that_breaks_a_graph_is_refused(copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request of the bundle reads the row; only the probe does."""
    monkeypatch.setattr(probe_module, "MOST", 3.3e38)
    array = np.load(copy.folder / "items.npy").copy()
    array[-1] = 3e38
    copy.write("items.npy", array_bytes(array, tmp_path / "changed.npy"))
    with pytest.raises(ManifestError, match="a request with the extreme rows of the tables fails"):
        copy.load()


OFFSETS: dict[str, Callable[[dict[str, Any]], object]] = {
    "behind the table": lambda field: field.update(offset=field["offset"] + 10_000),
    "one row late": lambda field: field.update(offset=field["offset"] + 1),
    "a value twice": lambda field: field.update(values=[field["values"][0], *field["values"][:-1]]),
}


@pytest.mark.parametrize("how", OFFSETS)
def test_wrong_field_offset_is_refused(copy: Copy, how: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        last = max(manifest["fields"].values(), key=lambda field: field["offset"])
        first = min(manifest["fields"].values(), key=lambda field: field["offset"])
        OFFSETS[how](first if how == "one row late" else last)

    copy.change_manifest(change)
    with pytest.raises(ManifestError, match=r"field \w+ (begins at row|names a value twice)"):
        copy.load()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(heads={name: float("nan") for name in m["heads"]}),
        lambda m: m.update(heads={name: 1e300 for name in m["heads"]}),
        lambda m: m["variants"]["fp32"].update(bound=float("inf")),
        lambda m: m["variants"]["fp32"].update(golden_bound=float("inf")),
    ],
)
def test_weight_or_bound_without_end_is_refused(copy: Copy, change: Callable[[dict[str, Any]], object]) -> None:
    copy.change_manifest(change)
    with pytest.raises(ManifestError, match=r"finite|less than or equal"):
        copy.load()


@pytest.mark.parametrize("n", [0, 1, 2, 40, 200])
def test_extreme_rows_are_those_of_the_whole_table(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "BLOCK", 7)
    rows = np.random.default_rng(n).normal(size=(n, 3)).astype(np.float32)
    lengths = (rows.astype(np.float64) ** 2).sum(axis=1)
    expected = {*np.abs(rows).max(axis=1, initial=0).argsort()[-16:], *lengths.argsort()[-16:], *lengths.argsort()[:16]}
    assert set(extreme_rows(rows).tolist()) == set(map(int, expected))


def test_first_bad_number_is_named_with_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "BLOCK", 4)
    array = np.ones((10, 2), np.float32)
    check_numbers("x", array)
    array[9, 1] = np.inf
    with pytest.raises(ManifestError, match="x: row 9 holds inf, a number that is not finite"):
        check_numbers("x", array)
