"""What must not change a score, measured on a variant: the numbers behind the bound that its manifest prints.

Each function returns the largest absolute difference of a probability. Before: `export.py` has written the graphs.
After: the manifest's `invariance`; `export.py` refuses to publish above the bound.
"""

from __future__ import annotations

import numpy as np
import torch
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
from slatewise_train.rankers.ligr import Ligr

SLATES = (1, 2, 37, 512)
OPTIONS = ("int8_history_state",)  # what a server may be set to, with a bound of its own


class Requests:
    """Draws requests that look like a bundle's, from a seed."""

    def __init__(self, engine: Engine, manifest: Manifest, seed: int = 0) -> None:
        self.engine = engine
        self.manifest = manifest
        self.rng = np.random.default_rng(seed)
        self.histories = (0, 1, manifest.limits.history_used)

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
        return self.rng.normal(0, 0.3, self.manifest.meta_size).astype(np.float32)

    def state(self, history: History) -> HistoryState:
        return self.engine.extend(self.engine.start, history) if len(history) else self.engine.start


def pick(candidates: Candidates, rows: np.ndarray) -> Candidates:
    return Candidates(candidates.vectors[rows], candidates.numeric[rows], candidates.context)


def worst(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max(initial=0.0))


def against_torch(draw: Requests, model: Ligr, calibrations: dict) -> float:
    """ONNX against the torch model, all exits."""
    result = 0.0
    for length in draw.histories:
        for n in SLATES:
            history = draw.history(length)
            candidates = draw.candidates(n)
            meta = draw.meta()
            logits = torch_logits(model, draw.engine.items, history, candidates, meta)
            for exit in draw.manifest.exits:
                expected = np.stack(
                    [1 / (1 + np.exp(-c(logits[exit][:, k]))) for k, c in enumerate(calibrations[exit])], axis=1
                )
                result = max(result, worst(draw.engine.score(history, candidates, meta, exit), expected))
    return result


@torch.no_grad()
def torch_logits(
    model: Ligr, items: ItemTable, history: History, candidates: Candidates, meta: np.ndarray
) -> dict[str, np.ndarray]:
    """(N, heads) logits of every exit, by the torch model as it is trained."""
    model.eval()
    return {exit: value[0].numpy() for exit, value in logits_of(model, items, history, candidates, meta).items()}


def logits_of(
    model: Ligr, items: ItemTable, history: History, candidates: Candidates, meta: np.ndarray
) -> dict[str, torch.Tensor]:
    """(1, N, heads), with gradients."""
    tensor = torch.from_numpy
    columns = (
        (START_ITEM, history.items),
        (UNKNOWN_ACTION, history.actions),
        (GAP_MISSING, history.gaps),
    )  # the start token first
    rows, actions, gaps = (np.concatenate([[first], column])[None] for first, column in columns)
    state, users = model.encode(model.tokens(tensor(items.take(rows, axis=0)), tensor(actions), tensor(gaps)))
    vectors = tensor(candidates.vectors)[None]
    fused = model.fuse(tensor(candidates.numeric)[None], tensor(meta)[None, None], tensor(candidates.context)[:, None])
    hidden = model.hidden(vectors, state, torch.tensor([rows.shape[1]]), None, fused)
    dot = model.dot_logits(users[:, -1:], vectors)
    point = dot + model.point_logits(hidden)
    return {"dot": dot, "point": point} | ({"set": point + model.set_logits(hidden)} if model.config.set_blocks else {})


def one_pass(draw: Requests) -> float:
    """Exit `point`: one pass over N candidates against N passes over one."""
    result = 0.0
    for length in draw.histories:
        for n in SLATES:
            history = draw.history(length)
            candidates = draw.candidates(n)
            meta = draw.meta()
            state = draw.state(history)
            whole = draw.engine.point(candidates, meta, state).probabilities
            alone = [draw.engine.point(pick(candidates, np.array([k])), meta, state).probabilities for k in range(n)]
            result = max(result, worst(whole, np.concatenate(alone)))
    return result


def extended(draw: Requests) -> float:
    """A history encoded in steps (extended by 1, by 5, event by event, in chunks) against the same at once."""
    result = 0.0
    candidates = draw.candidates(50)
    meta = draw.meta()
    longest = draw.manifest.limits.history_used
    for steps in (
        [max(1, longest - 1)],
        [max(1, longest - 5)],
        list(range(1, 20)),
        list(range(64, longest, 64)) or [1],
        [7],
    ):
        history = draw.history(longest if steps[-1] > 19 else 20)
        state = draw.engine.start
        for first, last in zip([0, *steps], [*steps, len(history)], strict=True):
            state = draw.engine.extend(state, history[first:last])
        fresh = draw.state(history)
        cut = draw.engine.prefix(fresh, steps[0])
        again = draw.engine.extend(cut, history[steps[0] :])
        for other in (state, again):
            result = max(
                result,
                worst(other.user, fresh.user),
                *(worst(a, b) for a, b in zip(other.keys, fresh.keys, strict=True)),
            )
            result = max(
                result,
                worst(
                    draw.engine.point(candidates, meta, other).probabilities,
                    draw.engine.point(candidates, meta, fresh).probabilities,
                ),
            )
    return result


