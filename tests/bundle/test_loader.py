"""Loading of bundles: which broken bundles and variants are refused, and how requests become arrays."""

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
from slatewise.bundle.golden import score_request
from slatewise.bundle.loader import load_bundle, load_rankers
from slatewise.bundle.manifest import ManifestError
from slatewise.bundle.ranker import Ranker
from slatewise.http.problems import schema_error
from slatewise.inference.arrays import FIRST_ITEM, GAP_FIRST, GAP_MISSING, UNKNOWN_ACTION, UNKNOWN_ITEM
from slatewise.schemas import RankRequest
from slatewise_train.bundle_writer import write_graphs
from slatewise_train.compression.item_quantization import middle_max
from slatewise_train.rankers import families
from slatewise_train.rankers.base import uncalibrated
from tests.support.bundle_copy import FP32, GRAPHS, Copy, array_bytes

if TYPE_CHECKING:
    from tests.conftest import Tiny


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Copy:
    return Copy(tiny.folder, tmp_path)


@pytest.fixture
def pair(copy: Copy) -> Copy:
    """A copy with a second variant, `student`, so that fp32 can break alone."""
    copy.add_variant("student")
    return copy


def with_nan(model: bytes) -> bytes:
    """Return the model with NaN as its first float weight."""
    graph = onnx.load_from_string(model)
    weights = next(w for w in graph.graph.initializer if w.data_type == onnx.TensorProto.FLOAT)
    broken = np.full_like(numpy_helper.to_array(weights), np.nan)
    weights.CopyFrom(numpy_helper.from_array(broken, weights.name))
    return graph.SerializeToString()


def test_load_valid_bundle_serves_every_variant(pair: Copy, ranker: Ranker) -> None:
    loaded = pair.load()
    assert (set(loaded.engines), loaded.refused, loaded.default_variant) == ({"fp32", "student"}, {}, "fp32")
    np.testing.assert_array_equal(loaded.items, ranker.items)


# A bundle that is refused


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '"x"', "{}", '{"format": 3}', '{"format": "1"}', '{"format": null}', "\0"]
)
def test_load_manifest_without_known_format_is_refused(copy: Copy, content: str) -> None:
    (copy.folder / "manifest.json").write_text(content)
    with pytest.raises(ManifestError, match=r"format|manifest\.json"):
        copy.load()


@pytest.mark.parametrize("found", [0, 3, "1", "2", None])
def test_load_unknown_format_is_refused_with_its_number(copy: Copy, found: object) -> None:
    copy.change_manifest(lambda m: m.update(format=found))
    with pytest.raises(ManifestError, match=rf"format {found!r} is not known, this version reads formats 1 and 2"):
        copy.load()


def as_format_1(manifest: dict[str, Any]) -> None:
    del manifest["model"]
    manifest["format"] = 1
    for name in ("weights.npz", f"{FP32}/calibration.json"):
        del manifest["files"][name]


def test_load_format_1_gives_the_same_scores(copy: Copy, ranker: Ranker) -> None:
    copy.change_manifest(as_format_1)
    (copy.folder / "weights.npz").unlink()
    (copy.folder / FP32 / "calibration.json").unlink()
    loaded = copy.load()
    request = RankRequest.model_validate(loaded.manifest.example)
    found, expected = (score_request(one, one.engines["fp32"], request) for one in (loaded, ranker))
    assert loaded.manifest.model is None and found.keys() == expected.keys()
    for exit, probabilities in expected.items():
        np.testing.assert_array_equal(found[exit], probabilities)


