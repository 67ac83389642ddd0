"""Parity: the largest score difference between two ways of computing the same scores.

Each measure returns the largest absolute difference of a probability over random requests. The manifest publishes the
measures as a variant's `invariance`, and a variant above its bound is not published.

Called by: `bundle_writer.py`, `compression/`, `latency.py`. Calls: `inference/engine.py`, and the torch model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from slatewise.bundle.manifest import Manifest
from slatewise.inference.arrays import (
    CONTEXT_SIZE,
    FIRST_ITEM,
    GAP_BUCKETS,
    GAP_FIRST,
    GAP_MISSING,
    START_ITEM,
    UNKNOWN_ACTION,
    Candidates,
    History,
    HistoryState,
    PointScores,
    join,
)
from slatewise.inference.engine import Engine
from slatewise.inference.item_table import ItemTable
from slatewise_train.rankers.base import Calibrations, RankerModel

SLATES = (1, 2, 37, 512)  # candidates of the random requests
# Measures of a server's optional settings. The variant's bound does not apply to them.
OPTIONS = ("int8_history_state",)


class Requests:
    """Draws random requests that fit a bundle, from a seed."""

    def __init__(self, engine: Engine, manifest: Manifest, seed: int = 0) -> None:
        self.engine = engine
        self.manifest = manifest
        self.rng = np.random.default_rng(seed)
        self.lengths = (0, 1, manifest.limits.history_used)  # events of the histories

    def history(self, length: int) -> History:
        gaps = self.rng.integers(0, GAP_BUCKETS, length)
        gaps[:1] = GAP_FIRST
        items = self.rng.integers(FIRST_ITEM, len(self.engine.items), length)
        return History(items, self.rng.integers(0, len(self.manifest.actions) + 1, length), gaps)

    def candidates(self, n: int) -> Candidates:
        numeric = self.rng.normal(2, 1, (n, len(self.manifest.features))).astype(np.float32)
        numeric[self.rng.random(numeric.shape) < 0.2] = np.nan
        vectors = self.engine.items.take(self.rng.integers(FIRST_ITEM, len(self.engine.items), n), axis=0)
        return Candidates(vectors, numeric, self.rng.uniform(-1, 1, (1, CONTEXT_SIZE)).astype(np.float32))

    def meta(self) -> np.ndarray:
        """Draw a meta-embedding (M,) float32."""
        return self.rng.normal(0, 0.3, self.manifest.meta_size).astype(np.float32)

    def state(self, history: History) -> HistoryState:
        return self.engine.extend(self.engine.start, history) if len(history) else self.engine.start

    def every_size(self) -> Iterator[tuple[History, Candidates, np.ndarray]]:
        """Yield history, candidates and meta-embedding for every combination of `lengths` and SLATES."""
        for length in self.lengths:
            for n in SLATES:
                history = self.history(length)
                candidates = self.candidates(n)
                yield history, candidates, self.meta()


def pick(candidates: Candidates, rows: np.ndarray) -> Candidates:
    return Candidates(candidates.vectors[rows], candidates.numeric[rows], candidates.context)


def worst(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest absolute difference, or 0 for empty arrays."""
    return float(np.abs(a - b).max(initial=0.0))


def against_torch(draw: Requests, model: RankerModel, calibrations: Calibrations) -> float:
    """Return the largest difference between the ONNX graphs and the torch model, at every exit."""
    result = 0.0
    for history, candidates, meta in draw.every_size():
        logits = torch_logits(model, draw.engine.items, history, candidates, meta)
        for exit in draw.manifest.exits:
            columns = [1 / (1 + np.exp(-c(logits[exit][:, k]))) for k, c in enumerate(calibrations[exit])]
            found = draw.engine.score(history, candidates, meta, exit)
            result = max(result, worst(found, np.stack(columns, axis=1)))
    return result


@torch.no_grad()
def torch_logits(
    model: RankerModel, items: ItemTable, history: History, candidates: Candidates, meta: np.ndarray
) -> dict[str, np.ndarray]:
    """Return logits (N, heads) of every exit by the torch model, without dropout."""
    model.eval()
    return {exit: value[0].numpy() for exit, value in logits_of(model, items, history, candidates, meta).items()}


