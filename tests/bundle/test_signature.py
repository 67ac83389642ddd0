"""Signed bundles: only those of a trusted key are loaded; and weights are inside of the graphs, under their digest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import onnx
import polars
import pytest

from slatewise import main
from slatewise.bundle import sign
from slatewise.bundle.loader import load_bundle, load_rankers
from slatewise.bundle.manifest import ManifestError
from slatewise.bundle.signature import SIGNATURE, PublicKeys, SignatureFault
from slatewise.bundle.trust import trusted_keys
from slatewise.cli import main as slatewise
from slatewise.flags import read_settings
from slatewise.local.ranker import load as load_in_process
from slatewise.settings import Settings, SettingsError
from tests.conftest import DEMO, Tiny
from tests.support.versions import command, done, publish, serving

NEWEST = max((DEMO / "movielens").glob("[0-9]*"), key=lambda folder: int(folder.name))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo."""
    target = tmp_path / "bundles" / "movielens" / NEWEST.name
    shutil.copytree(NEWEST, target)
    return target


def replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def new_key(path: Path, capsys: pytest.CaptureFixture[str], *bundles: Path) -> str:
    """Make a key, sign bundles, and return the public key that the command prints."""
    assert slatewise(["sign", "--new-key", str(path), *map(str, bundles)]) == 0
    return capsys.readouterr().out.rpartition("SLATEWISE_BUNDLE_KEYS=")[2].strip()


def load(folder: Path, *keys: str) -> None:
    load_bundle(folder, ("fp32",), PublicKeys(keys))


