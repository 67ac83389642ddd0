"""Write the reference bundle, called W in docs/performance.md: `make reference-bundle`

The reference ranker has a typical size for production. Its weights are random, drawn from a seed, because its purpose
is to measure speed without training.

Called by: the command line (`python -m slatewise_train.demo.reference`), `loadtest/`. Calls: `bundle_writer.py`,
`content.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from slatewise.cli import run_main
from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.bundle_writer import (
    BundleContent,
    check_parity,
    measure_fp32,
    publish,
    staging,
    write_content,
    write_fp32,
)
from slatewise_train.demo.content import warmup_requests
from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerModel, uncalibrated

NAME = "reference"
VERSION = 1
ROOT = Path("build/bundles")
ITEMS = 5_000
ACTIONS = 8
NUMERIC = 4
USERS = 1_000
HISTORY_USED = 2_048
START_TIME = 1_700_000_000
EVENTS = 40  # of the example
CANDIDATES = 24  # of the example


def reference_model(items: int = ITEMS) -> RankerModel:
    """Build the ranker.

    It has width 128, 4 blocks, 4 attention heads, feed-forward x4, 1 set-wise block, 2 output heads and meta-embeddings
    of 64 numbers.
    """
    torch.manual_seed(0)
    shape = {
        "items": items + FIRST_ITEM,
        "actions": ACTIONS + 1,
        "fields": {},
        "numeric": NUMERIC,
        "heads": 2,
        "width": 128,
        "blocks": 4,
        "attention_heads": 4,
        "set_blocks": 1,
        "feed_forward": 4,
        "meta_size": 64,
    }
    model = families.build(families.DEFAULT_FAMILY, shape)
    for name in ("point_down.weight", "set_out.weight"):  # zero before training, and then all exits are equal
        torch.nn.init.xavier_uniform_(model.get_parameter(name))
    torch.nn.init.normal_(model.default_meta, std=0.3)
    return model.eval()


def reference_content(items: int = ITEMS) -> BundleContent:
    """Build the content of the bundle: the same arrays and requests on every call with the same number of items."""
    rng = np.random.default_rng(0)
    model = reference_model(items)
    ids = [str(k) for k in range(items)]
    actions = [f"action_{k}" for k in range(ACTIONS)]
    features = [f"feature_{k}" for k in range(NUMERIC)]
    example = {
        "user": "u0",
        "history": {
            "item_ids": [ids[k] for k in rng.integers(0, items, EVENTS)],
            "actions": [actions[k] for k in rng.integers(0, ACTIONS, EVENTS)],
            "timestamps": (START_TIME + np.sort(rng.integers(0, 10**6, EVENTS))).tolist(),
        },
        "candidates": {
            "item_ids": [ids[k] for k in rng.integers(0, items, CANDIDATES)],
            "features": {name: rng.normal(size=CANDIDATES).round(3).tolist() for name in features},
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
        vectors=rng.normal(0, 0.3, (USERS, model.meta_size)).astype(np.float32),
        titles={},
        example=example,
        warmup=warmup_requests(example, ids, HISTORY_USED, rng),
    )


def publish_uncalibrated(content: BundleContent, folder: Path, version: int) -> Path:
    """Publish a bundle without calibrations and without quality, and return its folder, `folder/version`."""
    with staging(folder, version) as stage:
        calibrations = uncalibrated(content.exits, len(content.heads))
        manifest = write_content(stage, content, version)
        manifest = write_fp32(stage, manifest, content, calibrations)
        invariance = check_parity(stage, manifest, content, calibrations)
        variant = measure_fp32(stage, manifest, invariance, report={})
        publish(stage, manifest.model_copy(update={"variants": {"fp32": variant}}))
    return folder / str(version)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=ITEMS, help="of the catalogue; default: %(default)s")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of bundles; default: %(default)s")
    args = parser.parse_args(argv)
    print(publish_uncalibrated(reference_content(args.items), args.root / NAME, VERSION))


if __name__ == "__main__":
    sys.exit(run_main("python -m slatewise_train.demo.reference", main, sys.argv[1:]))