def logits_of(
    model: RankerModel, items: ItemTable, history: History, candidates: Candidates, meta: np.ndarray
) -> dict[str, Tensor]:
    """Return logits (1, N, heads) of every exit by the torch model, with gradients. meta: (M,)."""
    tensor = torch.from_numpy
    columns = ((START_ITEM, history.items), (UNKNOWN_ACTION, history.actions), (GAP_MISSING, history.gaps))
    rows, actions, gaps = (np.concatenate([[start], column])[None] for start, column in columns)
    tokens = model.tokens(tensor(items.take(rows, axis=0)), tensor(actions), tensor(gaps))
    encoded, users = model.encode(tokens)
    vectors = tensor(candidates.vectors)[None]
    fused = model.fuse(tensor(candidates.numeric)[None], tensor(meta)[None, None], tensor(candidates.context)[:, None])
    hidden = model.hidden(vectors, encoded, torch.tensor([rows.shape[1]]), None, fused)
    return model.logits_by_exit(model.dot_logits(users[:, -1:], vectors), hidden, meta=tensor(meta)[None])


def one_pass(draw: Requests) -> float:
    """Return the largest difference between one pass over N candidates and N passes, at the exit `point`."""
    result = 0.0
    for history, candidates, meta in draw.every_size():
        state = draw.state(history)
        whole = draw.engine.point(candidates, meta, state).probabilities
        single = [pick(candidates, np.array([k])) for k in range(len(candidates))]
        alone = [draw.engine.point(candidate, meta, state).probabilities for candidate in single]
        result = max(result, worst(whole, np.concatenate(alone)))
    return result


def extended(draw: Requests) -> float:
    """Return the largest difference between a history encoded in steps and the same history encoded at once.

    The steps are 1 event, 5 events, event by event, and chunks. A prefix of the state that is extended again is
    compared too.
    """
    result = 0.0
    candidates = draw.candidates(50)
    meta = draw.meta()
    longest = draw.manifest.limits.history_used
    chunks = list(range(64, longest, 64)) or [1]
    for steps in ([max(1, longest - 1)], [max(1, longest - 5)], list(range(1, 20)), chunks, [7]):
        history = draw.history(longest if steps[-1] > 19 else 20)
        state = draw.engine.start
        for first, last in zip([0, *steps], [*steps, len(history)], strict=True):
            state = draw.engine.extend(state, history[first:last])
        fresh = draw.state(history)
        again = draw.engine.extend(draw.engine.prefix(fresh, steps[0]), history[steps[0] :])
        expected = draw.engine.point(candidates, meta, fresh).probabilities
        for other in (state, again):
            keys = [worst(a, b) for a, b in zip(other.keys, fresh.keys, strict=True)]
            found = draw.engine.point(candidates, meta, other).probabilities
            result = max(result, worst(other.user, fresh.user), *keys, worst(found, expected))
    return result


def candidate_chunks(draw: Requests) -> float:
    """Return the largest difference between chunks of candidates and one call, for `point` and `set`."""
    result = 0.0
    candidates = draw.candidates(600)
    meta = draw.meta()
    state = draw.state(draw.history(draw.manifest.limits.history_used))
    whole = draw.engine.point(candidates, meta, state)
    for size in (1, 7, 64, 256):
        chunks = join([draw.engine.point(candidates, meta, state, slice(k, k + size)) for k in range(0, 600, size)])
        result = max(result, worst(chunks.probabilities, whole.probabilities))
        if "set" in draw.manifest.exits:
            result = max(result, worst(draw.engine.set(chunks), draw.engine.set(whole)))
    return result


def permutation(draw: Requests) -> float:
    """Return the largest difference between scores of permuted candidates and permuted scores, at the highest exit."""
    result = 0.0
    exit = draw.manifest.exits[-1]
    for history, candidates, meta in draw.every_size():
        order = draw.rng.permutation(len(candidates))
        scores = draw.engine.score(history, candidates, meta, exit)
        result = max(result, worst(draw.engine.score(history, pick(candidates, order), meta, exit), scores[order]))
    return result