def test_signed_bundle_is_loaded_with_its_key(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public = new_key(tmp_path / "key", capsys, folder)
    other = new_key(tmp_path / "other", capsys)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    load(folder, public)
    load(folder, other, public)
    load(folder)
    with pytest.raises(ManifestError, match="not by one of the 1 keys in SLATEWISE_BUNDLE_KEYS"):
        load(folder, other)


def test_unsigned_bundle_is_refused_with_keys(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public = new_key(tmp_path / "key", capsys)
    with pytest.raises(ManifestError, match=f"is not signed: no {SIGNATURE}"):
        load(folder, public)
    with pytest.raises(ManifestError, match=r"no bundle can be served.*is not signed"):
        load_rankers(folder.parents[1], ("fp32",), PublicKeys([public]))
    with pytest.raises(ManifestError, match="is not signed"):
        main.load(Settings(bundles=folder.parents[1], bundle_keys=public))


@pytest.mark.parametrize("change", ["manifest", "signature", "empty", "longer", "file"])
def test_bundle_that_changed_after_signing_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    public = new_key(tmp_path / "key", capsys, folder)
    content = (folder / "manifest.json").read_bytes()
    signature = (folder / SIGNATURE).read_bytes()
    assert len(signature) == 64
    if change == "manifest":
        replace(folder / "manifest.json", content + b"\n")
    elif change == "file":  # the digests in the signed manifest cover it
        replace(folder / "ids.json", b"[]")
    else:
        broken = {"signature": bytes([signature[0] ^ 1]) + signature[1:], "empty": b"", "longer": signature + b"\0"}
        replace(folder / SIGNATURE, broken[change])
    with pytest.raises(ManifestError, match="sha256" if change == "file" else "not by one of"):
        load(folder, public)


def test_openssl_makes_and_checks_the_same_signatures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, public = tmp_path / "key", tmp_path / "public"
    text = new_key(key, capsys, folder)
    common = ["openssl", "pkeyutl", "-rawin", "-in", str(folder / "manifest.json")]
    subprocess.run(["openssl", "pkey", "-in", str(key), "-pubout", "-out", str(public)], check=True)
    assert public.read_text().splitlines()[1:-1] == [text]
    verify = [*common, "-verify", "-pubin", "-inkey", str(public), "-sigfile", str(folder / SIGNATURE)]
    subprocess.run(verify, check=True, capture_output=True)
    (folder / SIGNATURE).unlink()
    subprocess.run([*common, "-sign", "-inkey", str(key), "-out", str(folder / SIGNATURE)], check=True)
    load(folder, text)


def test_bundle_with_a_broken_file_is_not_signed(folder: Path, tmp_path: Path) -> None:
    replace(folder / "ids.json", b"[]")
    with pytest.raises(ManifestError, match=r"ids\.json"):
        sign.main(["--new-key", str(tmp_path / "key"), str(folder)])
    assert not (folder / SIGNATURE).exists()


def test_key_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("mine")
    with pytest.raises(SignatureFault, match="exists"):
        sign.main(["--new-key", str(tmp_path / "key")])
    with pytest.raises(SignatureFault, match="not a private key"):
        sign.main([str(tmp_path / "key")])
    assert (tmp_path / "key").read_text() == "mine"


@pytest.mark.parametrize("text", ["x", "MCowBQYDK2VwAyEA", "", " , ", "-----BEGIN PUBLIC KEY-----"])
def test_text_that_is_no_public_key_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without the keys that its operator meant would load any bundle."""
    if not text:
        assert not PublicKeys([])
        return
    monkeypatch.setenv("SLATEWISE_BUNDLE_KEYS", text)
    with pytest.raises(SettingsError, match="SLATEWISE_BUNDLE_KEYS"):
        trusted_keys(read_settings({}).bundle_keys)


# Commands that load a bundle themselves


@pytest.mark.parametrize("command", ["rank", "batch", "check-bundle", "check-bundle of the root", "load"])
def test_command_loads_only_a_signed_bundle(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    table = tmp_path / "in.parquet"
    polars.DataFrame({"user": ["u", "u"], "item_id": ["1", "2"]}).write_parquet(table)
    out = tmp_path / "out.parquet"
    arguments = {
        "rank": ["rank", "u", "1", "2", "--bundle", str(folder), "--variant", "fp32"],
        "batch": ["batch", str(table), str(out), "--bundle", str(folder), "--variant", "fp32", "--workers", "1"],
        "check-bundle": ["check-bundle", str(folder)],
        "check-bundle of the root": ["check-bundle", str(folder.parents[1])],
    }

    def run() -> tuple[int, str]:
        """The exit code and the error of the command, or of its equal in Python."""
        if command in arguments:
            code = slatewise(arguments[command])
            return code, capfd.readouterr().err
        try:
            load_in_process(folder, "fp32", threads=1).close()
        except ManifestError as error:
            return 1, str(error)
        return 0, ""

    key = tmp_path / "key"
    assert slatewise(["sign", "--new-key", str(key)]) == 0
    public = capfd.readouterr().out.rpartition("SLATEWISE_BUNDLE_KEYS=")[2].strip()
    assert run()[0] == 0, "without the setting, no signature is needed"
    out.unlink(missing_ok=True)
    monkeypatch.setenv("SLATEWISE_BUNDLE_KEYS", public)
    code, error = run()
    assert code == 1 and not out.exists()
    assert f"{folder} is not signed: no {SIGNATURE}" in error and "SLATEWISE_BUNDLE_KEYS asks for one" in error
    assert "Traceback" not in error
    assert slatewise(["sign", str(key), str(folder)]) == 0
    capfd.readouterr()
    assert run()[0] == 0
    monkeypatch.setenv("SLATEWISE_BUNDLE_KEYS", ",")
    if command in arguments:
        code, error = run()
        assert code == 1 and "SLATEWISE_BUNDLE_KEYS: is set but contains no key" in error


# Weights in other files


def with_file(folder: Path, name: str, content: bytes) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    replace(folder / "manifest.json", json.dumps(manifest).encode())


@pytest.mark.parametrize("place", ["beside", "outside", "absolute", "a link"])
def test_graph_with_weights_in_another_file_is_refused(folder: Path, tmp_path: Path, place: str) -> None:
    """The digest of the graph does not cover that file, and its path may lead anywhere."""
    path = folder / "variants" / "fp32" / "point.onnx"
    model = onnx.load(path)
    outside = tmp_path / "weights"
    location = {"outside": os.path.relpath(outside, path.parent), "absolute": str(outside)}.get(place, "weights")
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    outside.write_bytes(weights.raw_data)
    if place == "beside":
        shutil.copy(outside, path.parent / "weights")
    elif place == "a link":
        (path.parent / "weights").symlink_to(outside)
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value=location)
    content = model.SerializeToString()
    replace(path, content)
    with_file(folder, "variants/fp32/point.onnx", content)
    with pytest.raises(ManifestError, match="xternal data"):
        load_bundle(folder, ("fp32",))


def test_unsigned_version_is_refused_also_by_a_running_server(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "bundles"
    publish(tiny.folder, root, 1)
    key = tmp_path / "key"
    public = new_key(key, capsys, root / "tiny" / "1")
    with serving(root, bundle_keys=public) as client:
        publish(tiny.folder, root, 2)
        answer = command(client, "switch", version=2)
        assert answer.status_code == 422 and "is not signed" in answer.json()["detail"]
        assert slatewise(["sign", str(key), str(root / "tiny" / "2")]) == 0
        assert done(client, "switch", version=2)["version"] == 2
