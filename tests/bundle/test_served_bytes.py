"""What is served cannot change when the files of the bundle change."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from slatewise.bundle.files import Files, array_of, elements, strings
from slatewise.bundle.golden import score_request
from slatewise.bundle.loader import load_bundle
from slatewise.bundle.manifest import ManifestError
from slatewise.schemas import RankRequest
from tests.support.bundle_copy import Copy, array_bytes

if TYPE_CHECKING:
    from tests.conftest import Tiny

DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, 0),
    "overwritten": lambda path: path.write_bytes(b"\x41" * path.stat().st_size),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_files_that_change_while_served_change_nothing(tiny: Tiny, tmp_path: Path, how: str) -> None:
    copy = Copy(tiny.folder, tmp_path)
    loaded = load_bundle(copy.folder)
    engine = loaded.engines["fp32"]
    request = RankRequest.model_validate(loaded.manifest.example)
    before = score_request(loaded, engine, request)
    changed = [path for path in copy.folder.rglob("*") if path.is_file()]
    for path in changed:
        DAMAGES[how](path)
    ids = [*loaded.vocabulary.items]
    every = RankRequest.model_validate({"candidates": {"item_ids": ids}, "user": request.user})
    assert len(changed) > 10 and np.isfinite(score_request(loaded, engine, every)["set"]).all()
    for exit, probabilities in score_request(loaded, engine, request).items():
        np.testing.assert_array_equal(probabilities, before[exit])
    assert not any(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_file_that_changes_between_check_and_use_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest is that of the bytes that are used, so there is no moment between the two."""
    copy = Copy(tiny.folder, tmp_path)
    read = Path.read_bytes

    def changing(path: Path) -> bytes:
        content = read(path)
        return content[:-1] + bytes([content[-1] ^ 1]) if path.name == "items.npy" else content

    monkeypatch.setattr(Path, "read_bytes", changing)
    with pytest.raises(ManifestError, match=r"items\.npy does not have the manifest's sha256"):
        copy.load()


ARRAYS = [
    np.zeros((0, 3), np.float32),
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    np.array(1.5),
    np.arange(3, dtype=">f8"),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_array_of_equals_numpy_load(tmp_path: Path, array: np.ndarray) -> None:
    found = array_of(array_bytes(array, tmp_path / "x.npy"))
    expected = np.load(tmp_path / "x.npy")
    np.testing.assert_array_equal(found, expected)
    assert (found.dtype, found.shape, found.flags.writeable) == (expected.dtype, expected.shape, False)


@pytest.mark.parametrize(
    "change", [lambda c: c[:-1], lambda c: c + b"\0", lambda c: b"", lambda c: c[:7], lambda c: b"PK"]
)
def test_array_of_refuses_other_content(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    content = array_bytes(ARRAYS[1], tmp_path / "x.npy")
    with pytest.raises(ValueError):
        array_of(change(content))


@pytest.mark.parametrize("names", [[], ["a"], ["a", '\u00fc"],[', ""], ["x"] * 300])
def test_long_lists_are_decoded_as_short_ones(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(names, indent=1).encode()
    assert strings(text) == names
    monkeypatch.setattr("slatewise.bundle.files.DECODE_AT_ONCE", 0)
    assert strings(text) == names


@pytest.mark.parametrize("text", ["", "[", "[1", "[1,]", "[1 2]", "[1] 2", "{}", '"x"', "null"])
def test_broken_list_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        list(elements(text))


LONE = b'"\\ud800"'  # half of a surrogate pair: valid JSON, and in no answer


@pytest.mark.parametrize("name", ["ids.json", "users.json", "display.json", "manifest.json"])
def test_text_that_no_answer_can_hold_is_refused(tiny: Tiny, tmp_path: Path, name: str) -> None:
    copy = Copy(tiny.folder, tmp_path)
    if name == "manifest.json":
        path = copy.folder / name
        path.write_bytes(path.read_bytes().replace(b'"trained_on": "', b'"trained_on": "\\ud800', 1))
    elif name == "display.json":
        copy.write(name, b'{"1": {"title": %s}}' % LONE)
    else:
        names = json.loads((copy.folder / name).read_text())
        copy.write(name, json.dumps(["\ud800", *names[1:]]).encode())
    with pytest.raises(ManifestError, match="surrogates not allowed"):
        copy.load()


def test_file_without_digest_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"content")
    assert Files(tmp_path, {}).read_optional("x") is None
    assert Files(tmp_path, None).read_optional("x") == b"content"
    with pytest.raises(ManifestError, match="y is missing"):
        Files(tmp_path, None).read("y")