@pytest.fixture
def without_meta(tiny: Tiny, tmp_path: Path) -> Copy:
    """A bundle whose ranker reads no meta-embeddings; its graph `point` has an empty input for them."""
    copy = Copy(tiny.folder, tmp_path)
    model = tiny.trainer.model.without_meta()
    identity = uncalibrated(model.exits, 2)
    write_graphs(copy.folder / FP32, families.graphs(model, identity, 256).all())
    for graph in GRAPHS:
        copy.rewrite(f"{FP32}/{graph}.onnx", lambda content: content)
    copy.change_manifest(lambda m: m.update(meta_size=0))
    copy.change_manifest(lambda m: m["variants"]["fp32"].update(golden_bound=1))
    for name in ("default_meta.npy", "meta_embeddings.npy", "users.json"):
        (copy.folder / name).unlink()
        copy.change_manifest(lambda m, name=name: m["files"].pop(name))
    return copy


def test_load_without_meta_embeddings_needs_no_meta_files(without_meta: Copy) -> None:
    loaded = without_meta.load()
    assert list(loaded.engines) == ["fp32"]
    assert loaded.default_meta.shape == (0,) and loaded.embedded_meta.shape == (0, 0) and not loaded.embedded_users


def test_load_folder_without_manifest_is_refused(copy: Copy) -> None:
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
    "no model in format 2": lambda m: m.pop("model"),
    "a model in format 1": lambda m: m.update(format=1),
    "a model without a family": lambda m: m["model"].update(family=""),
    "weights outside of the bundle": lambda m: m["model"].update(weights="../weights.npz"),
    "slates without candidates": lambda m: m["limits"].update(set_wise=0),
    "weights without a digest": lambda m: m["model"].update(weights="other.npz"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_load_invalid_manifest_is_refused(copy: Copy, change: str) -> None:
    copy.change_manifest(CHANGES[change])
    with pytest.raises(ManifestError):
        copy.load()


SHARED_FILES = [
    "items.npy",
    "ids.json",
    "fields.npy",
    "weights.npz",
    "default_meta.npy",
    "meta_embeddings.npy",
    "users.json",
    "display.json",
    "report.json",
    "warmup.jsonl",
]


@pytest.mark.parametrize("name", SHARED_FILES)
def test_load_file_with_other_digest_is_refused_with_its_name(copy: Copy, name: str) -> None:
    path = copy.folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ManifestError, match=f"{name}.*sha256"):
        copy.load()


@pytest.mark.parametrize("name", SHARED_FILES)
def test_load_missing_file_is_refused_with_its_name(copy: Copy, name: str) -> None:
    (copy.folder / name).unlink()
    with pytest.raises(ManifestError, match=f"{name} is missing"):
        copy.load()


@pytest.mark.parametrize("name", SHARED_FILES)
def test_load_file_without_digest_is_not_read(copy: Copy, name: str) -> None:
    """The bundle is refused, or it is loaded as if an optional file were absent."""
    copy.change_manifest(lambda m: m["files"].pop(name))
    (copy.folder / name).write_bytes(b"not what was published")
    try:
        loaded = copy.load()
    except ManifestError as error:
        assert name in str(error)
    else:
        assert name not in ("items.npy", "ids.json", "fields.npy", "weights.npz", "default_meta.npy")
        assert loaded.engines


def test_load_truncated_array_is_refused(copy: Copy) -> None:
    path = copy.folder / "items.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ManifestError, match=r"items\.npy"):
        copy.load()


@pytest.mark.parametrize("name", ["items.npy", "fields.npy", "default_meta.npy", "meta_embeddings.npy"])
@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_load_truncated_array_with_its_digest_is_refused(copy: Copy, name: str, kept: int) -> None:
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
def test_load_array_of_other_shape_or_dtype_is_refused(copy: Copy, tmp_path: Path, name: str, change: str) -> None:
    copy.write(name, array_bytes(ARRAYS[change](np.load(copy.folder / name)), tmp_path / "changed.npy"))
    with pytest.raises(ManifestError, match=name):
        copy.load()


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_load_pickle_is_refused_without_unpickling(copy: Copy, tmp_path: Path) -> None:
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
def test_load_invalid_json_file_raises_only_manifest_error(copy: Copy, name: str, content: bytes) -> None:
    """Any other error would prevent the other rankers from loading. `null` may count as an absent file."""
    copy.write(name, content)
    try:
        loaded = copy.load()
    except ManifestError:
        return
    assert name != "ids.json"
    assert isinstance(loaded.report, dict)
    assert content == b"null"


