"""Engine time of smaller models: python -m loadtest.engine.model_shapes

Fewer blocks, narrower feed-forward layers, cheaper attention. Each shape is the reference model shrunk by
`slatewise_train/rankers/ligr_student.py`, untrained: the values of weights do not change the time. Milliseconds for 200
events and 200 candidates, one thread, medians of interleaved runs.

Called by: the command line, after `make reference-bundle`. Its numbers appear in docs/compression.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from loadtest.markdown import table
from slatewise.bundle.manifest import read_manifest
from slatewise.inference.engine import Engine
from slatewise.process import cpu_name
from slatewise_train.bundle_writer import write_graphs
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
            smaller = families.graphs(families.shrink(model, shape), identity, manifest.limits.history_used)
            write_graphs(Path(folder) / str(k), smaller.all())
            engines[name] = Engine(Path(folder) / str(k), model.item_table().detach().numpy(), manifest.exits)
        found = measure_latency(engines, manifest)
    times = {
        name: next(row for row in latency["rows"] if (row["history"], row["candidates"]) == (200, 200))
        for name, latency in found.items()
    }
    totals = {name: row["encode_p50"] + row["score_p50"] for name, row in times.items()}
    rows = [
        (name, f"{row['encode_p50']:.2f}", f"{row['score_p50']:.2f}", f"{totals[name] / totals['W']:.0%}")
        for name, row in times.items()
    ]
    print(f"{args.bundle}, {cpu_name()}, one thread, float32; 200 events, 200 candidates\n")
    print(table(("shape", "encode ms", "score ms", "of W"), rows))


if __name__ == "__main__":
    main()
