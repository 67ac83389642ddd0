"""Polling a folder: versions that arrive in pieces, broken ones, and what stays served meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import onnx
import pytest
from onnx import TensorProto, helper

from slatewise.bundle.folder import look, look_for
from tests.bundle.test_loader import with_nan
from tests.http.support import ask, sums
from tests.support.bundle_copy import FP32, Copy
from tests.support.versions import done, example_of, npy, publish, serving, state_of, wait_until

if TYPE_CHECKING:
    from tests.conftest import Tiny

POLL = {"reload": "poll", "reload_s": 0.05}


@pytest.fixture
def root(tiny: Tiny, tmp_path: Path) -> Path:
    publish(tiny.folder, tmp_path / "root", 1)
    return tmp_path / "root"


@pytest.fixture
def body(tiny: Tiny) -> dict[str, Any]:
    return example_of(tiny.folder)


def served(client: httpx.Client, body: dict[str, Any]) -> int:
    version: int = ask(client, body, "/rerank")["version"]
    return version


def rejected(client: httpx.Client) -> float:
    return sums(client, 'slatewise_model_reloads_total{outcome="rejected"}')[0]


def polled(client: httpx.Client, root: Path) -> None:
    """Wait for two whole polls: a folder that each of them would try to load is rejected once in each."""
    for version in (900, 901):
        folder = root / "probe" / str(version)
        before = rejected(client)  # before the folder is there: a poll may reject it at once, and does so once
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text('{"files": {}}')
        wait_until(lambda before=before: rejected(client) > before, "a poll")
    shutil.rmtree(root / "probe")


@pytest.mark.parametrize("manifest_first", [True, False])
def test_version_that_arrives_file_by_file_is_served_when_complete(
    tiny: Tiny, root: Path, tmp_path: Path, body: dict[str, Any], manifest_first: bool
) -> None:
    """As in a mounted object store: no rename, each file late, all with the same time."""
    source = publish(tiny.folder, tmp_path / "store", 2)
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    names.sort(key=lambda name: (name == "manifest.json") != manifest_first)
    with serving(root, **POLL) as client:
        before = rejected(client)
        for k, name in enumerate(names):
            target = root / "tiny" / "2" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target)
            os.utime(target, (0, 0))
            if k == len(names) - 2:
                polled(client, root)
                assert served(client, body) == 1
                assert state_of(client)["last_load"]["outcome"] == "waiting"
        wait_until(lambda: served(client, body) == 2, "version 2")
        assert rejected(client) == before + 2, "only the probes of the test"


def test_wrong_bytes_of_the_right_length_are_read_again(
    tiny: Tiny, root: Path, body: dict[str, Any], tmp_path: Path
) -> None:
    """The file does not seem to change: neither its length, nor its time, nor its inode."""
    source = publish(tiny.folder, tmp_path / "store", 2)
    right = (source / "items.npy").read_bytes()
    (source / "items.npy").write_bytes(bytes(len(right)))
    os.utime(source / "items.npy", (0, 0))
    with serving(root, **POLL) as client:
        source.rename(root / "tiny" / "2")
        wait_until(lambda: (state_of(client)["last_load"] or {}).get("outcome") == "rejected", "a refusal")
        assert served(client, body) == 1
        path = root / "tiny" / "2" / "items.npy"
        with path.open("r+b") as file:
            file.write(right)
        os.utime(path, (0, 0))
        wait_until(lambda: served(client, body) == 2, "version 2")


def external(content: bytes) -> bytes:
    """The graph's first weights lie in a file outside of the bundle."""
    model = onnx.load_from_string(content)
    weights = next(w for w in model.graph.initializer if w.data_type == TensorProto.FLOAT)
    size = len(weights.raw_data) or 4 * len(weights.float_data)
    weights.ClearField("raw_data")
    weights.ClearField("float_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../../../../../../../../../etc/passwd"), ("length", str(size))):
        entry = weights.external_data.add()
        entry.key, entry.value = key, value
    return model.SerializeToString()


