"""The reference bundle, W of docs/performance.md: python -m slatewise_train.demo.reference (make reference-bundle)

Its shape is a ranker one would deploy; its weights are drawn from a seed, so speed work does not wait for training.
Before: nothing. After: `loadtest/` measures with it, below `build/bundles/`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.export import BundleContent, publish, staging, warmup_requests, write_content
from slatewise_train.rankers.ligr import Ligr, LigrConfig

NAME = "reference"
VERSION = 1
ROOT = Path("build/bundles")
ITEMS = 5_000
ACTIONS = 8
NUMERIC = 4
USERS = 1_000
HISTORY_USED = 2_048
START_TIME = 1_700_000_000


def reference_model() -> Ligr:
    """d = 128, 4 blocks, 4 attention heads, feed-forward x4 (GELU), 1 set-wise block, 2 heads, meta-embedding of 64."""
    torch.manual_seed(0)
    config = LigrConfig(
        items=ITEMS + FIRST_ITEM,
        actions=ACTIONS + 1,
        fields={},
        numeric=NUMERIC,
        heads=2,
        width=128,
        blocks=4,
        attention_heads=4,
        set_blocks=1,
        feed_forward=4,
        meta_size=64,
    )
    model = Ligr(config, {}, torch.zeros(NUMERIC), torch.ones(NUMERIC))
    for last in (model.point_down, model.set_out):  # zero before training, where the exits would be one
        torch.nn.init.xavier_uniform_(last.weight)
    torch.nn.init.normal_(model.default_meta, std=0.3)
    return model.eval()


def reference_content() -> BundleContent:
    rng = np.random.default_rng(0)
    model = reference_model()
    ids = [str(k) for k in range(ITEMS)]
    actions = [f"action_{k}" for k in range(ACTIONS)]
    features = [f"feature_{k}" for k in range(NUMERIC)]
    events = 40
    candidates = 24
    example = {
        "user": "u0",
        "history": {
            "item_ids": [ids[k] for k in rng.integers(0, ITEMS, events)],
            "actions": [actions[k] for k in rng.integers(0, ACTIONS, events)],
            "timestamps": (START_TIME + np.sort(rng.integers(0, 10**6, events))).tolist(),
        },
        "candidates": {
            "item_ids": [ids[k] for k in rng.integers(0, ITEMS, candidates)],
            "features": {name: rng.normal(size=candidates).round(3).tolist() for name in features},
        },
        "request_time": START_TIME + 10**6,
    }
    return BundleContent(
        ranker=NAME,
        trained_on="nothing: weights drawn from a seed, for measuring speed",
        model=model,
        ids=ids,
        actions=actions,
        features=features,
        fields={},
        heads={"click": 1.0, "like": 0.5},
        history_used=HISTORY_USED,
        users=[f"u{k}" for k in range(USERS)],
        vectors=rng.normal(0, 0.3, (USERS, model.config.meta_size)).astype(np.float32),
        titles={},
        example=example,
        warmup=warmup_requests(example, ids, HISTORY_USED, rng),
    )


def main() -> None:
    content = reference_content()
    with staging(ROOT / NAME, VERSION) as stage:
        write_content(stage, content)
        publish(stage, content, content.identity, VERSION, lambda _: {}, content.exits[-1])
    print(ROOT / NAME / str(VERSION))


if __name__ == "__main__":
    main()
