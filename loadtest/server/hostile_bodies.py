"""Bodies of at most a megabyte that take a parser long, for every route: hostile ones, and large legal ones.

Called by: `loop_holds.py`, `loadtest/chaos/door.py`. Calls: nothing.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MEGABYTE = 1_000_000  # the default of SLATEWISE_MAX_BODY_BYTES
CANDIDATES = 4_096  # the default of SLATEWISE_MAX_CANDIDATES
BELOW = 49_900  # values: a little less than the default of SLATEWISE_MAX_VALUES


@dataclass(frozen=True)
class Body:
    name: str
    path: str
    content: bytes
    headers: dict[str, str] = field(default_factory=dict)


def filled(before: bytes, element: bytes, after: bytes, values: int = MEGABYTE) -> bytes:
    """As many elements as a megabyte holds, and `values` allows."""
    n = (MEGABYTE - len(before) - len(after)) // (len(element) + 1)
    return before + b",".join([element] * min(n, values // weight(element))) + after


def with_keys(before: bytes, value: bytes, after: bytes, values: int = MEGABYTE) -> bytes:
    """As many different keys as a megabyte holds, and `values` allows."""
    n = (MEGABYTE - len(before) - len(after)) // (len(value) + 9)
    return before + b",".join(b'"%05x":%b' % (k, value) for k in range(min(n, values // weight(value)))) + after


def weight(element: bytes) -> int:
    """The part of SLATEWISE_MAX_VALUES that an element takes: a list or an object counts four times."""
    return max(1 + element.count(b","), 4 * (element.count(b"[") + element.count(b"{")))


def hostile(before: bytes, after: bytes, at: bytes, values: int) -> Iterator[tuple[str, bytes]]:
    """Bodies with a list of ids between `before` and `after`, and with other members in front of `at`."""
    for name, element in {
        "empty lists": b"[]",
        "lists of one": b'["a"]',
        "objects": b"{}",
        "objects of one": b'{"a":1}',
        "digits": b"1",
        "nulls": b"null",
        "short texts": b'"1"',
        "non-ASCII texts": '"é"'.encode(),
        "escapes": b'"\\u0041\\n"',
        "integers of 4,000 digits": b"9" * 4_000,
        "1e400": b"1e400",
        "floats of 700 digits": b"1." + b"3" * 700 + b"e-5",
        "pairs in lists": b"[[1],[2]]",
        "lone surrogates": b'"\\ud800"',
    }.items():
        yield f"ids: {name}", filled(before + b"[", element, b"]" + after, values)
    yield "unknown members", with_keys(at + b",", b"1", b"}", values)
    yield "members of one name", filled(at + b",", b'"a":1', b"}", values)
    yield "lists in an unknown member", filled(at + b',"x":[', b"[]", b"]}", values)
    yield "objects in an unknown member", filled(at + b',"x":[', b'{"a":1}', b"]}", values)
    yield "digits in an unknown member", filled(at + b',"x":[', b"1", b"]}", values)
    yield "10^6 brackets", b"[" * MEGABYTE
    yield "nested 190 deep", filled(at + b',"x":[', b"[" * 190 + b"]" * 190, b"]}", values)
    yield "an integer of 900,000 digits", at + b',"user":' + b"9" * 900_000 + b"}"
    yield "a text of 900,000 characters", at + b',"user":"' + b"a" * 900_000 + b'"}'
    yield "a text of 150,000 escapes", at + b',"user":"' + b"\\u0041" * 150_000 + b'"}'
    yield "no JSON", b"\xff" * MEGABYTE
    yield "spaces", b" " * MEGABYTE


def native(values: int) -> Iterator[tuple[str, bytes]]:
    ids = [str(k) for k in range(CANDIDATES)]
    one = b'{"candidates":{"item_ids":["1"]}'
    yield from hostile(b'{"candidates":{"item_ids":', b"}}", one, values)
    for column in (b'"fields":{"genres":', b'"features":{"year":'):
        for element in (b"[]", b"null", b"1", b'"a"', b'["a"]', b'["a","b"]'):
            name = f"{column[1:9].decode()}: {element.decode()}"
            yield name, filled(b'{"candidates":{"item_ids":["1"],' + column + b"[", element, b"]}}}", values)
        group = column[: column.index(b"{") + 1]
        for value in (b"1", b"[]", b"[1]", b'["a"]'):
            name = f"{group[1:-3].decode()}: many columns of {value.decode()}"
            yield name, with_keys(b'{"candidates":{"item_ids":["1"],' + group, value, b"}}}", values)
    for member in (b'"item_ids":', b'"actions":', b'"timestamps":'):
        for element in (b'"a"', b"1", b"null", b"[]"):
            name = f"history.{member[1:-2].decode()}: {element.decode()}"
            yield name, filled(one + b',"history":{' + member + b"[", element, b"]}}", values)
    yield "head_weights: many", with_keys(one + b',"head_weights":{', b"1", b"}}", values)
    yield "return_fields: many", filled(one + b',"return_fields":[', b'"a"', b"]}", values)
    for length in (4, 200):
        texts = [i.rjust(length, "x") for i in ids]
        yield f"legal: {CANDIDATES} ids of {length} characters", dump(candidates={"item_ids": texts})
    yield (
        "legal: fields of 4096",
        dump(candidates={"item_ids": ids, "fields": {"genres": [["Drama", "War"]] * len(ids)}}),
    )
    distinct = [f"value {k}" for k in range(CANDIDATES)]
    yield "legal: distinct fields", dump(candidates={"item_ids": distinct, "fields": {"genres": distinct}})
    history = {"item_ids": ids, "actions": ["like"] * len(ids), "timestamps": list(range(10**9, 10**9 + len(ids)))}
    yield "legal: history of 4096", dump(candidates={"item_ids": ids}, history=history)
    yield "legal: return_fields", dump(candidates={"item_ids": ids}, return_fields=["title", "genres", "year"])


def dump(**members: Any) -> bytes:
    return json.dumps(members, separators=(",", ":")).encode()


def bodies(ranker: str) -> Iterator[Body]:
    """All bodies. `ranker` is the name of one that the server has."""
    kind = {"Content-Type": "application/json"}
    for values, suffix in ((MEGABYTE, ""), (BELOW, ", below the limits")):
        for name, content in native(values):
            yield Body(name + suffix, "/rerank", content, kind)
    zipped = gzip.compress(filled(b'{"candidates":{"item_ids":["1"],"fields":{"a":[', b"[]", b"]}}}"))
    yield Body("gzip: 320,000 empty lists", "/rerank", zipped, kind | {"Content-Encoding": "gzip"})
    yield Body("gzip: noise", "/rerank", zipped[:300] + bytes(700), kind | {"Content-Encoding": "gzip"})
    for path, before, after in (
        ("/score", b'{"candidates":{"item_ids":', b"}}"),
        ("/v2/rerank", b'{"query":"u","documents":', b"}"),
        ("/v1/rerank", b'{"query":"u","return_documents":true,"documents":', b"}"),
        ("/tei/rerank", b'{"query":"u","texts":', b"}"),
        ("/personalize-ranking", b'{"campaignArn":"a","userId":"u","inputList":', b"}"),
        (f"/rank/{ranker}", b'{"user":"u","items":', b"}"),
        ("/events", b'{"events":', b"}"),
        ("/events", b'{"sessionId":"u","trackingId":"t","eventList":', b"}"),
        ("/feedback", b"", b""),
        ("/feedback", b'{"event":"ranking","user":"u","items":', b"}"),
        ("/encode", b'{"user":"u","history":{"item_ids":', b"}}"),
        (
            f"/v2/models/{ranker}/infer",
            b'{"inputs":[{"name":"candidates.item_ids","shape":[1],"datatype":"BYTES","data":',
            b"}]}",
        ),
    ):
        at = (before + b'["1"]' + after)[:-1] or b'{"event":"item"'
        for values, suffix in ((MEGABYTE, ""), (BELOW, ", below the limits")):
            for name, content in hostile(before, after, at if at[:1] == b"{" else b'{"event":"item"', values):
                yield Body(name + suffix, path, content, kind)
    yield from foreign(ranker, kind)


def foreign(ranker: str, kind: dict[str, str]) -> Iterator[Body]:
    """Bodies that only one route has."""
    n = CANDIDATES
    infer = f"/v2/models/{ranker}/infer"
    query = json.dumps(json.dumps({"history": {"item_ids": [[]] * 100_000}})).encode()
    yield Body("query: a JSON text of lists", "/v2/rerank", b'{"documents":["1"],"query":' + query + b"}", kind)
    hidden = b'"{\\"history\\":{\\"item_ids\\":[' + b"\\u005b\\u005d\\u002c" * 50_000 + b'1]}}"'
    yield Body("query: escaped brackets", "/v2/rerank", b'{"documents":["1"],"query":' + hidden + b"}", kind)
    members = with_keys(b'{"documents":["1"],"query":{', b"1", b"}}")
    yield Body("query: unknown members", "/v2/rerank", members, kind)
    objects = [{"id": str(k), "text": "x" * 100} for k in range(n)]
    yield Body("legal: objects", "/v2/rerank", dump(query="u", documents=objects), kind)
    yaml = [f"id: '{k}'\ntitle: {'x' * 100}\n" for k in range(n)]
    yield Body("legal: YAML", "/v2/rerank", dump(query="u", documents=yaml), kind)
    yield Body("YAML: long", "/v2/rerank", dump(query="u", documents=["id: \n " + "a\n " * 33_000] * 7), kind)
    fields = [{"name": name, "value": 1} for name in ("year", "x", "genres")]
    items = [{"id": str(k), "fields": fields} for k in range(n)]
    yield Body("legal: fields", f"/rank/{ranker}", dump(user="u", items=items), kind)
    names = b",".join(b'{"name":"%05x","value":1}' % k for k in range(25_000))
    body = b'{"user":"u","items":[{"id":"1","fields":[' + names + b"]}]}"
    yield Body("many fields of one item", f"/rank/{ranker}", body, kind)
    event = {"user": "u", "item_id": "1", "action": "like", "timestamp": 1_700_000_000}
    yield Body("legal: 1,000 events", "/events", dump(events=[event] * 1_000), kind)
    yield Body(
        "5,000 events of many users", "/events", dump(events=[event | {"user": str(k)} for k in range(5_000)]), kind
    )
    tensor = {"shape": [n], "datatype": "INT8", "parameters": {"binary_data_size": n}}
    names = ["candidates.item_ids", *(f"features.{k}" for k in range(99))]
    head = dump(inputs=[tensor | {"name": name} for name in names])
    sizes = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    yield Body("100 binary tensors", infer, head + bytes(n * 100), sizes)
    texts = {"name": "candidates.item_ids", "shape": [n], "datatype": "BYTES"}
    raw = b"".join(struct.pack("<I", 4) + b"%04x" % k for k in range(n))
    head = dump(inputs=[texts | {"parameters": {"binary_data_size": len(raw)}}])
    sizes = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    yield Body("legal: binary", infer, head + raw, sizes)
    nested = {"name": "candidates.item_ids", "shape": [n, 1, 1, 1], "datatype": "BYTES", "data": [[[["1"]]]] * n}
    yield Body("legal: nested", infer, dump(inputs=[nested]), kind)