def test_load_invalid_warmup_request_is_refused(copy: Copy) -> None:
    copy.write("warmup.jsonl", b'{"candidates": {"item_ids": []}}\n')
    with pytest.raises(ManifestError):
        copy.load()


@pytest.mark.parametrize("name", ["items.npy", f"{FP32}/encode.onnx"])
def test_load_symlink_to_file_outside_bundle_is_refused(copy: Copy, tmp_path: Path, name: str) -> None:
    path = copy.folder / name
    outside = tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(ManifestError, match="leads out of the bundle"):
        copy.load()


def test_load_symlink_to_folder_outside_bundle_is_refused(copy: Copy, tmp_path: Path) -> None:
    (copy.folder / FP32).rename(tmp_path / "outside")
    (copy.folder / FP32).symlink_to(tmp_path / "outside")
    with pytest.raises(ManifestError, match="leads out of the bundle"):
        copy.load()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "variants/../../outside"])
def test_load_path_outside_the_bundle_is_refused(copy: Copy, name: str) -> None:
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
def test_load_broken_graph_refuses_only_its_variant(pair: Copy, graph: str, how: str) -> None:
    BREAKS[how](pair, graph)
    loaded = pair.load()
    assert (list(loaded.engines), list(loaded.refused), loaded.default_variant) == (["student"], ["fp32"], "student")
    assert len(loaded.refused["fp32"]) > 10, "a reason"


@pytest.fixture
def with_table(copy: Copy, tmp_path: Path) -> Copy:
    """A copy with a second variant, `tables8`, that has an int8 item table."""
    copy.add_variant("tables8")
    copy.write("items8.npy", array_bytes(middle_max(np.load(copy.folder / "items.npy")), tmp_path / "items8.npy"))
    copy.change_manifest(
        lambda m: m["variants"].update(tables8=m["variants"]["fp32"] | {"items": "items8.npy", "bound": 0.1})
    )
    return copy


def test_load_variant_with_int8_items_uses_its_own_table(with_table: Copy) -> None:
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
def test_load_broken_int8_table_refuses_only_its_variants(with_table: Copy, tmp_path: Path, change: str) -> None:
    with_table.write(
        "items8.npy", array_bytes(RECORDS[change](np.load(with_table.folder / "items8.npy")), tmp_path / "changed.npy")
    )
    loaded = with_table.load()
    assert list(loaded.engines) == ["fp32"] and "items8.npy" in loaded.refused["tables8"]


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_load_unreadable_int8_table_refuses_only_its_variant(with_table: Copy, content: bytes) -> None:
    with_table.write("items8.npy", content)
    assert list(with_table.load().engines) == ["fp32"]
    (with_table.folder / "items8.npy").write_bytes(b"another digest")
    assert "sha256" in with_table.load().refused["tables8"]
    with_table.change_manifest(lambda m: m["files"].pop("items8.npy"))
    assert "no digest of items8.npy" in with_table.load().refused["tables8"]


@pytest.mark.parametrize("width", ["wide", None])
def test_load_graph_without_state_width_refuses_only_its_variant(pair: Copy, width: str | None) -> None:
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


def test_load_variant_with_other_item_file_is_refused(with_table: Copy) -> None:
    with_table.change_manifest(lambda m: m["variants"]["tables8"].update(items="ids.json"))
    with pytest.raises(ManifestError, match="items"):
        with_table.load()


def test_load_chosen_variants_loads_only_these(with_table: Copy) -> None:
    assert list(load_bundle(with_table.folder, ("tables8", "elsewhere")).engines) == ["tables8"]
    with pytest.raises(ManifestError, match="none of the variants elsewhere; it has fp32, tables8"):
        load_bundle(with_table.folder, ("elsewhere",))


