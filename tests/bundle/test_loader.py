"""Bundles on disk: what is served of a broken one, and what becomes of ids and fields of a whole one."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from pydantic import ValidationError

from slatewise.bundle.features import rows_of
from slatewise.bundle.loader import load_bundle, load_rankers, score_request
from slatewise.bundle.manifest import ManifestError
from slatewise.bundle.ranker import Ranker
from slatewise.http.problems import schema_error
from slatewise.inference.arrays import FIRST_ITEM, GAP_FIRST, GAP_MISSING, UNKNOWN_ACTION, UNKNOWN_ITEM
from slatewise.schemas import RankRequest
from slatewise_train.compression.item_quantization import middle_max

if TYPE_CHECKING:
    from tests.conftest import Tiny

GRAPHS = ("encode", "dot", "point", "set")
FP32 = "variants/fp32"


class Copy:
    """A bundle of its own under `root`, to be broken."""

    def __init__(self, source: Path, root: Path, version: int = 1) -> None:
        self.root = root
        self.folder = root / "tiny" / str(version)
        shutil.copytree(source, self.folder)
        if version != 1:
            self.change_manifest(lambda m: m.update(version=version))

    def change_manifest(self, change: Callable[[dict[str, Any]], object]) -> None:
        path = self.folder / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    def write(self, name: str, content: bytes) -> None:
        """A file that the manifest vouches for."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self.change_manifest(lambda m: m["files"].update({name: hashlib.sha256(content).hexdigest()}))

    def rewrite(self, name: str, change: Callable[[bytes], bytes]) -> None:
        self.write(name, change((self.folder / name).read_bytes()))

    def add_variant(self, name: str) -> None:
        """One more, equal to fp32."""
        for graph in GRAPHS:
            self.write(f"variants/{name}/{graph}.onnx", (self.folder / FP32 / f"{graph}.onnx").read_bytes())
        self.change_manifest(lambda m: m["variants"].update({name: m["variants"]["fp32"]}))

    def load(self) -> Ranker:
        return load_bundle(self.folder, 1)


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Copy:
    return Copy(tiny.folder, tmp_path)


@pytest.fixture
def pair(copy: Copy) -> Copy:
    """With a second variant, so that the first may break alone."""
    copy.add_variant("student")
    return copy


def with_nan(model: bytes) -> bytes:
    """The first float weights, not numbers any more."""
    graph = onnx.load_from_string(model)
    weights = next(w for w in graph.graph.initializer if w.data_type == onnx.TensorProto.FLOAT)
    broken = np.full_like(numpy_helper.to_array(weights), np.nan)
    weights.CopyFrom(numpy_helper.from_array(broken, weights.name))
    return graph.SerializeToString()


def array_bytes(array: np.ndarray, path: Path, allow_pickle: bool = False) -> bytes:
    np.save(path, array, allow_pickle=allow_pickle)
    return path.read_bytes()


def test_a_copy_is_served_whole(pair: Copy, ranker: Ranker) -> None:
    loaded = pair.load()
    assert (set(loaded.engines), loaded.refused, loaded.default_variant) == ({"fp32", "student"}, {}, "fp32")
    np.testing.assert_array_equal(loaded.items, ranker.items)


# A bundle that is refused


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '"x"', "{}", '{"format": 2}', '{"format": "1"}', '{"format": null}', "\0"]
)
def test_a_manifest_that_is_not_of_the_known_format_is_refused(copy: Copy, content: str) -> None:
    (copy.folder / "manifest.json").write_text(content)
    with pytest.raises(ManifestError, match=r"format|manifest\.json"):
        copy.load()


@pytest.mark.parametrize("found", [0, 2, "1", None])
def test_another_format_is_refused_by_its_name(copy: Copy, found: object) -> None:
    copy.change_manifest(lambda m: m.update(format=found))
    with pytest.raises(ManifestError, match="format"):
        copy.load()


