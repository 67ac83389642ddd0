"""One variant of a ranker: ONNX Runtime sessions that take arrays and return arrays. The only onnxruntime import.

Before: `pipeline.py`, which calls it a quantum at a time from the threads of `workers.py`. Each method is one call of
one graph and safe to run from several threads at once: a state is a value, nothing is kept here.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slatewise.bundle.features import GAP_MISSING, START_ITEM, UNKNOWN_ACTION, Float32, Float64, Int64
from slatewise.bundle.manifest import ManifestError
from slatewise.inference.item_table import ItemTable

HISTORY_CHUNK = 256  # events of one call
CANDIDATE_CHUNK = 512  # candidates of one call


class EngineError(RuntimeError):
    """The model failed on a request, or its output is not finite."""


@dataclass(frozen=True)
class HistoryState:
    """An encoded history: what candidates read, and what new events extend. Immutable, shared between requests."""

    keys: tuple[Float32, ...]  # per block (1, K, key width), K = events + 1 for the start token
    values: tuple[Float32, ...]  # per block (1, K, value width)
    user: Float32  # (1, d) the newest event's hidden state; (1, 0) where it is not known, of a `prefix`

    @property
    def events(self) -> int:
        return int(self.keys[0].shape[1]) - 1

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.keys, *self.values, self.user))

    def unpacked(self) -> HistoryState:
        return self

    def packed(self) -> PackedState:
        return PackedState(pack(self.keys), pack(self.values), self.user)


Packed = tuple[NDArray[np.int8], Float32]  # codes (blocks, K, width), scales (blocks, K, 1)


def pack(arrays: tuple[Float32, ...]) -> Packed:
    rows = np.concatenate(arrays)
    scales = np.maximum(np.abs(rows).max(axis=2, keepdims=True), np.finfo(np.float32).tiny) / np.float32(127)
    return np.rint(rows / scales).astype(np.int8), scales


@dataclass(frozen=True)
class PackedState:
    """The same in about a quarter of the bytes: int8 with a scale for each token, symmetric."""

    keys: Packed
    values: Packed
    user: Float32

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.keys, *self.values, self.user))

    def unpacked(self) -> HistoryState:
        keys, values = (np.multiply(codes, scales, dtype=np.float32) for codes, scales in (self.keys, self.values))
        return HistoryState(tuple(keys[:, None]), tuple(values[:, None]), self.user)

    def packed(self) -> PackedState:
        return self


KeptState = HistoryState | PackedState


@dataclass(frozen=True)
class History:
    """The events a ranker reads, as rows: (L,) each."""

    items: Int64
    actions: Int64
    gaps: Int64

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, rows: slice) -> History:
        return History(self.items[rows], self.actions[rows], self.gaps[rows])

    @property
    def nbytes(self) -> int:
        return self.items.nbytes + self.actions.nbytes + self.gaps.nbytes

    def equals(self, other: History) -> bool:
        return len(self) == len(other) == self.common_prefix(other)

    def common_prefix(self, other: History) -> int:
        """How many first events two histories share."""
        n = min(len(self), len(other))
        same = (
            (self.items[:n] == other.items[:n])
            & (self.actions[:n] == other.actions[:n])
            & (self.gaps[:n] == other.gaps[:n])
        )
        return n if same.all() else int(same.argmin())


@dataclass(frozen=True)
class Candidates:
    """The candidates of a request, and what joins late: (N, d) vectors, (N, F) numeric features with NaN for missing."""

    vectors: Float32
    numeric: Float32
    context: Float32  # (1, 4)

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True)
class PointScores:
    """Result of the exit `point`, and what the exit `set` goes on from."""

    probabilities: Float64  # (N, heads)
    logits: Float32  # (N, heads)
    hidden: Float32  # (N, d)


class Engine:
    """Loads `<folder>/{encode,dot,point,set}.onnx`; `items` is the variant's item table (rows, d).

    Each call takes one thread, so that requests do not wait for each other's; a call may be `wide` and take all of
    `threads`, for a request that has the machine to itself.
    """

    def __init__(self, folder: Path, items: ItemTable, exits: list[str], threads: int) -> None:
        self.items = items
        graphs = ("encode", *exits)
        try:
            self.sessions = {name: open_session(folder / f"{name}.onnx", 1) for name in graphs}
            self.multi_threaded = (
                {name: open_session(folder / f"{name}.onnx", threads) for name in graphs if name != "dot"}
                if threads > 1
                else {}
            )
        except Exception as error:  # onnxruntime has no common base class for what it raises
            raise ManifestError(f"{folder}: onnxruntime refuses it: {error}") from error
        self.outputs = {name: [o.name for o in session.get_outputs()] for name, session in self.sessions.items()}
        past = {i.name: i.shape[-1] for i in self.sessions["encode"].get_inputs() if i.name.startswith("past_")}
        if unknown := [name for name, width in past.items() if not isinstance(width, int)]:
            raise ManifestError(f"{folder}: encode.onnx does not say how wide {', '.join(unknown)} is")
        nothing = {name: np.zeros((1, 0, width), np.float32) for name, width in past.items()}
        self.blocks = len(nothing) // 2
        start = History(np.array([START_ITEM]), np.array([UNKNOWN_ACTION]), np.array([GAP_MISSING]))
        keys, values = (tuple(nothing[f"past_{part}_{i}"] for i in range(self.blocks)) for part in ("key", "value"))
        nowhere = HistoryState(keys, values, np.zeros((1, 0), np.float32))
        self.start = self.extend(nowhere, start)  # the state of an empty history

    def run(self, graph: str, feeds: dict[str, NDArray[Any]], multi_threaded: bool = False) -> dict[str, NDArray[Any]]:
        session = self.multi_threaded.get(graph, self.sessions[graph]) if multi_threaded else self.sessions[graph]
        try:
            return dict(zip(self.outputs[graph], session.run(None, feeds), strict=True))
        except Exception as error:
            raise EngineError(f"graph {graph} failed: {error}") from error

    def extend(self, state: HistoryState, events: History, multi_threaded: bool = False) -> HistoryState:
        """The state after more events (at least one); `state` itself stays as it is."""
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
        new = self.run("encode", feeds, multi_threaded)
        blocks = range(self.blocks)
        real = slice(state.keys[0].shape[1] + count)
        return HistoryState(
            tuple(new[f"key_{i}"][:, real] for i in blocks),
            tuple(new[f"value_{i}"][:, real] for i in blocks),
            new["user"],
        )

    def prefix(self, state: HistoryState, events: int) -> HistoryState:
        """The keys and values of a state's first events, not copied. To be extended only: its user vector is not known."""
        if events == state.events:
            return state
        if events == 0:
            return self.start
        first = slice(events + 1)
        return HistoryState(
            tuple(k[:, first] for k in state.keys), tuple(v[:, first] for v in state.values), state.user[:, :0]
        )

    def dot(self, candidates: Candidates, state: HistoryState) -> Float64:
        """(N, heads) probabilities of the exit `dot`."""
        return self.probabilities(self.run("dot", {"candidates": candidates.vectors[None], "user": state.user}))

    def point(
        self,
        candidates: Candidates,
        meta: Float32,
        state: HistoryState,
        rows: slice = slice(None),
        multi_threaded: bool = False,
    ) -> PointScores:
        """Exit `point` of some of the candidates; meta is (M,). Exact in chunks: no candidate sees another."""
        vectors = candidates.vectors[rows]
        feeds: dict[str, NDArray[Any]] = {
            "candidates": pad_single_row(vectors)[None],
            "meta": meta[None],
            "context": candidates.context,
            "user": state.user,
            "history_length": np.array([state.events + 1]),
        }
        if candidates.numeric.shape[1]:
            feeds["numeric"] = pad_single_row(candidates.numeric[rows])[None]
        for i in range(self.blocks):
            feeds[f"key_{i}"] = state.keys[i]
            feeds[f"value_{i}"] = state.values[i]
        out = self.run("point", feeds, multi_threaded)
        real = slice(len(vectors))
        return PointScores(self.probabilities(out)[real], out["logits"][0, real], out["hidden"][0, real])

    def set(self, point: PointScores, multi_threaded: bool = False) -> Float64:
        """(N, heads) probabilities of the exit `set`: the candidates see each other."""
        feeds = {
            "hidden": point.hidden[None],
            "logits": point.logits[None],
            "set_length": np.array([len(point.hidden)]),
        }
        return self.probabilities(self.run("set", feeds, multi_threaded))

    def probabilities(self, out: dict[str, NDArray[Any]]) -> Float64:
        result: Float64 = out["probabilities"][0]
        if not np.isfinite(result).all():
            raise EngineError("a score is not finite")
        return result

    def score(
        self, history: History, candidates: Candidates, meta: Float32, exit: str, multi_threaded: bool = False
    ) -> Float64:
        """The slow, obvious way, and the reference of `pipeline.py`: nothing kept, nothing in chunks."""
        state = self.extend(self.start, history, multi_threaded) if len(history) else self.start
        if exit == "dot":
            return self.dot(candidates, state)
        point = self.point(candidates, meta, state, multi_threaded=multi_threaded)
        return point.probabilities if exit == "point" else self.set(point, multi_threaded)


def pad_single_row(rows: NDArray[Any]) -> NDArray[Any]:
    """One row twice, more as they are: matrix products of a single row go another way in ONNX Runtime and round otherwise.

    From two rows on, a row's hidden state does not depend on how many there are, to the last bit: an extended history is
    the fresh one, and no rounding step of an int8 variant is taken to the other side by a chunk.
    """
    return rows.repeat(2, axis=0) if len(rows) == 1 else rows


def open_session(graph: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # the threads of a call may spin, or waking them costs more than they save; between calls the cores are others'
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(threads > 1)))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.enable_mem_pattern = False  # shapes differ from request to request
    options.enable_cpu_mem_arena = False  # it never shrinks, and costs as much time as malloc (docs/performance.md)
    options.log_severity_level = 3
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def join(chunks: list[PointScores]) -> PointScores:
    """Chunks of one request, end to end."""
    if len(chunks) == 1:
        return chunks[0]
    return PointScores(
        np.concatenate([c.probabilities for c in chunks]),
        np.concatenate([c.logits for c in chunks]),
        np.concatenate([c.hidden for c in chunks]),
    )


def cpu_name() -> str:
    """The machine that a measurement was made on."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"
