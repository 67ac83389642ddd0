"""Runs one variant of a ranker with ONNX Runtime on the CPU. No other serving module imports onnxruntime.

The interface is `start`, `extend`, `prefix`, `dot`, `point`, `set` and `exploring`. Each method except `prefix` and
`exploring` runs one graph once, and `point` of a request that explores runs a second one.
All methods are safe to call from several threads: states are immutable, and the engine stores nothing about a request
but the time of its calls (`costs`).
`score` runs the whole cascade simply and slowly; tests compare with it.
Called by: `ranking/pipeline.py`, chunk by chunk in the threads of `workers.py`; `bundle/loader.py`, training, load
tests. Calls: onnxruntime, `item_table.py`, `costs.py`, `exploration.py`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slatewise.inference.arrays import (
    GAP_MISSING,
    START_ITEM,
    UNKNOWN_ACTION,
    Candidates,
    Float32,
    Float64,
    History,
    HistoryState,
    PointScores,
)
from slatewise.inference.costs import ONE_CALL, GraphCosts, work_of
from slatewise.inference.exploration import draw
from slatewise.inference.item_table import ItemTable

HISTORY_CHUNK = 256  # events in one call of `extend`
NO_FOLDER = "/dev/null/none"  # which cannot exist
CANDIDATE_CHUNK = 256  # candidates in one call of `point`
SLATE = 1024  # candidates in one call of `set`, at most: the limit `set_wise` of new bundles
EXPLORE = "explore"  # the graph that adds a draw to the exit `point`
DRAW = "draw"  # the costs of the draw
LARGE = 2_048  # candidates of a request that runs in half chunks


Step: TypeAlias = Callable[[Callable[[], Any]], Any]  # runs a step of a load, and returns its result


def chunk_of(candidates: int) -> int:
    """Return the number of candidates in one call of `point`.

    Others wait for a chunk of a large request. A half chunk takes half as long, and 3 % more time a candidate.
    """
    return CANDIDATE_CHUNK if candidates < LARGE else CANDIDATE_CHUNK // 2


def at_once(function: Callable[[], Any]) -> Any:
    return function()


class EngineError(RuntimeError):
    """The model failed on a request, or its output is not finite."""


class EngineLoadError(EngineError):
    """The graphs of a variant cannot be loaded."""


class Engine:
    """Loads the graph `encode` and one graph per exit; `items` is the variant's (rows, d) item table.

    source: the folder with `<graph>.onnx`, or the content of each file, which cannot change between check and use.
    A call uses one thread, that of its caller. step: runs each step of the load; a server that serves meanwhile pauses
    after it. slate: the limit `set_wise` of the ranker; requests with more candidates make several slates of them
    (`slates.py`). posterior: (heads, D, D) factors of `exploration.py`, for which the graph `explore` is loaded too;
    `None`: the engine does not explore. Raises EngineLoadError.
    """

    def __init__(
        self,
        source: Path | Mapping[str, bytes],
        items: ItemTable,
        exits: list[str],
        step: Step = at_once,
        slate: int = SLATE,
        posterior: Float32 | None = None,
    ) -> None:
        self.items = items
        self.slate = slate
        self.posterior = posterior
        self.drawn: Float32 | None = None  # (1, heads, D) of a request that explores
        names = ("encode", *exits) if posterior is None else ("encode", *exits, EXPLORE)
        graphs: dict[str, bytes | str]
        graphs = {n: str(source / f"{n}.onnx") if isinstance(source, Path) else source[n] for n in names}
        folder = f"{source}: " if isinstance(source, Path) else ""
        try:
            self.sessions = {name: step(partial(open_session, graph)) for name, graph in graphs.items()}
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise EngineLoadError(f"{folder}onnxruntime refuses it: {error}") from error
        self.costs = {name: GraphCosts() for name in (names if posterior is None else (*names, DRAW))}
        self.outputs = {name: [o.name for o in session.get_outputs()] for name, session in self.sessions.items()}
        past = {i.name: i.shape[-1] for i in self.sessions["encode"].get_inputs() if i.name.startswith("past_")}
        if unknown := [name for name, width in past.items() if not isinstance(width, int)]:
            raise EngineLoadError(f"{folder}encode.onnx has no fixed width for {', '.join(unknown)}")
        if posterior is not None:
            shapes = {i.name: i.shape[1:] for i in self.sessions[EXPLORE].get_inputs()}
            if shapes.get("drawn") != list(posterior.shape[:2]):
                raise EngineLoadError(f"{folder}explore.onnx does not match the posterior, {posterior.shape}")
        nothing = {name: np.zeros((1, 0, width), np.float32) for name, width in past.items()}
        self.blocks = len(nothing) // 2
        read = {i.name for i in self.sessions["point"].get_inputs()} if "point" in self.sessions else set()
        self.decoder_blocks = [i for i in range(self.blocks) if f"key_{i}" in read]  # those that candidates read
        start = History(np.array([START_ITEM]), np.array([UNKNOWN_ACTION]), np.array([GAP_MISSING]))
        keys, values = (tuple(nothing[f"past_{part}_{i}"] for i in range(self.blocks)) for part in ("key", "value"))
        nowhere = HistoryState(keys, values, np.zeros((1, 0), np.float32))
        self.start = self.extend(nowhere, start)  # the state of an empty history

    def run(self, graph: str, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run a graph and return its outputs by name. Raises EngineError."""
        begin = time.perf_counter()
        try:
            outputs = dict(zip(self.outputs[graph], self.sessions[graph].run(None, feeds), strict=True))
        except Exception as error:
            raise EngineError(f"graph {graph} failed: {error}") from error
        self.costs[graph].learn(work_of(graph, feeds), time.perf_counter() - begin)
        return outputs

    def extend(self, state: HistoryState, events: History) -> HistoryState:
        """Return a new state, of the events of `state` followed by `events` (at least one). Raises EngineError."""
        count = len(events)
        items, actions, gaps = (pad_single_row(column) for column in (events.items, events.actions, events.gaps))
        feeds: dict[str, NDArray[Any]] = {
            "items": self.items.take(items, axis=0)[None],  # (1, T, d)
            "actions": actions[None],
            "gaps": gaps[None],
            "length": np.array([count]),
        }
        for i in range(self.blocks):
            feeds[f"past_key_{i}"] = state.keys[i]
            feeds[f"past_value_{i}"] = state.values[i]
        new = self.run("encode", feeds)
        blocks = range(self.blocks)
        real = slice(state.keys[0].shape[1] + count)
        return HistoryState(
            tuple(new[f"key_{i}"][:, real] for i in blocks),
            tuple(new[f"value_{i}"][:, real] for i in blocks),
            new["user"],
        )

    def prefix(self, state: HistoryState, events: int) -> HistoryState:
        """Return the state of the first `events` of a state, to be extended: a view of the keys and values.

        The user vector of a shorter state is not known: its array has no columns.
        """
        if events == state.events:
            return state
        if events == 0:
            return self.start
        first = slice(events + 1)
        return HistoryState(
            tuple(k[:, first] for k in state.keys), tuple(v[:, first] for v in state.values), state.user[:, :0]
        )

    def dot(self, candidates: Candidates, state: HistoryState) -> Float64:
        """Compute the (N, heads) probabilities of the exit `dot`. Raises EngineError."""
        return self.probabilities(self.run("dot", {"candidates": candidates.vectors[None], "user": state.user}))

    def point(
        self, candidates: Candidates, meta: Float32, state: HistoryState, rows: slice = slice(None)
    ) -> PointScores:
        """Compute the exit `point` for some rows of the candidates; `meta` is (M,). Raises EngineError.

        Chunks give the same results as all rows at once, because candidates do not attend to each other.
        """
        chosen = candidates[rows]
        feeds: dict[str, NDArray[Any]] = {
            "candidates": pad_single_row(chosen.vectors)[None],
            "meta": meta[None],
            "context": candidates.context,
            "user": state.user,
            "history_length": np.array([state.events + 1]),
        }
        if chosen.numeric.shape[1]:
            feeds["numeric"] = pad_single_row(chosen.numeric)[None]
        for i in self.decoder_blocks:
            feeds[f"key_{i}"] = state.keys[i]
            feeds[f"value_{i}"] = state.values[i]
        out = self.run("point", feeds)
        real = slice(len(chosen))
        scores = PointScores(self.probabilities(out)[real], out["logits"][0, real], out["hidden"][0, real])
        return scores if self.drawn is None else self.explore(scores, self.drawn)

    def exploring(self, seed: str, scale: float) -> Engine:
        """Return this engine with a draw in its last layer of `point`, which `set` adds to. `dot` has no such layer.

        The result shares all with this engine, which stays as it is. Needs a posterior.
        """
        assert self.posterior is not None
        moved = copy.copy(self)
        begin = time.perf_counter()
        moved.drawn = draw(self.posterior, seed, scale)[None]
        self.costs[DRAW].learn(ONE_CALL, time.perf_counter() - begin)
        return moved

    def explore(self, point: PointScores, drawn: Float32) -> PointScores:
        """Add a draw (1, heads, D) to the exit `point`, whose hidden states stay. Raises EngineError."""
        feeds = {
            "hidden": pad_single_row(point.hidden)[None],
            "logits": pad_single_row(point.logits)[None],
            "drawn": drawn,
        }
        out = self.run(EXPLORE, feeds)
        real = slice(len(point))
        return PointScores(self.probabilities(out)[real], out["moved"][0, real], point.hidden)

    def set(self, point: PointScores) -> Float64:
        """Compute the (N, heads) probabilities of the exit `set` for one slate: candidates attend to each other."""
        feeds = {
            "hidden": point.hidden[None],
            "logits": point.logits[None],
            "set_length": np.array([len(point.hidden)]),
        }
        return self.probabilities(self.run("set", feeds))

    def probabilities(self, out: dict[str, NDArray[Any]]) -> Float64:
        result: Float64 = out["probabilities"][0]
        if not np.isfinite(result).all():
            raise EngineError("a score is not finite")
        return result

    def score(self, history: History, candidates: Candidates, meta: Float32, exit: str) -> Float64:
        """Compute the (N, heads) probabilities of an exit without cache and chunks. Slow: for checks and tests.

        All candidates are one slate, however many they are.
        """
        state = self.extend(self.start, history) if len(history) else self.start
        if exit == "dot":
            return self.dot(candidates, state)
        point = self.point(candidates, meta, state)
        return point.probabilities if exit == "point" else self.set(point)


def pad_single_row(rows: NDArray[Any]) -> NDArray[Any]:
    """Duplicate a single row: ONNX Runtime uses another kernel (GEMV) for one row, with other rounding.

    With two rows or more, the result of a row does not depend on the number of rows, bit for bit. So extending a
    history gives the same state as encoding all of it, and chunks do not change the rounding of an int8 variant.
    """
    return rows.repeat(2, axis=0) if len(rows) == 1 else rows


def open_session(graph: str | bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # concurrent requests would compete for more (docs/performance.md)
    options.inter_op_num_threads = 1
    # A graph has all of its weights inside, where its digest covers them: nothing is found in this folder.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", NO_FOLDER)
    options.enable_mem_pattern = False  # shapes differ from request to request
    options.enable_cpu_mem_arena = False  # the arena never shrinks, and is no faster than malloc (docs/performance.md)
    options.log_severity_level = 3
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