def test_a_folder_without_a_manifest_is_refused(copy: Copy) -> None:
    (copy.folder / "manifest.json").unlink()
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        copy.load()


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown member": lambda m: m.update(surprise=1),
    "unknown member of a variant": lambda m: m["variants"]["fp32"].update(surprise=1),
    "missing member": lambda m: m.pop("space"),
    "wrong type": lambda m: m.update(width="wide"),
    "no width": lambda m: m.update(width=0),
    "no bound": lambda m: m["variants"]["fp32"].update(bound=0),
    "another width": lambda m: m.update(width=m["width"] + 1),
    "another meta size": lambda m: m.update(meta_size=m["meta_size"] + 1),
    "one field value more": lambda m: m["fields"]["genres"]["values"].append("More"),
    "no variants": lambda m: m.update(variants={}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_does_not_hold_is_refused(copy: Copy, change: str) -> None:
    copy.change_manifest(CHANGES[change])
    with pytest.raises(ManifestError):
        copy.load()


SHARED_FILES = [
    "items.npy",
    "ids.json",
    "fields.npy",
    "default_meta.npy",
    "meta_embeddings.npy",
    "users.json",
    "display.json",
    "report.json",
    "warmup.jsonl",
]


@pytest.mark.parametrize("name", SHARED_FILES)
def test_a_file_with_another_digest_is_refused_by_name(copy: Copy, name: str) -> None:
    path = copy.folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ManifestError, match=f"{name}.*sha256"):
        copy.load()


@pytest.mark.parametrize("name", SHARED_FILES)
def test_a_missing_file_is_refused_by_name(copy: Copy, name: str) -> None:
    (copy.folder / name).unlink()
    with pytest.raises(ManifestError, match=f"{name} is missing"):
        copy.load()


@pytest.mark.parametrize("name", SHARED_FILES)
def test_a_file_that_the_manifest_does_not_vouch_for_is_not_read(copy: Copy, name: str) -> None:
    """Refused, or loaded as if the file were not there (an optional one)."""
    copy.change_manifest(lambda m: m["files"].pop(name))
    (copy.folder / name).write_bytes(b"not what was published")
    try:
        loaded = copy.load()
    except ManifestError as error:
        assert name in str(error)
    else:
        assert name not in ("items.npy", "ids.json", "fields.npy", "default_meta.npy")
        assert loaded.engines


def test_a_truncated_array_is_refused(copy: Copy) -> None:
    path = copy.folder / "items.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ManifestError, match=r"items\.npy"):
        copy.load()


@pytest.mark.parametrize("name", ["items.npy", "fields.npy", "default_meta.npy", "meta_embeddings.npy"])
@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_array_is_refused_even_with_a_right_digest(copy: Copy, name: str, kept: int) -> None:
    copy.rewrite(name, lambda content: content[:kept])
    with pytest.raises(ManifestError):
        copy.load()


ARRAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one row less": lambda a: a[:-1],
    "one row more": lambda a: np.concatenate([a, a[:1]]),
    "doubles": lambda a: a.astype(np.float64),
    "big-endian": lambda a: a.astype(">f4"),
    "flat": lambda a: a.ravel(),
    "a number that is none": lambda a: np.where(np.arange(len(a))[:, None] == 1, np.nan, a).astype(np.float32),
    "an infinite number": lambda a: np.where(np.arange(len(a))[:, None] == 1, np.inf, a).astype(np.float32),
}


@pytest.mark.parametrize("name", ["items.npy", "fields.npy", "meta_embeddings.npy"])
@pytest.mark.parametrize("change", ARRAYS)
def test_an_array_that_is_not_what_the_manifest_says_is_refused(
    copy: Copy, tmp_path: Path, name: str, change: str
) -> None:
    copy.write(name, array_bytes(ARRAYS[change](np.load(copy.folder / name)), tmp_path / "changed.npy"))
    with pytest.raises(ManifestError, match=name):
        copy.load()


