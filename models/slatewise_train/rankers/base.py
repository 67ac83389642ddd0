"""The interface of a ranker family: its config, its torch model, and the exporter of its serving graphs.

A ranker scores in a cascade of exits. `dot` is the product of user and item vector, `point` adds a term for each
candidate, `set` adds a term that depends on the other candidates of the slate. Unless a family overrides `point`:

    logit = scale (user . item) + bias        exit dot
          + point_logits(hidden)              exit point
          + set_logits(hidden)                exit set

Called by: every offline module that uses a ranker; `families.py` builds rankers. Calls: no module of this package.

Letters in shapes: B sequences, T history positions (the start token is position 0), N candidates, d width, h width of
hidden states (d in most families), F numeric features, M numbers of a meta-embedding, H attention heads, V values of a
multi-valued field.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx
from torch import Tensor, nn
from torch.nn import functional as F

from slatewise.schemas import EXITS as EXITS  # the only list of exits; the offline half imports it from here

EncodedHistory = list[tuple[Tensor, Tensor]]  # per block: keys (B, H, T, key size) and values (B, H, T, value size)


@dataclass(frozen=True)
class RankerConfig:
    """The sizes that every family has. A family's own config extends this class. All values can be stored as JSON.

    `dataclasses.asdict(config)` is the form that a bundle stores; `families.build` reads it back.
    """

    items: int  # rows of the item table, with the unknown item and the start token
    actions: int  # with the unknown action
    fields: dict[str, int]  # categorical column -> rows, with row 0 for items without a value
    numeric: int  # numeric features of a candidate
    heads: int  # outputs
    width: int  # of all vectors
    # The heads for which users have weights of their own, see `personal_features`. `export` sets them, not the TOML.
    personal_heads: tuple[int, ...] = field(default=(), repr=False)


class RankerModel(nn.Module, ABC):
    """A torch ranker.

    A family also has parameters named `item.weight`, `action.weight` (row 0 is the unknown action), `default_meta`,
    `dot_scale` and `dot_bias`.
    """

    family: ClassVar[str]  # its key in `families.FAMILIES`
    config: RankerConfig
    default_meta: nn.Parameter  # (M,) used for a user without a meta-embedding
    dot_scale: nn.Parameter  # (heads,)
    dot_bias: nn.Parameter  # (heads,)
    numeric_mean: Tensor  # (F,) buffer
    numeric_std: Tensor  # (F,) buffer

    @property
    def meta_size(self) -> int:
        """Numbers of a meta-embedding that the late fusion reads."""
        return len(self.default_meta)

    @property
    def vector_size(self) -> int:
        """Numbers of a whole meta-embedding (M): those of the late fusion, then the user's own weights by head."""
        return self.meta_size + len(self.config.personal_heads) * (self.hidden_size + 1)

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """Width of hidden states (h)."""

    def default_vector(self) -> Tensor:
        """Return the whole meta-embedding (M,) of a user without one. The user's own weights are zero."""
        default = self.default_meta.detach()
        return F.pad(default, (0, self.vector_size - self.meta_size))

    @property
    @abstractmethod
    def exits(self) -> tuple[str, ...]:
        """The exits of this model, cheapest first: a prefix of `EXITS`."""

    @abstractmethod
    def item_table(self) -> Tensor:
        """Return the item vectors, metadata fields included: (items, d)."""

    @abstractmethod
    def cold_item_vectors(self, table: Tensor) -> Tensor:
        """Return each item's vector as if its id were unknown, computed from its fields alone: (items, d).

        table: the result of `item_table`.
        """

    @abstractmethod
    def item_vectors(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the `item_table` and the `cold_item_vectors` of some items: (n, d) twice.

        rows: (n,) of the items, the unknown item first. A batch of training has few items of a large catalogue.
        """

    @abstractmethod
    def field_table(self, name: str) -> Tensor:
        """Return the vectors of a categorical column's values, row 0 for a missing value: (rows, d)."""

    @abstractmethod
    def freeze_meta(self) -> None:
        """Keep training from changing `default_meta` and `meta_shift`: stored meta-embeddings keep their meaning."""

    @abstractmethod
    def without_meta(self) -> RankerModel:
        """Return a copy without a meta-embedding (M = 0).

        The copy gives the logits of this ranker with `default_meta`, up to rounding.
        """

    @abstractmethod
    def with_personal_heads(self, heads: tuple[int, ...]) -> RankerModel:
        """Return a copy for whose `heads` users have weights of their own. With zero weights, logits are equal."""

    @abstractmethod
    def tokens(self, item_vectors: Tensor, actions: Tensor, gaps: Tensor) -> Tensor:
        """Embed the history: item vectors (B, T, d), action rows (B, T), gap buckets (B, T) -> tokens (B, T, d)."""

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[EncodedHistory, Tensor]:
        """Encode tokens (B, T, d), start token first. Returns the encoded history, and user vectors (B, T, d).

        The encoder is causal: position t depends on the positions up to t alone.
        """

    @abstractmethod
    def fuse(self, numeric: Tensor, meta: Tensor, context: Tensor) -> Tensor:
        """Combine the request's inputs, which `hidden` adds after the candidates have read the history: (..., N, h).

        numeric: (..., N, F) raw numbers, NaN for missing; meta: (..., 1, M), whose first numbers count; context:
        (..., 1, 4).
        """

    @abstractmethod
    def meta_shift(self, meta: Tensor) -> Tensor:
        """Return the change of `fuse` when its meta-embedding changes from zero to meta (..., M): (..., h)."""

    @abstractmethod
    def hidden(
        self, vectors: Tensor, history: EncodedHistory, positions: Tensor, mask: Tensor | None, fused: Tensor
    ) -> Tensor:
        """Return hidden states (B, N, h) of candidates that each read the history and no other candidate.

        They are a sum of `fused` and a part that does not depend on it.

        vectors: (B, N, d); positions: (1,) or (B, N), the candidates' places after the history; fused: as `fuse`
        returns it; mask: (B, 1, N, T), True for the positions that a candidate may read, or None for all of them.
        """

    @abstractmethod
    def dot_logits(self, users: Tensor, vectors: Tensor) -> Tensor:
        """Return logits of the exit `dot`: user vectors (B, 1, d), candidates' vectors (B, N, d) -> (B, N, heads)."""

    @abstractmethod
    def point_logits(self, hidden: Tensor) -> Tensor:
        """Return the term that the exit `point` adds: hidden states (..., N, h) -> (..., N, heads)."""

    def point(self, dot: Tensor, hidden: Tensor) -> Tensor:
        """Return logits of the exit `point`: (..., N, heads).

        dot: of `dot_logits`; hidden: (..., N, h).
        """
        return dot + self.point_logits(hidden)

    @abstractmethod
    def set_logits(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the term that the exit `set` adds: hidden states (B, N, h) -> (B, N, heads).

        The candidates attend to each other. mask: (B, 1, 1, N), False for padding.
        """

    def personal_logits(self, hidden: Tensor, meta: Tensor) -> Tensor:
        """Return the term of the users' own weights: hidden (B, N, h), meta (B, M) -> (B, N, heads)."""
        heads = self.config.personal_heads
        weights = meta[:, self.meta_size :].unflatten(1, (len(heads), self.hidden_size + 1))
        found = hidden.new_zeros(*hidden.shape[:-1], self.config.heads)
        found[..., list(heads)] = personal_features(hidden) @ weights.mT
        return found

    def logits_by_exit(
        self, dot: Tensor, hidden: Tensor, mask: Tensor | None = None, meta: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return logits (B, N, heads) of every exit, from `dot_logits` and `hidden`. The N candidates are one slate.

        mask: as in `set_logits`; meta: (B, M) whole meta-embeddings, None for users without weights of their own.
        """
        point = self.point(dot, hidden)
        if self.config.personal_heads and meta is not None:
            point = point + self.personal_logits(hidden, meta)
        logits = {"dot": dot, "point": point}
        if "set" in self.exits:
            logits["set"] = logits["point"] + self.set_logits(hidden, mask)
        return logits


def personal_features(hidden: Tensor) -> Tensor:
    """Return what a user's own weights multiply: normalised hidden states, and a 1: (..., h) -> (..., h + 1)."""
    h = hidden.shape[-1]
    return F.pad(F.layer_norm(hidden, (h,)) / h**0.5, (0, 1), value=1.0)


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
        """Calibrate logits of any shape. Returns float64."""
        logits = logits.astype(np.float64)
        return self.bias + self.slope * logits + np.maximum(logits[..., None] - self.knots, 0.0) @ self.bends


Calibrations = dict[str, list[Calibration]]  # exit -> one for each head


def uncalibrated(exits: Sequence[str], heads: int) -> Calibrations:
    """Return identity maps for every exit and head."""
    return {exit: [Calibration.identity() for _ in range(heads)] for exit in exits}


class RankerGraphs(ABC):
    """Writes one ranker as ONNX graphs. Made by `families.graphs(model, calibrations, longest_history)`.

    `slatewise.inference.engine` runs the graphs. Their inputs and outputs are the same for every family;
    `late_fusion_onnx.py` lists them.
    """

    @abstractmethod
    def all(self) -> dict[str, onnx.ModelProto]:
        """Build the graphs that a server loads: `encode`, and one for each exit."""

    @abstractmethod
    def rank(self, items: np.ndarray, head_weights: Sequence[float]) -> onnx.ModelProto:
        """Build one graph of the whole ranker, item table included.

        Inputs are row numbers; outputs are probabilities and scores. items: (rows, d).
        """
