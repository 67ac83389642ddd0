"""The part that all peers share: JSON columns to arrays, one ONNX Runtime session, a sort.

The environment sets it up: PEER_BUNDLE (a bundle's folder), PEER_GRAPH (an .onnx file with the inputs of rank.onnx) and
PEER_THREADS (threads of the session).

Called by: each peer's server. Calls: onnxruntime, `slatewise/bundle/features.py`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from slatewise.bundle.features import gap_buckets, request_context
from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ACTION, UNKNOWN_ITEM


class Ranker:
    def __init__(self, bundle: Path, graph: Path, threads: int) -> None:
        manifest, ids, users = (
            json.loads((bundle / name).read_text()) for name in ("manifest.json", "ids.json", "users.json")
        )
        self.features: list[str] = manifest["features"]
        self.items = {name: row for row, name in enumerate(ids, FIRST_ITEM)}
        self.actions = {name: row for row, name in enumerate(manifest["actions"], 1)}
        self.users = {name: row for row, name in enumerate(users)}
        self.metas = np.load(bundle / "meta_embeddings.npy")
        self.default_meta = np.load(bundle / "default_meta.npy")
        options = onnxruntime.SessionOptions()  # other options at their defaults: full optimisation, spinning threads
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    @classmethod
    def from_environment(cls) -> Ranker:
        return cls(Path(os.environ["PEER_BUNDLE"]), Path(os.environ["PEER_GRAPH"]), int(os.environ["PEER_THREADS"]))

    def feeds(self, request: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The graph's inputs, as a batch of one."""
        history = request.get("history") or {}
        candidates = request["candidates"]
        events = history.get("item_ids") or []
        actions = history.get("actions")
        times = history.get("timestamps")
        ids = candidates["item_ids"]
        features = candidates.get("features") or {}
        numeric = np.full((len(ids), len(self.features)), np.nan, np.float32)
        for k, name in enumerate(self.features):
            if name in features:
                numeric[:, k] = np.array(features[name], np.float64)  # null is NaN
        row = self.users.get(request.get("user") or "")
        asked = request.get("request_time")
        return {
            "history": np.array([[self.items.get(item, UNKNOWN_ITEM) for item in events]], np.int64),
            "actions": np.array(
                [[self.actions.get(action, UNKNOWN_ACTION) for action in actions or [None] * len(events)]], np.int64
            ),
            "gaps": gap_buckets(np.array(times or [None] * len(events), np.float64))[None],
            "candidates": np.array([[self.items.get(item, UNKNOWN_ITEM) for item in ids]], np.int64),
            "numeric": numeric[None],
            "meta": (self.default_meta if row is None else self.metas[row])[None],
            "context": request_context(time.time() if asked is None else asked)[None],
        }

    def rank(self, request: Mapping[str, Any]) -> dict[str, Any]:
        (scores,) = self.session.run(["scores"], self.feeds(request))[0]
        order = np.argsort(-scores, kind="stable")
        ids = request["candidates"]["item_ids"]
        index = order.tolist()
        return {"results": {"index": index, "item_ids": [ids[k] for k in index], "scores": scores[order].tolist()}}