class Touch:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_unopened(copy: Copy, tmp_path: Path) -> None:
    trap = Touch(tmp_path / "opened")
    for content in (
        pickle.dumps(trap),
        array_bytes(np.array([trap], object), tmp_path / "trap.npy", allow_pickle=True),
    ):
        copy.write("default_meta.npy", content)
        with pytest.raises(ManifestError):
            copy.load()
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("name", ["ids.json", "users.json", "report.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"5", b'"text"', b"null", b"[[1], {}]", b"\xff"])
def test_a_json_file_that_is_none_or_of_another_shape_does_not_get_past_loading(
    copy: Copy, name: str, content: bytes
) -> None:
    """Refused; never an error that would take the other rankers with it. `null` and an empty report may pass as absent."""
    copy.write(name, content)
    try:
        loaded = copy.load()
    except ManifestError:
        return
    assert name != "ids.json"
    assert isinstance(loaded.report, dict)
    assert content == b"null"


def test_a_warm_up_request_that_is_none_is_refused(copy: Copy) -> None:
    copy.write("warmup.jsonl", b'{"candidates": {"item_ids": []}}\n')
    with pytest.raises(ManifestError):
        copy.load()


@pytest.mark.parametrize("name", ["items.npy", f"{FP32}/encode.onnx"])
def test_a_link_out_of_the_bundle_is_refused(copy: Copy, tmp_path: Path, name: str) -> None:
    path = copy.folder / name
    outside = tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(ManifestError, match="leads out of the bundle"):
        copy.load()


def test_a_linked_folder_out_of_the_bundle_is_refused(copy: Copy, tmp_path: Path) -> None:
    (copy.folder / FP32).rename(tmp_path / "outside")
    (copy.folder / FP32).symlink_to(tmp_path / "outside")
    with pytest.raises(ManifestError, match="leads out of the bundle"):
        copy.load()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "variants/../../outside"])
def test_a_path_out_of_the_bundle_is_refused(copy: Copy, name: str) -> None:
    (copy.folder.parent / "outside").write_bytes(b"")
    copy.change_manifest(lambda m: m["files"].update({name: hashlib.sha256(b"").hexdigest()}))
    if name.startswith("variants/"):
        copy.change_manifest(lambda m: m["files"].update({f"{FP32}/../../../outside": hashlib.sha256(b"").hexdigest()}))
    with pytest.raises(ManifestError, match="leads out of the bundle"):
        copy.load()


# A variant that is refused


def break_digest(copy: Copy, graph: str) -> None:
    path = copy.folder / FP32 / f"{graph}.onnx"
    path.write_bytes(path.read_bytes() + b"\0")