def candidate_chunks(draw: Requests) -> float:
    """Exit `point` in chunks of 1, 7, 64 and 512 candidates, and the exit `set` behind them, against all at once."""
    result = 0.0
    candidates = draw.candidates(600)
    meta = draw.meta()
    state = draw.state(draw.history(draw.manifest.limits.history_used))
    whole = draw.engine.point(candidates, meta, state)
    for size in (1, 7, 64, 512):
        chunks = join([draw.engine.point(candidates, meta, state, slice(k, k + size)) for k in range(0, 600, size)])
        result = max(result, worst(chunks.probabilities, whole.probabilities))
        if "set" in draw.manifest.exits:
            result = max(result, worst(draw.engine.set(chunks), draw.engine.set(whole)))
    return result


def permutation(draw: Requests) -> float:
    """Permuted candidates give permuted scores, at the highest exit."""
    result = 0.0
    for length in draw.histories:
        for n in SLATES:
            history = draw.history(length)
            candidates = draw.candidates(n)
            meta = draw.meta()
            order = draw.rng.permutation(n)
            exit = draw.manifest.exits[-1]
            scores = draw.engine.score(history, candidates, meta, exit)
            result = max(result, worst(draw.engine.score(history, pick(candidates, order), meta, exit), scores[order]))
    return result


def padding(draw: Requests) -> float:
    """Requests of different sizes padded into one batch, each graph, against each request alone."""
    engine = draw.engine
    lengths = (3, 40, 17)
    sizes = (5, 64, 1)
    histories = [draw.history(n) for n in lengths]
    slates = [draw.candidates(n) for n in sizes]
    metas = [draw.meta() for _ in sizes]

    def pad(arrays: list[np.ndarray]) -> np.ndarray:
        longest = max(len(a) for a in arrays)
        widths = [[(0, longest - len(a)), *[(0, 0)] * (a.ndim - 1)] for a in arrays]
        return np.stack(
            [
                np.pad(a, w, constant_values=1 if a.dtype == np.float32 else 0)
                for a, w in zip(arrays, widths, strict=True)
            ]
        )

    feeds = {"items": pad([engine.items.take(h.items, axis=0) for h in histories]), "length": np.array(lengths)}
    feeds |= {"actions": pad([h.actions for h in histories]), "gaps": pad([h.gaps for h in histories])}
    for i in range(engine.blocks):
        for name, start in (("key", engine.start.keys[i]), ("value", engine.start.values[i])):
            feeds[f"past_{name}_{i}"] = np.repeat(start, len(lengths), axis=0)
    encoded = engine.run("encode", feeds)
    states = [draw.state(h) for h in histories]
    result = worst(encoded["user"], np.concatenate([s.user for s in states]))
    feeds = {
        "candidates": pad([c.vectors for c in slates]),
        "meta": np.stack(metas),
        "context": np.concatenate([c.context for c in slates]),
    }
    if draw.manifest.features:
        feeds["numeric"] = pad([c.numeric for c in slates])
    feeds |= {"user": encoded["user"], "history_length": np.array([s.events + 1 for s in states])}
    for i in range(engine.blocks):
        feeds[f"key_{i}"] = pad([s.keys[i][0] for s in states])
        feeds[f"value_{i}"] = pad([s.values[i][0] for s in states])
    batch = engine.run("point", feeds)
    for row, (candidates, meta, state) in enumerate(zip(slates, metas, states, strict=True)):
        alone = engine.point(candidates, meta, state)
        result = max(result, worst(batch["probabilities"][row, : len(candidates)], alone.probabilities))
    if "set" in draw.manifest.exits:
        out = engine.run("set", {"hidden": batch["hidden"], "logits": batch["logits"], "set_length": np.array(sizes)})
        for row, n in enumerate(sizes):
            alone_set = engine.set(
                PointScores(batch["probabilities"][row, :n], batch["logits"][row, :n], batch["hidden"][row, :n])
            )
            result = max(result, worst(out["probabilities"][row, :n], alone_set))
    return result


def int8_history_state(draw: Requests) -> float:
    """Exit `point` on a kept history in int8, whole and extended from its middle, against fp32."""
    result = 0.0
    for length in draw.histories:
        for n in SLATES:
            history = draw.history(length)
            candidates = draw.candidates(n)
            meta = draw.meta()
            state = draw.state(history)
            half = draw.state(history[: length // 2]).packed().unpacked()
            extended = draw.engine.extend(half, history[length // 2 :]) if length else state
            exact = draw.engine.point(candidates, meta, state).probabilities
            for packed in (state.packed().unpacked(), extended.packed().unpacked()):
                result = max(result, worst(draw.engine.point(candidates, meta, packed).probabilities, exact))
    return result


def measure(engine: Engine, manifest: Manifest, model: Ligr, calibrations: dict) -> dict[str, float]:
    """All of them, by name; those of OPTIONS have bounds of their own."""
    measures = {
        "onnx_against_torch": lambda draw: against_torch(draw, model, calibrations),
        "one_pass_against_n_passes": one_pass,
        "extended_against_fresh": extended,
        "chunks_against_whole": candidate_chunks,
        "permutation": permutation,
        "padding": padding,
        "int8_history_state": int8_history_state,
    }
    named = tqdm(measures.items(), desc="what must not change a score", mininterval=2)
    return {name: measured(Requests(engine, manifest, seed)) for seed, (name, measured) in enumerate(named, start=1)}


def rounded(measured: dict[str, float]) -> dict[str, float]:
    """As a manifest has them: three digits."""
    return {name: float(f"{value:.2e}") for name, value in measured.items()}
