"""A ranker that takes less than a millisecond, so that a test of the server does not measure the model.

Called by: the other files of this folder. Calls: `slatewise_train/demo/reference.py`, whose content it makes small, and
`slatewise/store/push.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from slatewise.bundle.manifest import read_manifest
from slatewise.inference.arrays import FIRST_ITEM
from slatewise.store.client import connect
from slatewise.store.generations import Generations
from slatewise.store.push import push
from slatewise_train.bundle_writer import BundleContent
from slatewise_train.demo.content import warmup_requests
from slatewise_train.demo.reference import START_TIME, publish_uncalibrated
from slatewise_train.rankers import families

ROOT = Path("build/bundles-chaos")
NAME = "small"
ITEMS = 500
HISTORY_USED = 128
USERS = 200
META_SIZE = 8
SHAPE = {
    "items": ITEMS + FIRST_ITEM,
    "actions": 3,
    "fields": {},
    "numeric": 1,
    "heads": 1,
    "width": 16,
    "blocks": 1,
    "attention_heads": 2,
    "set_blocks": 1,
    "feed_forward": 2,
    "meta_size": META_SIZE,
}


def small_content() -> BundleContent:
    """The same arrays and requests on every call. Weights are drawn from a seed."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = families.build(families.DEFAULT_FAMILY, SHAPE)
    for name in ("point_down.weight", "set_out.weight"):  # zero before training, and then all exits are equal
        torch.nn.init.xavier_uniform_(model.get_parameter(name))
    torch.nn.init.normal_(model.default_meta, std=0.3)
    ids = [str(k) for k in range(ITEMS)]
    example = {
        "user": "u0",
        "history": {
            "item_ids": ids[:8],
            "actions": ["view"] * 8,
            "timestamps": list(range(START_TIME, START_TIME + 8)),
        },
        "candidates": {"item_ids": ids[8:16], "features": {"price": [0.5] * 8}},
        "request_time": START_TIME + 10**6,
    }
    return BundleContent(
        ranker=NAME,
        trained_on="nothing: weights drawn from a seed",
        model=model.eval(),
        ids=ids,
        actions=["view", "buy"],
        features=["price"],
        fields={},
        heads={"click": 1.0},
        history_used=HISTORY_USED,
        users=[f"u{k}" for k in range(USERS)],
        vectors=rng.normal(0, 0.3, (USERS, META_SIZE)).astype(np.float32),
        titles={},
        example=example,
        warmup=warmup_requests(example, ids, HISTORY_USED, rng),
    )


def small_bundles(root: Path = ROOT) -> Path:
    """Return the root folder of the bundle, which is written at the first call."""
    if not (root / NAME / "1").is_dir():
        publish_uncalibrated(small_content(), root / NAME, 1)
    return root


def push_vectors(bundles: Path, redis_port: int) -> None:
    """Publish the vectors of the users "u0", "u1", ... in Redis."""
    manifest = read_manifest(bundles / NAME / "1")
    vectors = np.random.default_rng(0).normal(0, 0.3, (USERS, META_SIZE)).astype(np.float32)
    with connect(f"redis://127.0.0.1:{redis_port}/0") as client:
        push(Generations(client, NAME, manifest.space), [f"u{k}" for k in range(USERS)], vectors)