BREAKS: dict[str, Callable[[Copy, str], object]] = {
    "another digest": break_digest,
    "missing": lambda copy, graph: (copy.folder / FP32 / f"{graph}.onnx").unlink(),
    "not vouched for": lambda copy, graph: copy.change_manifest(lambda m: m["files"].pop(f"{FP32}/{graph}.onnx")),
    "truncated": lambda copy, graph: copy.rewrite(f"{FP32}/{graph}.onnx", lambda content: content[: len(content) // 2]),
    "empty": lambda copy, graph: copy.write(f"{FP32}/{graph}.onnx", b""),
    "garbage": lambda copy, graph: copy.write(f"{FP32}/{graph}.onnx", b"garbage"),
    "not numbers": lambda copy, graph: copy.rewrite(f"{FP32}/{graph}.onnx", with_nan),
    "another graph": lambda copy, graph: copy.write(
        f"{FP32}/{graph}.onnx", (copy.folder / FP32 / f"{GRAPHS[GRAPHS.index(graph) - 3]}.onnx").read_bytes()
    ),
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_graph_takes_its_variant_and_no_other(pair: Copy, graph: str, how: str) -> None:
    BREAKS[how](pair, graph)
    loaded = pair.load()
    assert (list(loaded.engines), list(loaded.refused), loaded.default_variant) == (["student"], ["fp32"], "student")
    assert len(loaded.refused["fp32"]) > 10, "a reason"


def test_a_variant_under_another_name_is_refused_and_the_others_serve(pair: Copy) -> None:
    """What computes in float32 cannot be called int8."""
    pair.add_variant("int8")
    loaded = pair.load()
    assert list(loaded.engines) == ["fp32", "student"] and "multiplies by a float weight" in loaded.refused["int8"]
    pair.change_manifest(lambda m: m.update(default_variant="int8"))
    assert pair.load().default_variant in ("fp32", "student")


@pytest.fixture
def with_table(copy: Copy, tmp_path: Path) -> Copy:
    """With a variant whose item table is int8."""
    copy.add_variant("tables8")
    copy.write("items8.npy", array_bytes(middle_max(np.load(copy.folder / "items.npy")), tmp_path / "items8.npy"))
    copy.change_manifest(
        lambda m: m["variants"].update(tables8=m["variants"]["fp32"] | {"items": "items8.npy", "bound": 0.1})
    )
    return copy


def test_a_variant_may_have_an_item_table_of_its_own(with_table: Copy) -> None:
    loaded = with_table.load()
    assert list(loaded.engines) == ["fp32", "tables8"] and loaded.engines["tables8"].items is not loaded.items
    request = RankRequest.model_validate(loaded.manifest.example)
    exact, found = (score_request(loaded, loaded.engines[name], request)["set"] for name in ("fp32", "tables8"))
    assert 0 < np.abs(found - exact).max() < 0.05


RECORDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one row less": lambda a: a[:-1],
    "plain rows": lambda a: a["codes"].astype(np.float32),
    "other records": lambda a: a.astype([("scale", "<f4"), ("middle", "<f2"), ("codes", "i1", a["codes"].shape[1:])]),
    "a scale that is no number": lambda a: a.__setitem__("scale", np.nan) or a,
    "a middle without end": lambda a: a.__setitem__("middle", np.inf) or a,
}


@pytest.mark.parametrize("change", RECORDS)
def test_a_broken_int8_table_takes_the_variants_that_read_it_and_no_other(
    with_table: Copy, tmp_path: Path, change: str
) -> None:
    with_table.write(
        "items8.npy", array_bytes(RECORDS[change](np.load(with_table.folder / "items8.npy")), tmp_path / "changed.npy")
    )
    loaded = with_table.load()
    assert list(loaded.engines) == ["fp32"] and "items8.npy" in loaded.refused["tables8"]


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_an_int8_table_that_is_none_takes_its_variant_and_no_other(with_table: Copy, content: bytes) -> None:
    with_table.write("items8.npy", content)
    assert list(with_table.load().engines) == ["fp32"]
    (with_table.folder / "items8.npy").write_bytes(b"another digest")
    assert "sha256" in with_table.load().refused["tables8"]
    with_table.change_manifest(lambda m: m["files"].pop("items8.npy"))
    assert "no digest of items8.npy" in with_table.load().refused["tables8"]


@pytest.mark.parametrize("width", ["wide", None])
def test_a_graph_that_does_not_say_how_wide_its_state_is_takes_its_variant_and_no_other(
    pair: Copy, width: str | None
) -> None:
    def change(content: bytes) -> bytes:
        graph = onnx.load_from_string(content)
        past = next(value for value in graph.graph.input if value.name == "past_key_0").type.tensor_type.shape.dim[-1]
        past.Clear()
        if width:
            past.dim_param = width
        return graph.SerializeToString()

    pair.rewrite(f"{FP32}/encode.onnx", change)
    loaded = pair.load()
    assert list(loaded.engines) == ["student"] and "past_key_0" in loaded.refused["fp32"]


def test_a_variant_cannot_take_a_shared_file_for_its_table(with_table: Copy) -> None:
    with_table.change_manifest(lambda m: m["variants"]["tables8"].update(items="ids.json"))
    with pytest.raises(ManifestError, match="items"):
        with_table.load()


def test_some_of_the_variants_are_loaded_where_they_are_named(with_table: Copy) -> None:
    assert list(load_bundle(with_table.folder, 1, ("tables8", "elsewhere")).engines) == ["tables8"]
    with pytest.raises(ManifestError, match="none of the variants elsewhere; it has fp32, tables8"):
        load_bundle(with_table.folder, 1, ("elsewhere",))


def test_no_older_version_is_served_for_a_variant_that_the_newest_lacks(tiny: Tiny, copy: Copy) -> None:
    copy.add_variant("student")
    Copy(tiny.folder, copy.root, 2)
    with pytest.raises(ManifestError, match="none of the variants student"):
        load_rankers(copy.root, 1, ("student",))
    assert load_rankers(copy.root, 1, ("fp32", "student"))["tiny"].manifest.version == 2


def test_where_the_default_is_not_served_the_fastest_within_the_gate_is(pair: Copy) -> None:
    def row(ms: float) -> dict[str, Any]:
        return {"rows": [{"encode_p50": ms, "score_p50": ms}]}

    def change(manifest: dict[str, Any]) -> None:
        whole = manifest["variants"]["fp32"]
        manifest["variants"] = {
            "fp32": whole | {"latency_ms": row(3)},
            "student": whole | {"latency_ms": row(1), "within_gate": False},
        }
        manifest["default_variant"] = "int8"

    pair.change_manifest(change)
    assert pair.load().default_variant == "fp32"
    assert load_bundle(pair.folder, 1, ("student",)).default_variant == "student"


GOLDEN: dict[str, Callable[[list[float]], list[float]]] = {
    "one is off": lambda scores: [*scores[:-1], scores[-1] + 1e-3],
    "one is missing": lambda scores: scores[:-1],
    "none": lambda scores: [],
    "a single one": lambda scores: scores[:1],
    "another order": lambda scores: scores[::-1],
    "not a number": lambda scores: [float("nan"), *scores[1:]],
}


@pytest.mark.parametrize("how", GOLDEN)
def test_a_variant_that_misses_its_golden_scores_is_refused(pair: Copy, how: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        mine = manifest["variants"]["fp32"]
        manifest["variants"]["fp32"] = mine | {"golden_scores": GOLDEN[how](mine["golden_scores"])}

    pair.change_manifest(change)
    loaded = pair.load()
    assert (list(loaded.engines), list(loaded.refused)) == (["student"], ["fp32"])


def test_the_reason_names_the_difference_and_the_bound(pair: Copy) -> None:
    pair.change_manifest(
        lambda m: m["variants"]["fp32"].update(golden_scores=[s + 0.25 for s in m["variants"]["fp32"]["golden_scores"]])
    )
    assert "2.50e-01" in pair.load().refused["fp32"]
    assert "bound 1e-05" in pair.load().refused["fp32"]


def test_golden_scores_may_have_a_bound_of_their_own(pair: Copy) -> None:
    """int8 rounds otherwise on another processor, by more than requests on one processor differ."""
    scores = pair.load().manifest.variants["fp32"].golden_scores
    moved = {"golden_scores": [score + 1e-3 for score in scores]}
    pair.change_manifest(
        lambda m: m["variants"].update({name: m["variants"]["fp32"] | moved for name in ("fp32", "student")})
    )
    pair.change_manifest(lambda m: m["variants"]["student"].update(golden_bound=2e-3))
    loaded = pair.load()
    assert list(loaded.engines) == ["student"] and "bound 1e-05" in loaded.refused["fp32"]


def test_a_bundle_whose_variants_are_all_refused_is_refused_with_the_reasons(copy: Copy) -> None:
    BREAKS["garbage"](copy, "dot")
    with pytest.raises(ManifestError, match=r"no variant.*fp32"):
        copy.load()


# Versions and rankers


def test_the_newest_version_serves(tiny: Tiny, copy: Copy) -> None:
    for version in (2, 10, 9):
        Copy(tiny.folder, copy.root, version)
    assert load_rankers(copy.root, 1)["tiny"].manifest.version == 10


def test_an_older_version_serves_where_the_newest_is_broken(tiny: Tiny, copy: Copy) -> None:
    for version, how in ((2, "garbage"), (3, "missing"), (4, "truncated")):
        BREAKS[how](Copy(tiny.folder, copy.root, version), "encode")
    (Copy(tiny.folder, copy.root, 5).folder / "manifest.json").unlink()
    assert load_rankers(copy.root, 1)["tiny"].manifest.version == 1


def test_what_is_not_a_version_is_passed_over(tiny: Tiny, copy: Copy) -> None:
    for name in (".staging-2", "2.part", "latest", "-1", "\N{SUPERSCRIPT TWO}"):
        shutil.copytree(tiny.folder, copy.root / "tiny" / name)
    (copy.root / "README.md").write_text("not a ranker")
    (copy.root / "empty").mkdir()
    rankers = load_rankers(copy.root, 1)
    assert {name: r.manifest.version for name, r in rankers.items()} == {"tiny": 1}


def test_a_broken_ranker_leaves_the_others_serving(tiny: Tiny, copy: Copy) -> None:
    shutil.copytree(tiny.folder, copy.root / "broken" / "1")
    (copy.root / "broken" / "1" / "items.npy").unlink()
    assert list(load_rankers(copy.root, 1)) == ["tiny"]


@pytest.mark.parametrize("place", ["impostor/1", "tiny/7"])
def test_a_bundle_at_the_place_of_another_is_refused(tiny: Tiny, tmp_path: Path, place: str) -> None:
    """Kept histories and metrics go by the manifest's name and version: two bundles must not share them."""
    shutil.copytree(tiny.folder, tmp_path / place)
    with pytest.raises(ManifestError):
        load_rankers(tmp_path, 1)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda root: None,
        lambda root: root.mkdir(),
        lambda root: root.write_text("a file"),
        lambda root: (root / "a" / "1").mkdir(parents=True),
    ],
)
def test_where_nothing_can_be_served_the_root_is_named(tmp_path: Path, prepare: Callable[[Path], object]) -> None:
    root = tmp_path / "nothing-here"
    prepare(root)
    with pytest.raises(ManifestError, match="nothing-here"):
        load_rankers(root, 1)


# Ids, fields and events become rows


def request_of(candidates: dict[str, Any], **members: Any) -> RankRequest:
    return RankRequest.model_validate({"candidates": candidates, **members})


def test_ids_become_their_rows_and_unknown_ones_row_0(ranker: Ranker) -> None:
    ids = list(ranker.vocabulary.items)
    vocabulary = ranker.vocabulary.items
    rows = rows_of(vocabulary, [ids[0], "never seen", ids[-1], ids[0], "", None])
    assert rows.dtype == np.int64
    assert rows.tolist() == [
        FIRST_ITEM,
        UNKNOWN_ITEM,
        FIRST_ITEM + len(ids) - 1,
        FIRST_ITEM,
        UNKNOWN_ITEM,
        UNKNOWN_ITEM,
    ]
    assert rows_of(vocabulary, []).tolist() == []


@given(st.lists(st.integers(0, 9).map(str) | st.none() | st.text(max_size=2), max_size=20))
def test_rows_of_names_equal_the_reference(names: list[str | None]) -> None:
    even = {str(k): 100 + k for k in range(0, 10, 2)}
    assert rows_of(even, names).tolist() == [
        100 + int(name) if name in ("0", "2", "4", "6", "8") else UNKNOWN_ITEM for name in names
    ]


# Integers that are ids


ids_on_the_wire = st.integers(-(2**63), 2**64 - 1) | st.text(st.characters(codec="utf-8"), min_size=1, max_size=5)


@given(
    st.lists(ids_on_the_wire, max_size=12),
    st.lists(ids_on_the_wire, min_size=1, max_size=12),
    st.none() | ids_on_the_wire,
)
def test_integers_become_their_decimal_strings_in_columns_and_user(
    events: list[int | str], candidates: list[int | str], user: int | str | None
) -> None:
    """Mixed columns too, by either way in: as JSON and as Python values."""
    body = {"user": user, "history": {"item_ids": events}, "candidates": {"item_ids": candidates}}
    for request in (RankRequest.model_validate(body), RankRequest.model_validate_json(json.dumps(body))):
        assert request.history.item_ids == [str(i) for i in events]
        assert request.candidates.item_ids == [str(i) for i in candidates]
        assert request.user == (None if user is None else str(user))
        assert {type(i) for i in (*request.history.item_ids, *request.candidates.item_ids)} == {str}


@given(st.data())
def test_an_integer_id_is_its_decimal_string(ranker: Ranker, data: st.DataObject) -> None:
    numbers = st.sampled_from([int(i) for i in ranker.vocabulary.items]) | st.integers(-(2**63), 2**64 - 1)
    ids = data.draw(st.lists(numbers, min_size=1, max_size=10))
    as_numbers, as_strings = (
        request_of({"item_ids": column}, history={"item_ids": column}) for column in (ids, [str(i) for i in ids])
    )
    assert as_numbers == as_strings
    (one, unknown), (other, also) = (ranker.candidates(request, 0.0) for request in (as_numbers, as_strings))
    np.testing.assert_array_equal(one.vectors, other.vectors)
    assert unknown.tolist() == also.tolist() == [k for k, i in enumerate(ids) if str(i) not in ranker.vocabulary.items]
    np.testing.assert_array_equal(ranker.history(as_numbers)[0].items, ranker.history(as_strings)[0].items)


@pytest.mark.parametrize("wrong", [True, 1.0, 1.5, None, "", "x" * 257, [], {}, 2**64, -(2**63) - 1], ids=repr)
def test_what_is_no_id_is_refused_where_it_stands(wrong: object) -> None:
    """By the place of the member, in a column by the index of its first fault; in a column of numbers and strings as in one of strings."""
    for before in (["1", "2"], ["1", 2]):
        for body, place in (
            ({"candidates": {"item_ids": [*before, wrong, wrong]}}, ("candidates", "item_ids", 2)),
            (
                {"candidates": {"item_ids": ["1"]}, "history": {"item_ids": [*before, wrong, wrong]}},
                ("history", "item_ids", 2),
            ),
            ({"candidates": {"item_ids": ["1"]}, "user": wrong}, ("user",)),
        ):
            if place == ("user",) and wrong is None:
                continue  # no user
            with pytest.raises(ValidationError) as refused:
                RankRequest.model_validate(body)
            assert {found["loc"][: len(place)] for found in refused.value.errors()} == {place}
            assert schema_error(refused.value).faults[0].pointer == "/" + "/".join(map(str, place))
            assert len(schema_error(refused.value).faults) == 1


def test_an_empty_column_of_events_is_well_and_one_of_candidates_is_not() -> None:
    assert request_of({"item_ids": ["1"]}, history={"item_ids": []}).history.item_ids == []
    with pytest.raises(ValidationError, match="at least 1 item"):
        request_of({"item_ids": []})


def test_the_two_reserved_rows_belong_to_no_id(ranker: Ranker) -> None:
    assert min(ranker.vocabulary.items.values()) == FIRST_ITEM
    assert len(ranker.vocabulary.items) == len(ranker.items) - FIRST_ITEM


def slow_vector(ranker: Ranker, fields: dict[str, Any], position: int) -> np.ndarray:
    """By the text of the contract: the unknown row holds "none" in every column; a known value takes its place."""
    vector = ranker.items[UNKNOWN_ITEM].astype(np.float64)
    for column, field in ranker.manifest.fields.items():
        given = fields.get(column, [None] * (position + 1))[position]
        given = [given] if isinstance(given, str) else given or []
        known = [
            ranker.field_vectors[field.offset + 1 + field.values.index(value)].astype(np.float64)
            for value in given
            if value in field.values
        ]
        if known:
            vector += sum(known) / len(known) - ranker.field_vectors[field.offset]
    return vector


@settings(max_examples=50)
@given(st.data())
def test_an_unknown_item_is_embedded_from_its_fields(ranker: Ranker, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 6))
    ids = data.draw(
        st.lists(st.sampled_from(["new", "newer", *list(ranker.vocabulary.items)[:3]]), min_size=n, max_size=n)
    )
    fields: dict[str, Any] = {}
    for column, field in ranker.manifest.fields.items():
        value = st.sampled_from([*field.values, "no such value"])
        if data.draw(st.booleans()):
            fields[column] = data.draw(
                st.lists(st.none() | value | st.lists(value, max_size=4), min_size=n, max_size=n)
            )
    candidates, unknown = ranker.candidates(request_of({"item_ids": ids, "fields": fields}), 0.0)
    assert unknown.tolist() == [k for k, item in enumerate(ids) if item.startswith("new")]
    for k, item in enumerate(ids):
        expected = slow_vector(ranker, fields, k) if k in unknown else ranker.items[ranker.vocabulary.items[item]]
        np.testing.assert_allclose(candidates.vectors[k], expected, atol=1e-5)
    assert candidates.vectors.dtype == np.float32


