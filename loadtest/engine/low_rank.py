"""Engine time and size of low rank, by width: python -m loadtest.engine.low_rank

Rankers with the blocks of the reference model and random weights, whose values do not change the time. Their dense
layers keep a share of their numbers, at rank 16 or more: smaller products are not multiplied as integers. One thread,
200 events, 200 candidates, medians of interleaved runs in milliseconds. The size is that of the graphs.

Called by: the command line. Its numbers appear in docs/compression.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import torch

from loadtest.engine.drawn import Request, draw_request
from loadtest.markdown import table
from slatewise.inference.engine import Engine
from slatewise.process import cpu_name
from slatewise_train.bundle_writer import write_graphs
from slatewise_train.compression.bases import chosen_layers
from slatewise_train.compression.low_rank import LayerStatistics, factor
from slatewise_train.compression.quantize import RecordingEngine, observe, quantize
from slatewise_train.demo.reference import reference_model
from slatewise_train.graph_check import INTEGER_SIDE
from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerModel, uncalibrated

EVENTS = 200
CANDIDATES = 200
WIDTHS = (64, 128, 256)
HEAD = 32  # numbers of an attention head, as in the reference model
FEED_FORWARD = ("up", "down")
FORMS: dict[str, tuple[float, tuple[str, ...]]] = {  # name -> share of the numbers, and the layers that are factored
    "fp32": (1.0, ()),
    "lowrank, feed-forward at 50 %": (0.5, FEED_FORWARD),
    "lowrank, feed-forward at 25 %": (0.25, FEED_FORWARD),
    "lowrank, all layers at 25 %": (0.25, ()),
}

Graphs = dict[str, onnx.ModelProto]


def model_of(width: int) -> RankerModel:
    """Build the reference model with another width and random weights."""
    config = reference_model().config
    shape = dataclasses.asdict(config) | {"width": width, "attention_heads": width // HEAD}
    return families.build(families.DEFAULT_FAMILY, shape).eval()


def low_rank(model: RankerModel, share: float, parts: tuple[str, ...]) -> RankerModel:
    """Factor the layers of these names, or all of them, to a share of their numbers."""
    layers = chosen_layers(model, parts)
    ranks = {
        name: max(INTEGER_SIDE, int(share * layer.weight.numel() / sum(layer.weight.shape)))
        for name, layer in layers.items()
    }
    unused = LayerStatistics(*(torch.zeros(0) for _ in range(3)))
    return factor(model, dict.fromkeys(layers, unused), "svd", ranks)


def integers(plain: Graphs, recorder: RecordingEngine, request: Request) -> Graphs:
    """Return the graphs with integer products, whose ranges come from one request."""
    history, candidates, meta = request
    recorder.set(recorder.point(candidates, meta, recorder.extend(recorder.start, history)))
    return {
        name: quantize(graph, observe(graph, recorder.feeds[name])) if name in recorder.feeds else graph
        for name, graph in plain.items()
    }


def measure(engines: dict[str, Engine], request: Request, repeats: int) -> dict[str, tuple[float, float]]:
    """Return the median milliseconds to encode the history and to score the candidates, by engine. They take turns."""
    history, candidates, meta = request
    states = {name: engine.extend(engine.start, history) for name, engine in engines.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            begin = time.perf_counter()
            engine.extend(engine.start, history)
            middle = time.perf_counter()
            engine.set(engine.point(candidates, meta, states[name]))
            seconds[name].append((middle - begin, time.perf_counter() - middle))
    return {
        name: (1e3 * median(run[0] for run in runs), 1e3 * median(run[1] for run in runs))
        for name, runs in seconds.items()
    }


def measure_width(width: int, repeats: int) -> list[tuple[str, ...]]:
    """Return the rows of a width: name, encode, score, time and size of fp32's."""
    torch.manual_seed(0)
    model = model_of(width)
    items = model.item_table().detach().numpy()
    request = draw_request(model, items, EVENTS, CANDIDATES, np.random.default_rng(0))
    exits = list(model.exits)
    engines: dict[str, Engine] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (share, parts) in FORMS.items():
            form = model if share == 1 else low_rank(model, share, parts)
            plain = families.graphs(form, uncalibrated(exits, form.config.heads), EVENTS).all()
            folder = Path(scratch) / name
            write_graphs(folder, plain)
            engines[name] = Engine(folder, items, exits)
            coded = integers(plain, RecordingEngine(folder, items, exits), request)
            short = "int8" if name == "fp32" else name.replace("lowrank", "lowrank-int8")
            write_graphs(Path(scratch) / short, coded)
            engines[short] = Engine(Path(scratch) / short, items, exits)
            sizes |= {name: total(plain), short: total(coded)}
    times = measure(engines, request, repeats)
    whole = sum(times["fp32"])
    return [
        (f"{width}", name, f"{encode:.2f}", f"{score:.2f}", f"{(encode + score) / whole:.0%}", share_of(sizes, name))
        for name, (encode, score) in times.items()
    ]


def total(graphs: Graphs) -> int:
    return sum(graph.ByteSize() for graph in graphs.values())


def share_of(sizes: dict[str, int], name: str) -> str:
    return f"{sizes[name] / sizes['fp32']:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    print(f"{cpu_name()}, one thread, {EVENTS} events, {CANDIDATES} candidates, medians of {args.repeats} runs\n")
    rows = [row for width in WIDTHS for row in measure_width(width, args.repeats)]
    print(table(("width", "variant", "encode ms", "score ms", "time of fp32", "bytes of its graphs"), rows))


if __name__ == "__main__":
    main()
