"""The Open Inference Protocol: tensors in JSON and binary, parameters, and bodies that do not fit their sizes."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import serialize_byte_tensor

from slatewise.errors import Invalid
from slatewise.http.calls.tensors import NUMPY_TYPES, Tensor, read_texts, read_values
from tests.http.calls.support import FILMS, MODEL, PAST, USER, native_order
from tests.http.calls.test_dialects import OipError, check_error

PATH = f"/v2/models/{MODEL}/infer"
LENGTH = "Inference-Header-Content-Length"


def tensor(name: str, data: list[Any], datatype: str = "BYTES", shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "shape": shape or [len(data)], "datatype": datatype, "data": data}


def binary_tensor(name: str, raw: bytes, n: int, datatype: str = "BYTES") -> dict[str, Any]:
    return {"name": name, "shape": [n], "datatype": datatype, "parameters": {"binary_data_size": len(raw)}}


def texts(*elements: str) -> bytes:
    return b"".join(struct.pack("<I", len(e.encode())) + e.encode() for e in elements)


def infer(client: httpx.Client, *inputs: dict[str, Any], **members: Any) -> httpx.Response:
    return client.post(PATH, json={"inputs": [tensor("candidates.item_ids", FILMS), *inputs]} | members)


def order(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    outputs = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    return [FILMS[i] for i in np.argsort(-np.array(outputs["scores"]), kind="stable")]


def refused(answer: httpx.Response, *statuses: int) -> str:
    check_error(answer, OipError, *(statuses or (422,)))
    return str(answer.json()["error"])


def send_binary(client: httpx.Client, inputs: list[dict[str, Any]], raw: bytes, **members: Any) -> httpx.Response:
    head = json.dumps({"inputs": inputs} | members).encode()
    return client.post(PATH, content=head + raw, headers={LENGTH: str(len(head))})


def test_columns_are_those_of_a_native_request(demo: httpx.Client) -> None:
    history = [tensor(f"history.{name}", column) for name, column in PAST["history"].items()]
    times = tensor("history.timestamps", [1, 2.5, None, 4], "FP64")
    features = tensor("features.year", [1989, None, 1993, float("nan"), 1993, 1991], "FP64")
    answer = demo.post(
        PATH,
        content=json.dumps(
            {
                "inputs": [
                    tensor("user", [USER]),
                    tensor("candidates.item_ids", [[int(film) for film in FILMS]], "INT64", [1, 6]),
                    *history,
                    times,
                    features,
                    tensor("history.offset", [64], "INT64"),
                    tensor("request_time", [829828006], "FP64"),
                ]
            }
        ),
    )
    native = demo.post(
        "/score",
        json={
            "user": USER,
            "history": PAST["history"] | {"timestamps": [1, 2.5, None, 4], "offset": 64},
            "candidates": {"item_ids": FILMS, "features": {"year": [1989, None, 1993, None, 1993, 1991]}},
            "request_time": 829828006,
        },
    ).json()
    found = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    assert found.pop("scores") == native["results"]["scores"]
    assert found == {f"heads.{head}": column for head, column in native["results"]["heads"].items()}


def test_empty_text_is_a_missing_action_or_field(demo: httpx.Client) -> None:
    seen = [tensor("user", [USER]), tensor("history.item_ids", ["1200", "1214"])]
    time = tensor("request_time", [829828006], "FP64")
    sparse = order(infer(demo, *seen, tensor("history.actions", ["", ""]), tensor("fields.genres", [""] * 6), time))
    history = {"item_ids": ["1200", "1214"], "actions": [None, None]}
    assert sparse == native_order(demo, history=history, request_time=829828006)


def test_parameters_are_translated(demo: httpx.Client) -> None:
    user = tensor("user", [USER])
    answer = infer(demo, user, parameters={"exit": "dot", "priority": 10**6, "timeout": 0, "other": {"a": 1}})
    assert order(answer) == native_order(demo, exit="dot") and answer.json()["parameters"]["exit"] == "dot"
    assert infer(demo, user, parameters={"timeout": 1}).json()["parameters"]["degraded"] == "deadline"
    assert "not done within" in refused(infer(demo, parameters={"timeout": 1, "allow_degraded": False}), 504)
    for wrong in ({"exit": "none"}, {"priority": -1}, {"timeout": 0.5}, {"allow_degraded": "no"}):
        assert refused(infer(demo, parameters=wrong)).startswith("/parameters/" + next(iter(wrong)))
    assert order(infer(demo, user, parameters={"timeout": 2**63})) == native_order(demo)
    assert "variant" in refused(infer(demo, parameters={"variant": "none"}), 404)


def test_input_that_is_there_twice_is_refused(demo: httpx.Client) -> None:
    for twice in ("candidates.item_ids", "user"):
        error = refused(infer(demo, tensor("user", [USER]), tensor(twice, [USER])), 400)
        assert error == f"{twice}: 2 inputs have this name"


def test_times_in_milliseconds_are_named(demo: httpx.Client) -> None:
    hint = "unix seconds are wanted; these look like milliseconds: divide them by 1,000"
    past = [tensor("history.item_ids", ["1200"]), tensor("history.timestamps", [1_700_000_000_000], "INT64")]
    assert refused(infer(demo, *past)) == f"history.timestamps/0: {hint}"
    assert refused(infer(demo, tensor("request_time", [1.7e12], "FP64"))) == f"request_time: {hint}"


def test_id_is_returned_as_it_was_sent(demo: httpx.Client) -> None:
    answer = infer(demo, id="two words")
    assert answer.json()["id"] == "two words" and "two" not in answer.headers.get("X-Request-ID", "")
    answer = infer(demo, id="r1")
    assert answer.json()["id"] == "r1" and answer.headers["X-Request-ID"] == "r1"


def test_wanted_outputs_are_chosen_and_unknown_ones_refused(demo: httpx.Client) -> None:
    answer = infer(demo, outputs=[{"name": "heads.like"}]).json()
    assert [output["name"] for output in answer["outputs"]] == ["heads.like"]
    assert (
        refused(infer(demo, outputs=[{"name": "rank"}]))
        == "outputs: unknown name; known: scores, heads.watch, heads.like"
    )


def test_binary_answer_holds_its_outputs_behind_the_json(demo: httpx.Client) -> None:
    answer = infer(demo, parameters={"binary_data_output": True})
    length = int(answer.headers[LENGTH])
    head = json.loads(answer.content[:length])
    assert [output["parameters"]["binary_data_size"] for output in head["outputs"]] == [48, 48, 48]
    assert answer.headers["Content-Type"] == "application/octet-stream" and len(answer.content) == length + 3 * 48
    plain = infer(demo).json()["outputs"]
    found = np.frombuffer(answer.content[length:]).reshape(3, 6)
    assert found == pytest.approx(np.array([output["data"] for output in plain]), abs=1e-4)


@pytest.mark.parametrize(
    ("inputs", "raw", "expected"),
    [
        ([binary_tensor("candidates.item_ids", texts("1"), 1)], b"", "binary_data_size adds up to 5, and 0 bytes"),
        ([binary_tensor("candidates.item_ids", texts("1"), 1)], texts("1") + b"x", "adds up to 5, and 6 bytes"),
        ([binary_tensor("candidates.item_ids", texts("1"), 2)], texts("1"), "its bytes end before element 1"),
        (
            [binary_tensor("candidates.item_ids", texts("1", "2"), 1)],
            texts("1", "2"),
            "10 bytes, but its elements have 5",
        ),
        (
            [binary_tensor("candidates.item_ids", b"\5\0\0\0abcd", 1)],
            b"\5\0\0\0abcd",
            "8 bytes, but its elements have 9",
        ),
        ([binary_tensor("candidates.item_ids", b"\1\0\0\0\xff", 1)], b"\1\0\0\0\xff", "is not UTF-8"),
        ([binary_tensor("candidates.item_ids", b"1234567", 1, "INT64")], b"1234567", "7 bytes for 1 values of INT64"),
        ([binary_tensor("candidates.item_ids", b"", 10**18)], b"", "values, limit 4096"),
        ([tensor("candidates.item_ids", [], shape=[0])], b"", "candidates.item_ids: "),
        ([tensor("candidates.item_ids", ["1"], shape=[10**4000, 10**4000])], b"", "too many values, limit 4096"),
        ([tensor("candidates.item_ids", ["1"], shape=[2])], b"", "1 values for a shape of 2"),
        ([tensor("candidates.item_ids", ["1"], "TEXT")], b"", "datatype must be one of BYTES, INT8"),
        ([{"name": "candidates.item_ids", "shape": [1], "datatype": "BYTES"}], b"", "has neither `data` nor"),
        ([tensor("candidates.item_ids", [["1"], ["2"]], shape=[2])], b"", "candidates.item_ids/0: "),
        ([tensor("user", ["a", "b"])], b"", "user: 2 values, not 1"),
        ([tensor("user", ["a"])], b"", "candidates.item_ids: "),
        ([tensor("history.items", ["a"])], b"", "inputs: unknown name"),
        (
            [tensor("features.none", [1.0], "FP64"), tensor("candidates.item_ids", ["1"])],
            b"",
            "features/none: unknown name",
        ),
    ],
)
def test_tensor_that_does_not_fit_is_refused(
    demo: httpx.Client, inputs: list[dict[str, Any]], raw: bytes, expected: str
) -> None:
    assert expected in refused(send_binary(demo, inputs, raw))


@pytest.mark.parametrize("length", ["", "x", "-1", "1e3", "99999999", "9" * 400, "٣"])
def test_wrong_length_of_the_json_part_is_refused(demo: httpx.Client, length: str) -> None:
    answer = demo.post(PATH, content=b"{}", headers={LENGTH: length.encode()})
    assert LENGTH in refused(answer)


def test_unknown_model_or_version_is_refused(demo: httpx.Client) -> None:
    for path in ("/v2/models/none", f"/v2/models/{MODEL}/versions/99"):
        assert "served: " in refused(demo.post(path + "/infer", json={"inputs": [tensor("user", ["a"])]}), 404)
        for get in ("", "/ready"):
            answer = demo.get(path + get)
            assert answer.status_code == 404 and "served: " in answer.json()["error"]


def test_server_health_needs_no_key(demo: httpx.Client) -> None:
    nothing = {"Authorization": ""}
    assert demo.get("/v2/health/live", headers=nothing).json() == {"live": True}
    assert demo.get("/v2/health/ready", headers=nothing).json() == {"live": True, "ready": True}
    assert demo.get("/v2", headers=nothing).status_code == 401


@given(st.lists(st.text(max_size=5), max_size=5))
def test_texts_are_those_that_tritonclient_writes(elements: list[str]) -> None:
    raw = serialize_byte_tensor(np.array(elements, dtype=object))
    written = raw.item() if raw.size else b""
    assert read_texts("a", written, len(elements)) == elements


@given(st.binary(max_size=30), st.integers(0, 8))
def test_any_bytes_are_read_or_refused(raw: bytes, count: int) -> None:
    with suppress(Invalid):
        assert len(read_texts("a", raw, count)) == count


@pytest.mark.parametrize("datatype", NUMPY_TYPES)
def test_numbers_of_every_datatype_are_read(datatype: str) -> None:
    raw = np.array([0, 1, 100], NUMPY_TYPES[datatype]).tobytes()
    shown = Tensor.model_validate({"name": "a", "shape": [3, 1], "datatype": datatype})
    assert read_values(shown, raw, 3) == [0, 1, 100]