def test_describing_unknown_items_does_not_touch_the_table(ranker: Ranker) -> None:
    before = np.array(ranker.items)
    ranker.candidates(request_of({"item_ids": ["new"], "fields": {"genres": ["Drama"]}}), 0.0)
    np.testing.assert_array_equal(ranker.items, before)


def test_features_come_in_the_manifests_order_and_missing_ones_are_not_numbers(ranker: Ranker) -> None:
    first, second = ranker.manifest.features
    candidates, _ = ranker.candidates(request_of({"item_ids": [1, 2], "features": {second: [5, None]}}), 0.0)
    np.testing.assert_array_equal(candidates.numeric, np.array([[np.nan, 5.0], [np.nan, np.nan]], np.float32))
    candidates, _ = ranker.candidates(
        request_of({"item_ids": [1], "features": {second: [1e308], first: [-1e308]}}), 0.0
    )
    assert np.isfinite(candidates.numeric).all()


def test_a_history_becomes_rows_and_what_is_missing_or_unknown_keeps_its_place(ranker: Ranker) -> None:
    item = next(iter(ranker.vocabulary.items))
    action = ranker.manifest.actions[0]
    sent = {
        "item_ids": [item, "never seen", item],
        "actions": [action, None, "never seen"],
        "timestamps": [100, None, 200],
    }
    history, dropped = ranker.history(request_of({"item_ids": ["1"]}, history=sent))
    assert (history.items.tolist(), history.actions.tolist(), history.gaps.tolist(), dropped) == (
        [FIRST_ITEM, UNKNOWN_ITEM, FIRST_ITEM],
        [1, UNKNOWN_ACTION, UNKNOWN_ACTION],
        [GAP_FIRST, GAP_MISSING, GAP_MISSING],
        0,
    )


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_history_of_ids_alone_has_neither_actions_nor_times(ranker: Ranker, n: int) -> None:
    history, dropped = ranker.history(request_of({"item_ids": ["1"]}, history={"item_ids": ["1"] * n}))
    assert (history.actions.tolist(), history.gaps.tolist(), dropped) == (
        [UNKNOWN_ACTION] * n,
        ([GAP_FIRST] + [GAP_MISSING] * n)[:n],
        0,
    )


