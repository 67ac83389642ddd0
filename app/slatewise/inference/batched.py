"""Runs the graphs of an engine on several histories or slates in one call. One call costs less than many small ones.

Shapes: B rows of a batch, T new tokens of a history, K encoded tokens, N candidates, d the width of an item vector, H
heads. Rows are padded on the right, and no result depends on the padding. A row gives the probabilities that `Engine`
gives for it alone, up to rounding.

Called by: `ranking/explain.py`. Calls: `engine.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slatewise.inference.arrays import Candidates, Float32, Float64, HistoryState, Int64
from slatewise.inference.engine import Engine, EngineError


@dataclass(frozen=True)
class Tails:
    """The last tokens of B histories; all arrays but the last are (B, T). The start token may be one of them."""

    items: Int64  # rows of the item table
    actions: Int64  # rows of the action table
    gaps: Int64  # buckets of the time since the event before
    lengths: Int64  # (B,) tokens without padding, at least 1


@dataclass(frozen=True)
class States:
    """B encoded histories."""

    keys: tuple[Float32, ...]  # per block (B, K, key width)
    values: tuple[Float32, ...]  # per block (B, K, value width)
    users: Float32  # (B, d)
    lengths: Int64  # (B,) tokens without padding


@dataclass(frozen=True)
class Slates:
    """The result of the exit `point` for B slates, and the input of the exit `set`."""

    probabilities: Float64  # (B, N, H)
    logits: Float32  # (B, N, H)
    hidden: Float32  # (B, N, d)


def encode(engine: Engine, past: HistoryState, shared: int, tails: Tails) -> States:
    """Encode histories that share the first `shared` tokens of `past`, 0 or more. Raises EngineError."""
    rows = len(tails.lengths)
    feeds: dict[str, NDArray[Any]] = {
        "items": engine.items.take(tails.items, axis=0),
        "actions": tails.actions,
        "gaps": tails.gaps,
        "length": tails.lengths,
    }
    for i in range(engine.blocks):
        feeds[f"past_key_{i}"] = past.keys[i][:, :shared].repeat(rows, axis=0)
        feeds[f"past_value_{i}"] = past.values[i][:, :shared].repeat(rows, axis=0)
    out = engine.run("encode", feeds)
    keys, values = (tuple(out[f"{part}_{i}"] for i in range(engine.blocks)) for part in ("key", "value"))
    return States(keys, values, out["user"], shared + tails.lengths)


def dot(engine: Engine, vectors: Float32, states: States) -> Float64:
    """Return the (B, N, H) probabilities of the exit `dot` for candidates with the vectors (N, d)."""
    rows = len(states.lengths)
    return probabilities(engine.run("dot", {"candidates": alike(vectors, rows), "user": states.users}))


def point(engine: Engine, candidates: Candidates, meta: Float32, states: States) -> Slates:
    """Compute the exit `point` of the same candidates after each of the histories; `meta` is (M,)."""
    rows = len(states.lengths)
    feeds: dict[str, NDArray[Any]] = {
        "candidates": alike(candidates.vectors, rows),
        "meta": alike(meta, rows),
        "context": candidates.context.repeat(rows, axis=0),
        "user": states.users,
        "history_length": states.lengths,
    }
    if candidates.numeric.shape[1]:
        feeds["numeric"] = alike(candidates.numeric, rows)
    for i in engine.decoder_blocks:
        feeds[f"key_{i}"] = states.keys[i]
        feeds[f"value_{i}"] = states.values[i]
    out = engine.run("point", feeds)
    return Slates(probabilities(out), out["logits"], out["hidden"])


def set_wise(engine: Engine, hidden: Float32, logits: Float32) -> Float64:
    """Return the (B, N, H) probabilities of the exit `set` for slates of equal size, hidden (B, N, d)."""
    rows, size = hidden.shape[:2]
    feeds = {"hidden": hidden, "logits": logits, "set_length": np.full(rows, size)}
    return probabilities(engine.run("set", feeds))


def alike(array: Float32, rows: int) -> Float32:
    return array[None].repeat(rows, axis=0)


def probabilities(out: dict[str, NDArray[Any]]) -> Float64:
    result: Float64 = out["probabilities"]
    if not np.isfinite(result).all():
        raise EngineError("a score is not finite")
    return result