def unknown_operator(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    model.graph.node[0].op_type = "Surprise"
    return model.SerializeToString()


def other_input(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    model.graph.input.append(helper.make_tensor_value_info("surprise", TensorProto.FLOAT, [1]))
    model.graph.node.append(helper.make_node("Identity", ["surprise"], ["surprised"]))
    model.graph.output.append(helper.make_tensor_value_info("surprised", TensorProto.FLOAT, [1]))
    return model.SerializeToString()


def renamed_output(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    name = model.graph.output[0].name
    model.graph.output[0].name = "other"
    model.graph.node.append(helper.make_node("Identity", [name], ["other"]))
    return model.SerializeToString()


def linked(copy: Copy) -> None:
    outside = copy.root / "outside"
    (copy.folder / FP32 / "dot.onnx").rename(outside)
    (copy.folder / FP32 / "dot.onnx").symlink_to(outside)


def huge(copy: Copy) -> None:
    import numpy as np

    table = np.load(copy.folder / "items.npy")
    table[3] = 3e38
    copy.write("items.npy", npy(table))


def endless(copy: Copy) -> None:
    """Two files of a terabyte, which take no place on the disk: one that is read, and one that is only checked."""
    os.truncate(copy.folder / "report.json", 2**40)
    os.truncate(copy.folder / "items.npy", 2**40)


def rewritten(graph: str, change: Callable[[bytes], bytes]) -> Callable[[Copy], None]:
    return lambda copy: copy.rewrite(f"{FP32}/{graph}.onnx", change)


POISON: dict[str, tuple[Callable[[Copy], object], str]] = {
    "truncated": (rewritten("point", lambda content: content[: len(content) // 2]), "refuses it"),
    "empty": (rewritten("encode", lambda content: b""), "refuses it"),
    "an unknown operator": (rewritten("dot", unknown_operator), "Surprise"),
    "another input": (rewritten("dot", other_input), "surprise"),
    "another output": (rewritten("set", renamed_output), "probabilities"),
    "weights that are no numbers": (rewritten("point", with_nan), "not finite"),
    "weights outside of the bundle": (rewritten("point", external), "refuses it"),
    "a link out of the bundle": (linked, "leads out of the bundle"),
    "a row that overflows": (huge, "a number that is above"),
    "a field offset outside of its table": (
        lambda c: c.change_manifest(lambda m: next(iter(m["fields"].values())).update(offset=10**6)),
        "begins at row",
    ),
    "a format of the future": (lambda c: c.change_manifest(lambda m: m.update(format=9)), "format 9 is not known"),
    "no JSON": (lambda c: (c.folder / "manifest.json").write_bytes(b'{"files": {}, "x": NaN'), "manifest.json"),
    "another number": (lambda c: c.change_manifest(lambda m: m.update(version=77)), "version 77"),
    "files larger than the memory": (endless, "is larger than the memory"),
    # Last, because it is tried again and again, and would then be the latest attempt.
    "another digest": (lambda c: (c.folder / FP32 / "set.onnx").write_bytes(b"x"), "sha256"),
}


def test_poison_bundles_are_refused_and_the_old_one_serves(
    tiny: Tiny, root: Path, body: dict[str, Any], tmp_path: Path
) -> None:
    """R11: each is a version of its own, newer than the one before it; then a good one is served."""
    with serving(root, **POLL) as client:
        before = rejected(client)
        for version, (how, (change, reason)) in enumerate(POISON.items(), 2):
            copy = Copy(tiny.folder, tmp_path / how, version)
            change(copy)
            copy.folder.rename(root / "tiny" / str(version))

            def refused(version: int = version) -> dict[str, Any] | None:
                attempt: dict[str, Any] = state_of(client)["last_load"] or {}
                return attempt if attempt.get("version") == version else None

            attempt = wait_until(refused, how)
            assert reason in attempt["reason"], how
            assert attempt["outcome"] == ("waiting" if how == "no JSON" else "rejected"), how
            assert served(client, body) == 1
        polled(client, root)
        assert rejected(client) <= before + len(POISON) + 2 + 6, "not once for each poll"
        publish(tiny.folder, root, 100)
        wait_until(lambda: served(client, body) == 100, "version 100")


def test_refused_folder_is_tried_again_when_it_changes_only(tiny: Tiny, root: Path, body: dict[str, Any]) -> None:
    folder = publish(tiny.folder, root / "staging", 2)
    good = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(good.replace('"format": 2', '"format": 9'))
    with serving(root, **POLL) as client:
        before = rejected(client)
        folder.rename(root / "tiny" / "2")
        wait_until(lambda: rejected(client) == before + 1, "a refusal")
        polled(client, root)
        assert rejected(client) == before + 3, "one for each probe of the test, and none for version 2"
        (root / "tiny" / "2" / "manifest.json").write_text(good)
        wait_until(lambda: served(client, body) == 2, "version 2")


def test_folders_that_vanish_take_nothing_down(tiny: Tiny, root: Path, body: dict[str, Any]) -> None:
    with serving(root, **POLL) as client:
        publish(tiny.folder, root, 2)
        wait_until(lambda: served(client, body) == 2, "version 2")
        shutil.rmtree(root / "tiny")
        polled(client, root)
        assert served(client, body) == 2 and client.get("/readyz").status_code == 200
        shutil.rmtree(root)
        assert served(client, body) == 2
        publish(tiny.folder, root, 3)
        wait_until(lambda: served(client, body) == 3, "version 3")


def test_polling_leaves_pinned_and_left_versions_alone(tiny: Tiny, root: Path, body: dict[str, Any]) -> None:
    with serving(root, **POLL) as client:
        done(client, "pin", version=1)
        publish(tiny.folder, root, 2)
        polled(client, root)
        assert served(client, body) == 1
        done(client, "unpin")
        wait_until(lambda: served(client, body) == 2, "version 2")
        done(client, "roll-back", version=2)
        polled(client, root)
        assert served(client, body) == 1
        publish(tiny.folder, root, 3)
        wait_until(lambda: served(client, body) == 3, "version 3")


def test_look_sees_what_is_missing(tiny: Tiny, tmp_path: Path) -> None:
    folder = publish(tiny.folder, tmp_path, 2)
    whole = look(folder)
    assert whole.manifest and not whole.missing and look(folder) == whole
    (folder / "items.npy").rename(folder / "items.part")
    assert look(folder).missing == ("items.npy",)
    for content in ("", "[]", "{}", '{"files": 3}', '{"files": {'):
        (folder / "manifest.json").write_text(content)
        assert look(folder).missing == ("manifest.json",)
    assert look_for(tmp_path / "none", {}) == {}
    assert list(look_for(tmp_path, {})["tiny"]) == [2] and look_for(tmp_path, {"tiny": 2}) == {}
