"""Nested ranks: low rank of several shares in one set of weights.

The factors of a smaller rank are the first rows and columns of those of a larger one, because each method of
`low_rank.py` orders its directions by what they keep. Training draws one of the shares in every step (ordered dropout:
FjORD, arXiv 2102.13451; of factored layers: Maestro, arXiv 2308.14929), so that the first directions stay the most
important ones. Afterwards the model of each share is cut out, with ordinary layers.

Called by: `bases.py`, `distill.py`. Calls: `low_rank.py`, `rankers/families.py`, `rankers/layers.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slatewise_train.compression.low_rank import Factors, LayerStatistics, factors_of
from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerModel
from slatewise_train.rankers.layers import LowRank

Ranks = Mapping[str, int | None]  # layer -> its rank, `None` for an unfactored layer


class NestedLowRank(nn.Module):
    """A layer y = second (first x + code) + mean, of which the first `rank` directions are used.

    The bias of `first` is `code`, which the directions have in common at every rank; that of `second` is `mean`.

    ranks: of each share, the largest share first; `None` uses all directions. active: the share in use, from 0.
    """

    def __init__(self, factors: Factors, ranks: Sequence[int | None]) -> None:
        super().__init__()
        count, size = factors.first.shape
        self.ranks = tuple(ranks)
        self.active = 0
        self.first = nn.Linear(size, count)
        self.second = nn.Linear(count, len(factors.second))
        with torch.no_grad():
            for parameter, value in (
                (self.first.weight, factors.first),
                (self.first.bias, factors.code),
                (self.second.weight, factors.second),
                (self.second.bias, factors.mean),
            ):
                parameter.copy_(value)

    def forward(self, x: Tensor) -> Tensor:
        rank = self.ranks[self.active]
        if rank is None:  # one product of the merged layers is less work than two
            return F.linear(x, *self.merged())
        code = F.linear(x, self.first.weight[:rank], self.first.bias[:rank])
        return F.linear(code, self.second.weight[:, :rank], self.second.bias)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return weight (out, in) and bias (out,) of the dense layer that all directions together equal."""
        return self.second.weight @ self.first.weight, self.bias(None)

    def bias(self, rank: int | None) -> Tensor:
        """Return the bias (out,) of y = second (first x) + bias at a rank."""
        return self.second.bias + self.second.weight[:, :rank] @ self.first.bias[:rank]

    @torch.no_grad()
    def cut(self, share: int) -> nn.Module:
        """Return the layer of a share, counted from 0: two thin layers, or a dense one where it has no rank."""
        rank = self.ranks[share]
        size, out = self.first.in_features, self.second.out_features
        if rank is None:
            dense = nn.Linear(size, out)
            for parameter, value in zip((dense.weight, dense.bias), self.merged(), strict=True):
                parameter.copy_(value)
            return dense
        thin = LowRank(size, rank, out)
        thin.first.weight.copy_(self.first.weight[:rank])
        thin.second.weight.copy_(self.second.weight[:, :rank])
        thin.second.bias.copy_(self.bias(rank))
        return thin


def nest(
    model: RankerModel, statistics: Mapping[str, LayerStatistics], method: str, shares: Sequence[Ranks]
) -> RankerModel:
    """Return a copy of the model whose layers have the ranks of all shares.

    shares: ranks of each share, the largest share first. A layer without a rank in any share stays as it is.
    """
    result = copy.deepcopy(model)
    for name, layer in families.dense_layers(model).items():
        ranks = [share.get(name) for share in shares]
        if known := [rank for rank in ranks if rank is not None]:
            most = min(layer.weight.shape) if None in ranks else max(known)
            result.set_submodule(name, NestedLowRank(factors_of(layer, statistics[name], method, most), ranks))
    return result


def nested_layers(model: nn.Module) -> dict[str, NestedLowRank]:
    """Return the nested layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NestedLowRank)}


def shares_of(model: nn.Module) -> list[dict[str, int | None]]:
    """Return the ranks of each share, by nested layer; empty for a model without nested layers."""
    layers = nested_layers(model)
    return [
        dict(zip(layers, ranks, strict=True)) for ranks in zip(*(layer.ranks for layer in layers.values()), strict=True)
    ]


def choose(model: nn.Module, share: int) -> None:
    """Let the nested layers of a model use the ranks of a share, counted from 0."""
    for layer in nested_layers(model).values():
        layer.active = share


def cut(model: RankerModel, share: int) -> RankerModel:
    """Return a copy of a nested model at a share, counted from 0, with layers of low rank or dense ones."""
    result = copy.deepcopy(model)
    for name, layer in nested_layers(model).items():
        result.set_submodule(name, layer.cut(share))
    return result.eval()