def padding(draw: Requests) -> float:
    """Return the largest difference between requests padded into one batch and each request alone.

    It covers the graphs `encode`, `point` and `set`.
    """
    engine = draw.engine
    sizes = (5, 64, 1)
    histories = [draw.history(n) for n in (3, 40, 17)]
    slates = [draw.candidates(n) for n in sizes]
    metas = [draw.meta() for _ in sizes]
    states = [draw.state(history) for history in histories]
    users = engine.run("encode", encode_feeds(engine, histories))["user"]
    result = worst(users, np.concatenate([state.user for state in states]))
    feeds = point_feeds(engine, slates, metas, states) | {"user": users}
    if draw.manifest.features:
        feeds["numeric"] = pad([c.numeric for c in slates])
    batch = engine.run("point", feeds)
    for row, (candidates, meta, state) in enumerate(zip(slates, metas, states, strict=True)):
        alone = engine.point(candidates, meta, state)
        result = max(result, worst(batch["probabilities"][row, : len(candidates)], alone.probabilities))
    if "set" in draw.manifest.exits:
        out = engine.run("set", {"hidden": batch["hidden"], "logits": batch["logits"], "set_length": np.array(sizes)})
        for row, n in enumerate(sizes):
            point = PointScores(*(batch[name][row, :n] for name in ("probabilities", "logits", "hidden")))
            result = max(result, worst(out["probabilities"][row, :n], engine.set(point)))
    return result


def pad(arrays: list[np.ndarray]) -> np.ndarray:
    """Pad arrays (n, ...) of different lengths on the right and stack them.

    The padding is 1 for float32 and 0 otherwise.
    """
    longest = max(len(a) for a in arrays)
    padded = []
    for a in arrays:
        widths = [(0, longest - len(a)), *[(0, 0)] * (a.ndim - 1)]
        padded.append(np.pad(a, widths, constant_values=1 if a.dtype == np.float32 else 0))
    return np.stack(padded)


def encode_feeds(engine: Engine, histories: list[History]) -> dict[str, np.ndarray]:
    """Build the inputs of the graph `encode` for a padded batch of histories."""
    feeds = {"items": pad([engine.items.take(h.items, axis=0) for h in histories])}
    feeds |= {"actions": pad([h.actions for h in histories]), "gaps": pad([h.gaps for h in histories])}
    for i in range(engine.blocks):
        feeds[f"past_key_{i}"] = np.repeat(engine.start.keys[i], len(histories), axis=0)
        feeds[f"past_value_{i}"] = np.repeat(engine.start.values[i], len(histories), axis=0)
    return feeds | {"length": np.array([len(h) for h in histories])}


def point_feeds(
    engine: Engine, slates: list[Candidates], metas: list[np.ndarray], states: list[HistoryState]
) -> dict[str, np.ndarray]:
    """Build the inputs of the graph `point` for a padded batch of requests, without `user` and `numeric`."""
    feeds = {"candidates": pad([c.vectors for c in slates]), "meta": np.stack(metas)}
    feeds["context"] = np.concatenate([c.context for c in slates])
    feeds["history_length"] = np.array([state.events + 1 for state in states])
    for i in engine.decoder_blocks:
        feeds[f"key_{i}"] = pad([state.keys[i][0] for state in states])
        feeds[f"value_{i}"] = pad([state.values[i][0] for state in states])
    return feeds


def int8_history_state(draw: Requests) -> float:
    """Return the largest difference between the exit `point` on a cached history in int8 and in float32.

    The state is packed as a whole, or packed after half of its events and then extended.
    """
    result = 0.0
    for history, candidates, meta in draw.every_size():
        middle = len(history) // 2
        state = draw.state(history)
        half = draw.state(history[:middle]).packed().unpacked()
        extended = draw.engine.extend(half, history[middle:]) if len(history) else state
        exact = draw.engine.point(candidates, meta, state).probabilities
        for packed in (state.packed().unpacked(), extended.packed().unpacked()):
            result = max(result, worst(draw.engine.point(candidates, meta, packed).probabilities, exact))
    return result


def measure_parity(
    engine: Engine, manifest: Manifest, model: RankerModel, calibrations: Calibrations
) -> dict[str, float]:
    """Return all measures by name. The bound of a variant does not apply to the measures in OPTIONS."""
    measures: dict[str, Callable[[Requests], float]] = {
        "onnx_against_torch": lambda draw: against_torch(draw, model, calibrations),
        "one_pass_against_n_passes": one_pass,
        "extended_against_fresh": extended,
        "chunks_against_whole": candidate_chunks,
        "permutation": permutation,
        "padding": padding,
        "int8_history_state": int8_history_state,
    }
    named = tqdm(measures.items(), desc="parity", mininterval=2)
    return {name: measured(Requests(engine, manifest, seed)) for seed, (name, measured) in enumerate(named, start=1)}


def rounded(measured: dict[str, float]) -> dict[str, float]:
    """Round the measures to three significant digits, as a manifest has them."""
    return {name: float(f"{value:.2e}") for name, value in measured.items()}