def test_load_variant_missing_in_newest_loads_no_older_version(tiny: Tiny, copy: Copy) -> None:
    copy.add_variant("student")
    Copy(tiny.folder, copy.root, 2)
    with pytest.raises(ManifestError, match="none of the variants student"):
        load_rankers(copy.root, ("student",))
    assert load_rankers(copy.root, ("fp32", "student"))["tiny"].manifest.version == 2


def test_refused_default_variant_gives_fastest_within_gate(pair: Copy) -> None:
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
    assert load_bundle(pair.folder, ("student",)).default_variant == "student"


GOLDEN: dict[str, Callable[[list[float]], list[float]]] = {
    "one is off": lambda scores: [*scores[:-1], scores[-1] + 1e-3],
    "one is missing": lambda scores: scores[:-1],
    "none": lambda scores: [],
    "a single one": lambda scores: scores[:1],
    "another order": lambda scores: scores[::-1],
    "not a number": lambda scores: [float("nan"), *scores[1:]],
}


@pytest.mark.parametrize("how", GOLDEN)
def test_load_variant_with_other_golden_scores_is_refused(pair: Copy, how: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        mine = manifest["variants"]["fp32"]
        manifest["variants"]["fp32"] = mine | {"golden_scores": GOLDEN[how](mine["golden_scores"])}

    pair.change_manifest(change)
    loaded = pair.load()
    assert (list(loaded.engines), list(loaded.refused)) == (["student"], ["fp32"])


def test_refusal_by_golden_scores_names_difference_and_bound(pair: Copy) -> None:
    pair.change_manifest(
        lambda m: m["variants"]["fp32"].update(golden_scores=[s + 0.25 for s in m["variants"]["fp32"]["golden_scores"]])
    )
    assert "2.50e-01" in pair.load().refused["fp32"]
    assert "bound 1e-05" in pair.load().refused["fp32"]


def test_load_golden_bound_overrides_the_bound(pair: Copy) -> None:
    """int8 scores differ more between processors than between requests on one processor."""
    scores = pair.load().manifest.variants["fp32"].golden_scores
    moved = {"golden_scores": [score + 1e-3 for score in scores]}
    pair.change_manifest(
        lambda m: m["variants"].update({name: m["variants"]["fp32"] | moved for name in ("fp32", "student")})
    )
    pair.change_manifest(lambda m: m["variants"]["student"].update(golden_bound=2e-3))
    loaded = pair.load()
    assert list(loaded.engines) == ["student"] and "bound 1e-05" in loaded.refused["fp32"]


def test_load_all_variants_refused_names_the_reasons(copy: Copy) -> None:
    BREAKS["garbage"](copy, "dot")
    with pytest.raises(ManifestError, match=r"no variant.*fp32"):
        copy.load()


# Versions and rankers


def test_load_rankers_serves_the_newest_version(tiny: Tiny, copy: Copy) -> None:
    for version in (2, 10, 9):
        Copy(tiny.folder, copy.root, version)
    assert load_rankers(copy.root)["tiny"].manifest.version == 10


def test_load_rankers_newest_broken_serves_older_version(tiny: Tiny, copy: Copy) -> None:
    for version, how in ((2, "garbage"), (3, "missing"), (4, "truncated")):
        BREAKS[how](Copy(tiny.folder, copy.root, version), "encode")
    (Copy(tiny.folder, copy.root, 5).folder / "manifest.json").unlink()
    assert load_rankers(copy.root)["tiny"].manifest.version == 1


def test_load_rankers_ignores_folders_that_are_no_version(tiny: Tiny, copy: Copy) -> None:
    for name in (".staging-2", "2.part", "latest", "-1", "\N{SUPERSCRIPT TWO}"):
        shutil.copytree(tiny.folder, copy.root / "tiny" / name)
    (copy.root / "README.md").write_text("not a ranker")
    (copy.root / "empty").mkdir()
    rankers = load_rankers(copy.root)
    assert {name: r.manifest.version for name, r in rankers.items()} == {"tiny": 1}


def test_load_rankers_with_broken_ranker_serves_the_others(tiny: Tiny, copy: Copy) -> None:
    shutil.copytree(tiny.folder, copy.root / "broken" / "1")
    (copy.root / "broken" / "1" / "items.npy").unlink()
    assert list(load_rankers(copy.root)) == ["tiny"]


@pytest.mark.parametrize("place", ["impostor/1", "tiny/7"])
def test_load_rankers_bundle_at_wrong_path_is_refused(tiny: Tiny, tmp_path: Path, place: str) -> None:
    """The history cache and metrics use the manifest's name and version, so two bundles must not share them."""
    shutil.copytree(tiny.folder, tmp_path / place)
    with pytest.raises(ManifestError):
        load_rankers(tmp_path)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda root: None,
        lambda root: root.mkdir(),
        lambda root: root.write_text("a file"),
        lambda root: (root / "a" / "1").mkdir(parents=True),
    ],
)
def test_load_rankers_without_bundle_names_the_root(tmp_path: Path, prepare: Callable[[Path], object]) -> None:
    root = tmp_path / "nothing-here"
    prepare(root)
    with pytest.raises(ManifestError, match="nothing-here"):
        load_rankers(root)


