"""CPU time of foreign calls beside the native call: python -m loadtest.server.calls

Each round sends a batch of each foreign call and a batch of the native call with the same content, on one connection,
in turn. The CPU time is that of the event loop's thread, which parses and renders; the model runs on other threads.
Prints a JSON line for each call: the medians over all rounds, the median of the differences in a round, and the
difference of the minima, which the neighbours on the machine disturb least.

Called by: the command line. Linux only: it reads /proc. Its numbers appear in docs/calls.md.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tritonclient.http as triton

from loadtest.client import ask, post
from loadtest.server_process import ServerProcess, exit_on_sigterm
from loadtest.workload import Workload
from slatewise.process import cpu_name

EVENTS = 50
BUNDLES = Path(__file__).parents[2] / "models" / "bundles"


def tensor(name: str, column: list[Any], binary: bool) -> triton.InferInput:
    datatype = "BYTES" if isinstance(column[0], str) else "FP64"
    array = np.array(column, dtype=object if datatype == "BYTES" else np.float64)
    return triton.InferInput(name, [len(column)], datatype).set_data_from_numpy(array, binary_data=binary)


def infer(model: str, user: str, ids: list[str], history: dict[str, list[Any]], binary: bool) -> bytes:
    """The bytes of a request of tritonclient for the scores alone."""
    columns = {"user": [user], "candidates.item_ids": ids} | {f"history.{k}": v for k, v in history.items()}
    body, length = triton.InferenceServerClient.generate_request_body(
        [tensor(name, column, binary) for name, column in columns.items()],
        outputs=[triton.InferRequestedOutput("scores", binary_data=binary)],
    )
    request = post(f"/v2/models/{model}/infer", body)
    if length is None:
        return request
    return request.replace(b"\r\n\r\n", f"\r\nInference-Header-Content-Length: {length}\r\n\r\n".encode(), 1)


def requests_of(workload: Workload, candidates: int) -> tuple[dict[str, tuple[bytes, bytes]], str]:
    """For each call its request and the native request with the same content; and the name of the ranker."""
    model, user = workload.folder.parent.name, "load"
    ids = random.Random(0).sample(workload.ids, candidates)
    history = workload.history(EVENTS)
    query = json.dumps({"user": user, "history": history})
    content = {"ranker": model, "user": user, "candidates": {"item_ids": ids}}
    full = post("/rerank", json.dumps(content | {"history": history}).encode())
    bare = post("/rerank", json.dumps(content).encode())
    with_years = content | {"candidates": {"item_ids": ids, "features": {"year": [1990] * candidates}}}

    def foreign(path: str, **members: Any) -> bytes:
        return post(path, json.dumps(members).encode())

    cohere = {"model": model, "query": query, "documents": ids}
    event = {"id": "r1", "timestamp": "1700000000000", "user": user}
    years = [{"id": i, "fields": [{"name": "year", "value": 1990}]} for i in ids]
    yaml = [f"id: '{i}'\n" for i in ids]
    return {
        "/rerank": (full, full),
        "/v2/rerank": (foreign("/v2/rerank", **cohere), full),
        "/v1/rerank, return_documents": (foreign("/v1/rerank", **cohere, return_documents=True), full),
        "/v2/rerank, YAML": (foreign("/v2/rerank", **cohere | {"documents": yaml}), full),
        "/v1/rerank, objects": (foreign("/v1/rerank", **cohere | {"documents": [{"id": i} for i in ids]}), full),
        "/tei/rerank": (foreign("/tei/rerank", query=query, texts=ids), full),
        "/personalize-ranking": (
            foreign("/personalize-ranking", campaignArn=f"arn/{model}", userId=user, inputList=ids),
            bare,
        ),
        "/rank/{model}": (foreign(f"/rank/{model}", **event, items=[{"id": i} for i in ids]), bare),
        "/rank/{model}, a field for each item": (
            foreign(f"/rank/{model}", **event, items=years),
            post("/rerank", json.dumps(with_years).encode()),
        ),
        "/rank/{model}, the same beside no fields": (foreign(f"/rank/{model}", **event, items=years), bare),
        "infer, JSON": (infer(model, user, ids, history, False), full),
        "infer, binary": (infer(model, user, ids, history, True), full),
    }, model


def loop_seconds(server: ServerProcess) -> float:
    """CPU seconds of the server's main thread, which runs the event loop."""
    pid = server.process.pid
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def batch(server: ServerProcess, connection: socket.socket, request: bytes, count: int) -> float:
    """Milliseconds of the event loop's CPU for one request, the mean of a batch."""
    before = loop_seconds(server)
    for _ in range(count):
        status, body = ask(connection, request)
        if status != 200:
            raise RuntimeError(f"status {status}: {body[:300]!r}")
    return (loop_seconds(server) - before) / count * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, default=BUNDLES)
    parser.add_argument("--candidates", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=5, help="requests of each call in a round (default: %(default)s)")
    args = parser.parse_args()
    exit_on_sigterm()
    calls, model = requests_of(Workload(args.bundles), args.candidates)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    with (
        ServerProcess({"BUNDLES": str(args.bundles), "DRAIN_SECONDS": "0"}) as server,
        socket.create_connection(("127.0.0.1", server.port)) as connection,
    ):
        for turn in range(-1, args.rounds):  # the first round warms up
            for name, (request, native) in calls.items():
                pair = [batch(server, connection, r, args.batch) for r in (request, native)]
                if turn >= 0:
                    times[name].append((pair[0], pair[1]))
    print(json.dumps({"machine": cpu_name(), "ranker": model, "candidates": args.candidates, "rounds": args.rounds}))
    for name, pairs in times.items():
        row = {
            "call": name,
            "ms": median(own for own, _ in pairs),
            "native_ms": median(native for _, native in pairs),
            "over_native_ms": median(own - native for own, native in pairs),
            "least_over_native_ms": min(own for own, _ in pairs) - min(native for _, native in pairs),
        }
        print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}))


if __name__ == "__main__":
    main()
