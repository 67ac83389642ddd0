"""The interface of a ranker family: its config, its torch model, and the exporter of its serving graphs.

A ranker scores in a cascade of exits. `dot` is the product of user and item vector, `point` adds a term for each
candidate, `set` adds a term that depends on the other candidates of the slate:

    logit = scale (user . item) + bias        exit dot
          + point_logits(hidden)              exit point
          + set_logits(hidden)                exit set

Called by: every offline module that handles a ranker; they get one from `families.py`. Calls: nothing of this package.

Letters in shapes: B sequences, T history positions (the start token is position 0), N candidates, d width, F numeric
features, M numbers of a meta-embedding, H attention heads, V values of a multi-valued field.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
from torch import Tensor, nn

from slatewise.schemas import EXITS as EXITS  # the only list of exits; the offline half imports it from here

EncodedHistory = list[tuple[Tensor, Tensor]]  # per block: keys (B, H, T, key size) and values (B, H, T, value size)


@dataclass(frozen=True)
class RankerConfig:
    """The sizes that every family has. A family's own config extends this; all values are JSON-able.

    `dataclasses.asdict(config)` is the form that a bundle stores; `families.build` reads it back.
    """

    items: int  # rows of the item table, with the unknown item and the start token
    actions: int  # with the unknown action
    fields: dict[str, int]  # categorical column -> rows, with row 0 for items without a value
    numeric: int  # numeric features of a candidate
    heads: int  # outputs
    width: int  # of all vectors


class RankerModel(nn.Module, ABC):
    """A torch ranker. A family also has parameters named `item.weight`, `default_meta`, `dot_scale` and `dot_bias`."""

    family: ClassVar[str]  # its key in `families.FAMILIES`
    config: RankerConfig
    default_meta: nn.Parameter  # (M,) the meta-embedding of a user without one
    dot_scale: nn.Parameter  # (heads,)
    dot_bias: nn.Parameter  # (heads,)
    numeric_mean: Tensor  # (F,) buffer
    numeric_std: Tensor  # (F,) buffer

    @property
    def meta_size(self) -> int:
        """M."""
        return len(self.default_meta)

    @property
    @abstractmethod
    def exits(self) -> tuple[str, ...]:
        """The exits of this model, cheapest first: a prefix of `EXITS`."""

    @abstractmethod
    def item_table(self) -> Tensor:
        """The item vectors, metadata fields included: (items, d)."""

    @abstractmethod
    def cold_item_vectors(self, table: Tensor) -> Tensor:
        """Each item's vector as if its id were unknown, from its fields alone: (items, d). table: `item_table()`."""

    @abstractmethod
    def field_table(self, name: str) -> Tensor:
        """The vectors of a categorical column's values, row 0 for a missing value: (rows, d)."""

    @abstractmethod
    def without_meta(self) -> RankerModel:
        """A copy with M = 0. Its logits are those of this ranker with `default_meta`, up to rounding."""

    @abstractmethod
    def tokens(self, item_vectors: Tensor, actions: Tensor, gaps: Tensor) -> Tensor:
        """Item vectors (B, T, d), action rows (B, T) and gap buckets (B, T) -> history tokens (B, T, d)."""

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[EncodedHistory, Tensor]:
        """Tokens (B, T, d), start token first -> the encoded history, and a user vector per position (B, T, d).

        Causal: position t depends on the positions up to t alone.
        """

    @abstractmethod
    def fuse(self, numeric: Tensor, meta: Tensor, context: Tensor) -> Tensor:
        """Late fusion of the request's inputs: (..., N, d).

        numeric: (..., N, F) raw numbers, NaN for missing; meta: (..., 1, M); context: (..., 1, 4).
        """

    @abstractmethod
    def meta_shift(self, meta: Tensor) -> Tensor:
        """The change of `fuse` when its meta-embedding goes from zero to meta (..., M): (..., d)."""

    @abstractmethod
    def hidden(
        self, vectors: Tensor, history: EncodedHistory, positions: Tensor, mask: Tensor | None, fused: Tensor
    ) -> Tensor:
        """Hidden states (B, N, d) of candidates that each read the history and no other candidate.

        vectors: (B, N, d); positions: (1,) or (B, N), the candidates' places behind the history; fused: as `fuse`
        returns it; mask: (B, 1, N, T), True for the positions that a candidate may read, or None for all of them.
        """

    @abstractmethod
    def dot_logits(self, users: Tensor, vectors: Tensor) -> Tensor:
        """Logits of the exit `dot`: user vectors (B, 1, d), candidates' vectors (B, N, d) -> (B, N, heads)."""

    @abstractmethod
    def point_logits(self, hidden: Tensor) -> Tensor:
        """The term that the exit `point` adds: hidden states (..., N, d) -> (..., N, heads)."""

    @abstractmethod
    def set_logits(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """The term that the exit `set` adds, candidates attending to each other: (B, N, d) -> (B, N, heads).

        mask: (B, 1, 1, N), False for padding.
        """

    def logits_by_exit(self, dot: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Logits (B, N, heads) of every exit, from `dot_logits` and `hidden`. The N candidates are one slate."""
        logits = {"dot": dot, "point": dot + self.point_logits(hidden)}
        if "set" in self.exits:
            logits["set"] = logits["point"] + self.set_logits(hidden)
        return logits


@dataclass(frozen=True)
class Calibration:
    """A strictly increasing, piecewise linear map of one head's logit: `bias + slope * x + bends . relu(x - knots)`."""

    slope: float
    bias: float
    knots: np.ndarray  # (K,) float64, ascending
    bends: np.ndarray  # (K,) float64, the change of slope at each knot

    @classmethod
    def identity(cls) -> Calibration:
        return cls(1.0, 0.0, np.zeros(0), np.zeros(0))

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Logits of any shape -> calibrated logits, float64."""
        logits = logits.astype(np.float64)
        return self.bias + self.slope * logits + np.maximum(logits[..., None] - self.knots, 0.0) @ self.bends


Calibrations = dict[str, list[Calibration]]  # exit -> one for each head


def uncalibrated(exits: Sequence[str], heads: int) -> Calibrations:
    """Identity maps, for every exit and head."""
    return {exit: [Calibration.identity() for _ in range(heads)] for exit in exits}


class RankerGraphs(ABC):
    """Writes one ranker as ONNX graphs. Made by `families.graphs(model, calibrations, longest_history)`.

    The inputs and outputs are those that `slatewise.inference.engine` feeds and reads; they are the same for every
    family (`ligr_onnx.py` lists them).
    """

    @abstractmethod
    def all(self) -> dict[str, onnx.ModelProto]:
        """The graphs that a server loads: `encode`, and one for each exit."""

    @abstractmethod
    def rank(self, items: np.ndarray, head_weights: Sequence[float]) -> onnx.ModelProto:
        """Everything in one graph, item table (rows, d) included: rows of events and candidates -> scores."""