# Ids, fields and events become rows


def request_of(candidates: dict[str, Any], **members: Any) -> RankRequest:
    return RankRequest.model_validate({"candidates": candidates, **members})


def test_rows_of_unknown_ids_are_row_0(ranker: Ranker) -> None:
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
def test_request_integer_ids_become_decimal_strings(
    events: list[int | str], candidates: list[int | str], user: int | str | None
) -> None:
    """Also in columns of mixed types, from JSON and from Python values."""
    body = {"user": user, "history": {"item_ids": events}, "candidates": {"item_ids": candidates}}
    for request in (RankRequest.model_validate(body), RankRequest.model_validate_json(json.dumps(body))):
        assert request.history.item_ids == [str(i) for i in events]
        assert request.candidates.item_ids == [str(i) for i in candidates]
        assert request.user == (None if user is None else str(user))
        assert {type(i) for i in (*request.history.item_ids, *request.candidates.item_ids)} == {str}


@given(st.data())
def test_integer_id_ranks_like_its_decimal_string(ranker: Ranker, data: st.DataObject) -> None:
    numbers = st.sampled_from([int(i) for i in ranker.vocabulary.items]) | st.integers(-(2**63), 2**64 - 1)
    ids = data.draw(st.lists(numbers, min_size=1, max_size=10))
    as_numbers, as_strings = (
        request_of({"item_ids": column}, history={"item_ids": column}) for column in (ids, [str(i) for i in ids])
    )
    assert as_numbers == as_strings
    (one, unknown), (other, also) = (ranker.candidates(request, 0.0) for request in (as_numbers, as_strings))
    np.testing.assert_array_equal(one.vectors, other.vectors)
    assert (
        unknown.positions.tolist()
        == also.positions.tolist()
        == [k for k, i in enumerate(ids) if str(i) not in ranker.vocabulary.items]
    )
    np.testing.assert_array_equal(ranker.history(as_numbers).items, ranker.history(as_strings).items)


@pytest.mark.parametrize("wrong", [True, 1.0, 1.5, None, "", "x" * 257, [], {}, 2**64, -(2**63) - 1], ids=repr)
def test_request_with_invalid_id_is_refused_with_its_position(wrong: object) -> None:
    """The position is a JSON pointer, in a column to the first fault, also for columns of mixed types."""
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


def test_request_needs_candidates_but_no_events() -> None:
    assert request_of({"item_ids": ["1"]}, history={"item_ids": []}).history.item_ids == []
    with pytest.raises(ValidationError, match="at least 1 item"):
        request_of({"item_ids": []})


def test_vocabulary_leaves_two_rows_reserved(ranker: Ranker) -> None:
    assert min(ranker.vocabulary.items.values()) == FIRST_ITEM
    assert len(ranker.vocabulary.items) == len(ranker.items) - FIRST_ITEM


