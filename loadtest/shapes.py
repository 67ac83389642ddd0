"""What W costs with fewer blocks, thinner feed-forward layers and cheaper attention, one thread: python -m loadtest.shapes

Weights do not matter to time: each is `models/slatewise_train/compression/student.py`'s shrunk W, untrained. Milliseconds of history 200 and 200 candidates, in turns, medians.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from slatewise.bundle.manifest import read_manifest
from slatewise.inference.engine import Engine
from slatewise.process import cpu_name
from slatewise_train.bundle_writer import write_graphs
from slatewise_train.compression.student import shrink
from slatewise_train.evaluation.latency import measure_latency
from slatewise_train.rankers import families
from slatewise_train.rankers.base import uncalibrated
from slatewise_train.rankers.weights import load_model

SHAPES: dict[str, dict[str, int]] = {
    "W": {},
    "queries and keys half as wide as values": {"key_size": 16},
    "one head of keys and values for four of queries": {"key_heads": 1},
    "two heads": {"attention_heads": 2},
    "feed-forward x2": {"feed_forward": 2},
    "feed-forward x1": {"feed_forward": 1},
    "2 blocks": {"blocks": 2},
    "1 block": {"blocks": 1},
    "2 blocks, feed-forward x1, two heads, keys of 16": {
        "blocks": 2,
        "feed_forward": 1,
        "attention_heads": 2,
        "key_size": 16,
    },
    "1 block, feed-forward x1, one head, keys of 16": {
        "blocks": 1,
        "feed_forward": 1,
        "attention_heads": 1,
        "key_size": 16,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("build/bundles/reference/1"))
    args = parser.parse_args()
    manifest = read_manifest(args.bundle)
    model = load_model(args.bundle, manifest)
    identity = uncalibrated(manifest.exits, len(manifest.heads))
    engines = {}
    with tempfile.TemporaryDirectory() as folder:
        for k, (name, shape) in enumerate(SHAPES.items()):
            smaller = families.graphs(shrink(model, shape), identity, manifest.limits.history_used)
            write_graphs(Path(folder) / str(k), smaller.all())
            engines[name] = Engine(Path(folder) / str(k), model.item_table().detach().numpy(), manifest.exits, 1)
        found = measure_latency(engines, manifest)
    print(
        f"{args.bundle}, {cpu_name()}, one thread, float32; history 200, 200 candidates\n\n| shape | encode ms | score ms | of W |\n| --- | --- | --- | --- |"
    )
    rows = {
        name: next(r for r in times["rows"] if (r["history"], r["candidates"]) == (200, 200))
        for name, times in found.items()
    }
    whole = rows["W"]["encode_p50"] + rows["W"]["score_p50"]
    for name, row in rows.items():
        print(
            f"| {name} | {row['encode_p50']:.2f} | {row['score_p50']:.2f} | {(row['encode_p50'] + row['score_p50']) / whole:.0%} |"
        )


if __name__ == "__main__":
    main()