def test_a_long_history_is_read_from_its_window_on_as_if_the_rest_had_not_been_sent(ranker: Ranker) -> None:
    longest = ranker.manifest.limits.history_used
    sent = {
        "item_ids": list(ranker.vocabulary.items)[: longest + 70],
        "timestamps": [1_000 + k**2 for k in range(longest + 70)],
    }
    history, dropped = ranker.history(request_of({"item_ids": ["1"]}, history=sent))
    assert dropped == 128  # the smallest multiple of 64 past the first 70
    rest = {name: column[dropped:] for name, column in sent.items()} | {"offset": dropped}
    again, dropped_again = ranker.history(request_of({"item_ids": ["1"]}, history=rest))
    assert (again.equals(history), len(history), dropped_again) == (True, longest + 70 - 128, 0)


def test_the_score_weighs_heads_as_the_request_says_or_the_manifest(ranker: Ranker) -> None:
    names = list(ranker.manifest.heads)
    assert ranker.score_weights(None).tolist() == list(ranker.manifest.heads.values())
    assert ranker.score_weights({names[1]: 3.0}).tolist() == [0.0, 3.0]


def test_the_golden_request_gives_its_golden_scores(ranker: Ranker) -> None:
    """By hand and through the slow way, for it is what every refusal is decided by."""
    manifest = ranker.manifest
    request = RankRequest.model_validate(manifest.example)
    assert request.request_time is not None
    candidates, _ = ranker.candidates(request, request.request_time)
    meta = ranker.embedded_meta[ranker.embedded_users[str(request.user)]]
    probabilities = ranker.engines["fp32"].score(ranker.history(request)[0], candidates, meta, manifest.default_exit)
    scores = sum(weight * probabilities[:, k] for k, weight in enumerate(manifest.heads.values()))
    np.testing.assert_allclose(scores, manifest.variants["fp32"].golden_scores, atol=manifest.variants["fp32"].bound)