def slow_vector(ranker: Ranker, fields: dict[str, Any], position: int) -> np.ndarray:
    """The reference: the unknown row stands for missing values, and the mean of known values replaces a column."""
    vector = ranker.items[UNKNOWN_ITEM].astype(np.float64)
    for column, field in ranker.manifest.fields.items():
        given = fields.get(column, [None] * (position + 1))[position]
        given = [given] if isinstance(given, str) else given or []
        given = [part for value in given for part in ([value] if value in field.values else value.split("|"))]
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
def test_unknown_item_is_embedded_from_its_fields(ranker: Ranker, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 6))
    ids = data.draw(
        st.lists(st.sampled_from(["new", "newer", *list(ranker.vocabulary.items)[:3]]), min_size=n, max_size=n)
    )
    fields: dict[str, Any] = {}
    for column, field in ranker.manifest.fields.items():
        value = st.sampled_from([*field.values, "no such value", f"{field.values[0]}|{field.values[-1]}|no such value"])
        if data.draw(st.booleans()):
            fields[column] = data.draw(
                st.lists(st.none() | value | st.lists(value, max_size=4), min_size=n, max_size=n)
            )
    candidates, unknown = ranker.candidates(request_of({"item_ids": ids, "fields": fields}), 0.0)
    assert unknown.positions.tolist() == [k for k, item in enumerate(ids) if item.startswith("new")]
    for k, item in enumerate(ids):
        expected = (
            slow_vector(ranker, fields, k) if k in unknown.positions else ranker.items[ranker.vocabulary.items[item]]
        )
        np.testing.assert_allclose(candidates.vectors[k], expected, atol=1e-5)
    assert candidates.vectors.dtype == np.float32


def test_unknown_field_values_are_counted_by_field(ranker: Ranker) -> None:
    known = next(iter(ranker.vocabulary.items))
    genres = ["Drama|never", ["never", "heard"], "never", None]
    sent = {"item_ids": ["new", "newer", known, "new"], "fields": {"genres": genres, "decade": ["1990s"] * 4}}
    unknown = ranker.candidates(request_of(sent), 0.0)[1]
    assert unknown.positions.tolist() == [0, 1, 3] and unknown.field_values == {"genres": 3}


def test_unknown_item_with_fields_leaves_table_unchanged(ranker: Ranker) -> None:
    before = np.array(ranker.items)
    ranker.candidates(request_of({"item_ids": ["new"], "fields": {"genres": ["Drama"]}}), 0.0)
    np.testing.assert_array_equal(ranker.items, before)


def test_features_are_ordered_and_missing_ones_are_nan(ranker: Ranker) -> None:
    first, second = ranker.manifest.features
    candidates, _ = ranker.candidates(request_of({"item_ids": [1, 2], "features": {second: [5, None]}}), 0.0)
    np.testing.assert_array_equal(candidates.numeric, np.array([[np.nan, 5.0], [np.nan, np.nan]], np.float32))
    candidates, _ = ranker.candidates(
        request_of({"item_ids": [1], "features": {second: [1e308], first: [-1e308]}}), 0.0
    )
    assert np.isfinite(candidates.numeric).all()


def test_unknown_or_missing_history_values_keep_their_position(ranker: Ranker) -> None:
    item = next(iter(ranker.vocabulary.items))
    action = ranker.manifest.actions[0]
    sent = {
        "item_ids": [item, "never seen", item],
        "actions": [action, None, "never seen"],
        "timestamps": [100, None, 200],
    }
    request = request_of({"item_ids": ["1"]}, history=sent)
    history = ranker.history(request)
    dropped = ranker.window_start(request)
    assert (history.items.tolist(), history.actions.tolist(), history.gaps.tolist(), dropped) == (
        [FIRST_ITEM, UNKNOWN_ITEM, FIRST_ITEM],
        [1, UNKNOWN_ACTION, UNKNOWN_ACTION],
        [GAP_FIRST, GAP_MISSING, GAP_MISSING],
        0,
    )


