"""Versions of a ranker to publish, good ones and bad ones, and a server that may load them.

Called by: tests/versions and loadtest/chaos. Calls: `slatewise/main.py`, onnx.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from slatewise.bundle.files import Files
from slatewise.bundle.golden import score_request
from slatewise.bundle.loader import make_ranker
from slatewise.bundle.manifest import read_manifest
from slatewise.inference.engine import Engine
from slatewise.schemas import RankRequest
from slatewise.settings import Settings
from tests.support.application import serve
from tests.support.bundle_copy import FP32, Copy

KEY = "an-admin-key-of-tests"
FAILS = 7  # events; no request of the bundle and none of the probe has as many
HEADERS = {"Authorization": f"Bearer {KEY}"}


def publish(source: Path, root: Path, version: int, change: Callable[[Copy], object] = lambda copy: None) -> Path:
    """Copy a bundle to `root` as another version, which `change` may change. Its golden scores are its own.

    As a publisher does, beside the target, and renamed at the end.
    """
    copy = Copy(source, root / ".staging", version)
    copy.change_manifest(lambda m: m.update(version=version))
    change(copy)
    manifest = read_manifest(copy.folder)
    ranker = make_ranker(Files(copy.folder, None), manifest)
    engine = Engine(copy.folder / FP32, ranker.items, manifest.exits)
    found = score_request(ranker, engine, RankRequest.model_validate(manifest.example))
    scores = (found[manifest.default_exit] @ ranker.score_weights(None)).tolist()
    copy.change_manifest(lambda m: m["variants"]["fp32"].update(golden_scores=scores))
    target = root / manifest.ranker / str(version)
    target.parent.mkdir(parents=True, exist_ok=True)
    copy.folder.rename(target)
    shutil.rmtree(root / ".staging")
    return target


def shuffled(copy: Copy) -> None:
    """The items get each other's vectors: the order of the results means nothing."""
    table = np.load(copy.folder / "items.npy")
    rows = 2 + np.random.default_rng(0).permutation(len(table) - 2)
    copy.write("items.npy", npy(np.concatenate([table[:2], table[rows]])))


def renamed_output(graph: onnx.GraphProto, suffix: str) -> str:
    """Return the name of the first output, whose value is now called NAME_suffix: new nodes compute the output."""
    output: str = graph.output[0].name
    for node in graph.node:
        node.output[:] = [f"{name}_{suffix}" if name == output else name for name in node.output]
    return output


def slow(copy: Copy) -> None:
    """The exit `set` does a lot of useless work."""

    def change(content: bytes) -> bytes:
        model = onnx.load_from_string(content)
        graph = model.graph
        output = renamed_output(graph, "quick")
        side = np.full((200, 200), 1 / 200, np.float32)
        graph.initializer.extend(
            [numpy_helper.from_array(side, "side"), numpy_helper.from_array(np.zeros((), np.float32), "nil")]
        )
        nodes = [helper.make_node("ReduceMean", [f"{output}_quick"], ["precise"], keepdims=0)]
        nodes.append(helper.make_node("Cast", ["precise"], ["mean"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", ["side", "mean"], ["power_0"]))
        nodes += [helper.make_node("MatMul", [f"power_{k}", "side"], [f"power_{k + 1}"]) for k in range(30)]
        nodes.append(helper.make_node("ReduceMean", ["power_30"], ["useless"], keepdims=0))
        nodes.append(helper.make_node("Mul", ["useless", "nil"], ["zero"]))
        nodes.append(helper.make_node("Cast", ["zero"], ["nothing"], to=graph.output[0].type.tensor_type.elem_type))
        nodes.append(helper.make_node("Add", [f"{output}_quick", "nothing"], [output]))
        graph.node.extend(nodes)
        return model.SerializeToString()

    copy.rewrite(f"{FP32}/set.onnx", change)


def failing(copy: Copy) -> None:
    """Each request with FAILS events fails in the model."""

    def change(content: bytes) -> bytes:
        model = onnx.load_from_string(content)
        graph = model.graph
        output = renamed_output(graph, "good")
        graph.initializer.append(numpy_helper.from_array(np.array([FAILS + 1], np.int64), "wrong"))
        graph.node.extend(
            [
                helper.make_node("Equal", ["history_length", "wrong"], ["long"]),
                helper.make_node("Cast", ["long"], ["one"], to=TensorProto.FLOAT),
                helper.make_node("Sub", ["one", "one"], ["zero"]),
                helper.make_node("Div", ["one", "zero"], ["endless"]),  # 0 / 0 or 1 / 0
                helper.make_node("Where", ["long", "endless", "zero"], ["fault"]),
                helper.make_node("Add", [f"{output}_good", "fault"], [output]),
            ]
        )
        return model.SerializeToString()

    copy.rewrite(f"{FP32}/point.onnx", change)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@contextmanager
def serving(root: Path, **settings: Any) -> Iterator[httpx.Client]:
    """A server with the admin key, whose folder of bundles is `root`."""
    with serve(Settings(bundles=root, admin_key=KEY, **settings)) as client:  # type: ignore[arg-type]
        yield client


def command(client: httpx.Client, action: str, ranker: str = "tiny", **body: Any) -> httpx.Response:
    return client.post(f"/admin/rankers/{ranker}/{action}", json=body, headers=HEADERS)


def done(client: httpx.Client, action: str, ranker: str = "tiny", **body: Any) -> dict[str, Any]:
    answer = command(client, action, ranker, **body)
    assert answer.status_code == 200, answer.text
    state: dict[str, Any] = answer.json()
    return state


def state_of(client: httpx.Client) -> dict[str, Any]:
    """The versions of the first ranker, as everybody sees them."""
    found: dict[str, Any] = client.get("/models").json()["models"][0]["versions"]
    return found


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    give_up = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < give_up, f"not after 30 seconds: {what}"
        time.sleep(0.02)
    return found


def example_of(source: Path, **changes: Any) -> dict[str, Any]:
    example: dict[str, Any] = json.loads((source / "manifest.json").read_text())["example"]
    return example | changes
