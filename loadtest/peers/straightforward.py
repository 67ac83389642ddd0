"""The reference model exported in the ordinary way: torch.onnx.export of the whole torch model.

    python -m loadtest.peers.straightforward      (needs onnxscript; `environments.py` puts it on the path)

Of the two exporters of torch, this one's graph runs faster in ONNX Runtime; opset 24 has attention as one operator.
Called by: `environments.py`. Calls: `slatewise_train/demo/reference.py`. Output: build/peers/straightforward.onnx,
which the peers serve besides rank.onnx.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from loadtest.peers.environments import BUNDLE, RANK_GRAPH, STRAIGHTFORWARD_GRAPH
from slatewise.inference.arrays import CONTEXT_SIZE, GAP_BUCKETS, GAP_MISSING, START_ITEM, UNKNOWN_ACTION
from slatewise_train.demo.reference import reference_model
from slatewise_train.rankers.ligr import Ligr

OPSET = 24
BOUND = 1e-5
SIZES = ((1, 1), (7, 3), (256, 200), (2_048, 500))  # events, candidates


class Straightforward(nn.Module):
    """The whole ranker, from rows of events and candidates to scores, with the unchanged modules of `ligr.py`."""

    def __init__(self, model: Ligr, head_weights: list[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("head_weights", torch.tensor(head_weights))

    def forward(
        self,
        history: Tensor,
        actions: Tensor,
        gaps: Tensor,
        candidates: Tensor,
        numeric: Tensor,
        meta: Tensor,
        context: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return (probabilities (1, N, heads), scores (1, N)).

        history, actions, gaps: (1, L) int64; candidates: (1, N) int64; numeric: (1, N, F); meta: (1, M);
        context: (1, 4).
        """
        model = self.model
        history, actions, gaps = (
            prepend(row, column)
            for row, column in ((START_ITEM, history), (UNKNOWN_ACTION, actions), (GAP_MISSING, gaps))
        )
        state, users = model.encode(model.tokens(model.item(history), actions, gaps))
        vectors = model.item(candidates)
        position = torch.tensor([0]) + history.shape[1]  # the position right after the history, for all candidates
        hidden = model.hidden(vectors, state, position, None, model.fuse(numeric, meta[:, None], context[:, None]))
        logits = model.dot_logits(users[:, -1:], vectors) + model.point_logits(hidden) + model.set_logits(hidden)
        probabilities = torch.sigmoid(logits)
        return probabilities, (probabilities * self.head_weights).sum(-1)


def prepend(row: int, column: Tensor) -> Tensor:
    return torch.cat([torch.full_like(column[:, :1], row), column], dim=1)


def draw(model: Ligr, events: int, candidates: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(events)
    config = model.config
    numeric = rng.normal(size=(1, candidates, config.numeric)).astype(np.float32)
    return {
        "history": rng.integers(0, config.items, (1, events)),
        "actions": rng.integers(0, config.actions, (1, events)),
        "gaps": rng.integers(0, GAP_BUCKETS, (1, events)),
        "candidates": rng.integers(0, config.items, (1, candidates)),
        "numeric": np.where(rng.random(numeric.shape) < 0.1, np.float32(np.nan), numeric),
        "meta": rng.normal(0, 0.3, (1, config.meta_size)).astype(np.float32),
        "context": rng.normal(size=(1, CONTEXT_SIZE)).astype(np.float32),
    }


def export(model: Ligr, path: Path) -> None:
    weights = list(json.loads((BUNDLE / "manifest.json").read_text())["heads"].values())
    example = draw(model, 40, 24)
    events = torch.export.Dim("L", min=1, max=4_096)
    candidates = torch.export.Dim("N", min=1, max=4_096)
    shapes = {"history": events, "actions": events, "gaps": events, "candidates": candidates, "numeric": candidates}
    torch.onnx.export(
        Straightforward(model, weights).eval(),
        tuple(torch.from_numpy(value) for value in example.values()),
        path,
        input_names=list(example),
        output_names=["probabilities", "scores"],
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
        dynamic_shapes={name: {1: shapes[name]} if name in shapes else None for name in example},
    )


def worst_difference(model: Ligr, path: Path) -> float:
    """Largest difference between the scores of both graphs, for random inputs of several sizes."""
    ours, theirs = (onnxruntime.InferenceSession(graph) for graph in (RANK_GRAPH, path))
    drawn = [draw(model, *size) for size in SIZES]
    return max(
        float(np.abs(ours.run(["scores"], feeds)[0] - theirs.run(["scores"], feeds)[0]).max()) for feeds in drawn
    )


def main() -> None:
    warnings.simplefilter("ignore")  # the exporter warns about its own code
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model = reference_model()
    draft = STRAIGHTFORWARD_GRAPH.with_suffix(".part")
    with torch.no_grad():
        export(model, draft)
    worst = worst_difference(model, draft)
    if not worst <= BOUND:
        raise SystemExit(f"scores differ from those of {RANK_GRAPH} by {worst:.1e}, bound {BOUND:.0e}")
    draft.replace(STRAIGHTFORWARD_GRAPH)
    print(f"{STRAIGHTFORWARD_GRAPH}: scores within {worst:.1e} of {RANK_GRAPH}")


if __name__ == "__main__":
    main()