@pytest.mark.parametrize("events", [1, 12, 300])
def test_newest_first_history_is_read_oldest_first(ranker: Ranker, events: int) -> None:
    """300 events are more than the ranker reads, so the newest ones must be chosen too."""
    ids, actions = list(ranker.vocabulary.items), ranker.manifest.actions
    sent: dict[str, list[Any]] = {
        "item_ids": [ids[k % len(ids)] for k in range(events)],
        "actions": [actions[k % len(actions)] for k in range(events)],
        "timestamps": [1_000 + k // 2 for k in range(events)],  # two events at each time
    }
    right = ranker.history(request_of({"item_ids": ["1"]}, history=sent))
    backwards = {name: column[::-1] for name, column in sent.items()}
    history, late, _ = ranker.read_history(request_of({"item_ids": ["1"]}, history=backwards))
    assert history.equals(right)
    assert late == (events - 2 if events > 1 else 0), "the two newest events are behind no later one"


def test_two_exchanged_events_are_read_in_time_order(ranker: Ranker) -> None:
    ids = list(ranker.vocabulary.items)[:4]
    sent = {"item_ids": ids, "timestamps": [10, 20, 30, 40]}
    exchanged = {"item_ids": [ids[k] for k in (0, 2, 1, 3)], "timestamps": [10, 30, 20, 40]}
    history, late, _ = ranker.read_history(request_of({"item_ids": ["1"]}, history=exchanged))
    assert late == 1 and history.equals(ranker.history(request_of({"item_ids": ["1"]}, history=sent)))


@pytest.mark.parametrize("n", [0, 1, 3])
def test_history_of_ids_has_unknown_actions_and_missing_gaps(ranker: Ranker, n: int) -> None:
    request = request_of({"item_ids": ["1"]}, history={"item_ids": ["1"] * n})
    history = ranker.history(request)
    dropped = ranker.window_start(request)
    assert (history.actions.tolist(), history.gaps.tolist(), dropped) == (
        [UNKNOWN_ACTION] * n,
        ([GAP_FIRST] + [GAP_MISSING] * n)[:n],
        0,
    )


def test_long_history_reads_only_its_window(ranker: Ranker) -> None:
    longest = ranker.manifest.limits.history_used
    sent = {
        "item_ids": list(ranker.vocabulary.items)[: longest + 70],
        "timestamps": [1_000 + k**2 for k in range(longest + 70)],
    }
    request = request_of({"item_ids": ["1"]}, history=sent)
    history = ranker.history(request)
    dropped = ranker.window_start(request)
    assert dropped == 128  # the smallest multiple of 64 past the first 70
    rest = {name: column[dropped:] for name, column in sent.items()} | {"offset": dropped}
    shorter = request_of({"item_ids": ["1"]}, history=rest)
    again = ranker.history(shorter)
    dropped_again = ranker.window_start(shorter)
    assert (again.equals(history), len(history), dropped_again) == (True, longest + 70 - 128, 0)


def test_score_weights_come_from_request_or_manifest(ranker: Ranker) -> None:
    names = list(ranker.manifest.heads)
    assert ranker.score_weights(None).tolist() == list(ranker.manifest.heads.values())
    assert ranker.score_weights({names[1]: 3.0}).tolist() == [0.0, 3.0]


def test_golden_request_gives_the_golden_scores(ranker: Ranker) -> None:
    """The scores are computed in the test, independently of the loader's check."""
    manifest = ranker.manifest
    request = RankRequest.model_validate(manifest.example)
    assert request.request_time is not None
    candidates, _ = ranker.candidates(request, request.request_time)
    meta = ranker.embedded_meta[ranker.embedded_users[str(request.user)]]
    probabilities = ranker.engines["fp32"].score(ranker.history(request), candidates, meta, manifest.default_exit)
    scores = sum(weight * probabilities[:, k] for k, weight in enumerate(manifest.heads.values()))
    np.testing.assert_allclose(scores, manifest.variants["fp32"].golden_scores, atol=manifest.variants["fp32"].bound)
