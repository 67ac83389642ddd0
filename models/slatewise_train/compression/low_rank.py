"""Low rank: replace one dense layer by two thin ones, `y = second (first x) + bias`.

    svd     the closest approximation of the weights (Eckart and Young 1936)
    fwsvd   the same, with each row weighted by its Fisher information (FWSVD, arXiv 2207.00112)
    afm     the principal components of the outputs, with their mean in the bias (AFM, arXiv 2405.18146)

`allocate` distributes a budget over the layers so that the largest relative error is minimal (ALDS, arXiv 2107.11442).

Called by: `bases.py`, `nested.py`, `source.py`, `loadtest/`. `compress.py` lists its methods. Calls:
`rankers/families.py` for the dense layers of a ranker, `rankers/layers.py` for the two thin ones,
`rankers/onnx_builder.py` to measure their time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerModel
from slatewise_train.rankers.layers import LowRank
from slatewise_train.rankers.onnx_builder import GraphBuilder, linear


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of a dense layer on calibration data, float64."""

    mean: Tensor  # (out,) mean of the outputs
    covariance: Tensor  # (out, out) of the outputs
    fisher: Tensor  # (out,) squared gradients of the loss, summed over each row, mean over batches


@dataclass(frozen=True)
class Factors:
    """y = second (first x + code) + mean

    The first r rows of `first` and of `code`, and the first r columns of `second`, are the factors of rank r.
    """

    first: Tensor  # (rank, in)
    second: Tensor  # (out, rank)
    code: Tensor  # (rank,)
    mean: Tensor  # (out,)

    @property
    def bias(self) -> Tensor:
        """The bias (out,) of y = second (first x) + bias. It depends on the rank where `code` is not 0."""
        return self.mean + self.second @ self.code


Method = Callable[[Tensor, Tensor, LayerStatistics, int], Factors]


def svd(weight: Tensor, bias: Tensor, statistics: LayerStatistics, rank: int) -> Factors:
    """Factor by truncated singular value decomposition. weight (out, in), bias (out,), float64."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return Factors(root[:, None] * v[:rank], u[:, :rank] * root, torch.zeros_like(root), bias)


def fwsvd(weight: Tensor, bias: Tensor, statistics: LayerStatistics, rank: int) -> Factors:
    """Factor as `svd` does, with each row scaled by the square root of its Fisher information."""
    importance = row_importance(statistics)
    factors = svd(importance[:, None] * weight, bias, statistics, rank)
    return Factors(factors.first, factors.second / importance[:, None], factors.code, bias)


def afm(weight: Tensor, bias: Tensor, statistics: LayerStatistics, rank: int) -> Factors:
    """Factor as U U' (W x + b) + (I - U U') mean. The columns of U are the first principal components of the outputs.

    Among all maps of the same rank it has the lowest squared error on the calibration data.
    """
    u = torch.linalg.eigh(statistics.covariance).eigenvectors.flip(1)[:, :rank]  # descending
    return Factors(u.T @ weight, u, u.T @ (bias - statistics.mean), statistics.mean)


METHODS: dict[str, Method] = {"svd": svd, "fwsvd": fwsvd, "afm": afm}


def row_importance(statistics: LayerStatistics) -> Tensor:
    """Return (out,) square roots of the rows' Fisher information, at least a millionth of the largest."""
    return statistics.fisher.clamp(min=1e-12 * float(statistics.fisher.max()) or 1.0).sqrt()


def spectrum(method: str, weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """Return (ranks,) errors in descending order. Entry r is the error of a factorization of rank r.

    The error is the largest one in the norm that the method minimizes.
    """
    if method == "afm":
        return torch.linalg.eigvalsh(statistics.covariance).flip(0).clamp(min=0).sqrt()
    return torch.linalg.svdvals(weight if method == "svd" else row_importance(statistics)[:, None] * weight)


@torch.no_grad()
def thin_layers(factors: Factors) -> LowRank:
    """Build the two layers of a factorization."""
    rank, size = factors.first.shape
    layer = LowRank(size, rank, len(factors.second))
    layer.first.weight.copy_(factors.first)
    layer.second.weight.copy_(factors.second)
    layer.second.bias.copy_(factors.bias)
    return layer


def collect_statistics(model: RankerModel, losses: Callable[[], Iterable[Tensor]]) -> dict[str, LayerStatistics]:
    """Collect statistics of every dense layer. `losses` runs batches through the model and yields the loss of each."""
    layers = families.dense_layers(model)
    count = dict.fromkeys(layers, 0)
    total = {name: torch.zeros(layer.out_features, dtype=torch.float64) for name, layer in layers.items()}
    square = {
        name: torch.zeros(layer.out_features, layer.out_features, dtype=torch.float64) for name, layer in layers.items()
    }
    fisher = {name: torch.zeros(layer.out_features, dtype=torch.float64) for name, layer in layers.items()}

    def gather(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            rows = output.detach().flatten(0, -2).double()
            count[name] += len(rows)
            total[name] += rows.sum(0)
            square[name] += rows.T @ rows

        return hook

    hooks = [layer.register_forward_hook(gather(name)) for name, layer in layers.items()]
    batches = 0
    try:
        for loss in losses():
            model.zero_grad()
            loss.backward()
            batches += 1
            for name, layer in layers.items():
                if layer.weight.grad is not None:
                    fisher[name] += layer.weight.grad.double().square().sum(1)
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    statistics = {}
    for name in layers:
        mean = total[name] / count[name]
        covariance = square[name] / count[name] - torch.outer(mean, mean)
        statistics[name] = LayerStatistics(mean, covariance, fisher[name] / batches)
    return statistics


@dataclass(frozen=True)
class Layer:
    """Errors and costs of one layer by rank, for the allocator."""

    errors: list[float]  # relative errors of ranks 0, 1, ...: descending from 1
    costs: list[float]  # costs of ranks 0, 1, ...: ascending
    whole: float  # cost of the unfactored layer, whose error is 0
    least: int = 1  # the lowest rank that it may have

    def rank(self, error: float) -> int | None:
        """Return the lowest rank, at least `least`, whose error is at most `error`.

        Returns `None` when the unfactored layer does not cost more than that rank.
        """
        rank = max(self.least, sum(e > error for e in self.errors))
        return None if rank >= len(self.costs) or self.costs[rank] >= self.whole else rank

    def cost(self, rank: int | None) -> float:
        return self.whole if rank is None else self.costs[rank]

    def error(self, rank: int | None) -> float:
        return 0.0 if rank is None or rank >= len(self.errors) else self.errors[rank]


def layer_of(spectrum: Tensor, weight: Tensor) -> Layer:
    """Build a layer whose costs are numbers of parameters, without the bias. spectrum: the result of `spectrum`."""
    size = sum(weight.shape)
    errors = [float(value) for value in spectrum / spectrum[0]]
    return Layer(errors, [float(rank * size) for rank in range(len(errors))], float(weight.numel()))


def timed_layer(spectrum: Tensor, weight: Tensor, rows: int = 200, steps: int = 16) -> Layer:
    """Build a layer whose costs are microseconds for `rows` rows on this machine, in ONNX Runtime with one thread.

    At most `steps` ranks are measured; the costs of the ranks between them are interpolated.
    """
    errors = [float(value) for value in spectrum / spectrum[0]]
    measured = np.unique(np.linspace(1, min(weight.shape), steps, dtype=int))
    times = np.maximum.accumulate([microseconds([weight[:rank], weight[:, :rank]], rows) for rank in measured])
    return Layer(
        errors, [0.0, *np.interp(np.arange(1, len(errors)), measured, times).tolist()], microseconds([weight], rows)
    )


def microseconds(weights: list[Tensor], rows: int, repeats: int = 30) -> float:
    """Measure the median time of a chain of dense layers, each (out, in), for that many rows."""
    g = GraphBuilder("layers")
    x = g.input("x", ["N", weights[0].shape[1]])
    for k, weight in enumerate(weights):
        x = linear(g, x, f"layer{k}", weight.float().numpy(), None)
    g.output("y", x, ["N", len(weights[-1])])
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(g.model().SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": np.zeros((rows, weights[0].shape[1]), np.float32)}
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        session.run(None, feeds)
        found.append(time.perf_counter() - begin)
    return float(np.median(found)) * 1e6


def allocate(layers: Mapping[str, Layer], budget: float) -> dict[str, int | None]:
    """Choose ranks by layer within the budget that minimize the largest relative error.

    `None` leaves a layer unfactored. Raises ValueError when the lowest rank of every layer already exceeds the budget.
    """
    levels = sorted({0.0, 1.0, *(error for layer in layers.values() for error in layer.errors)})

    def ranks(level: float) -> dict[str, int | None]:
        return {name: layer.rank(level) for name, layer in layers.items()}

    def fits(level: float) -> bool:
        return sum(layers[name].cost(rank) for name, rank in ranks(level).items()) <= budget

    if not fits(levels[-1]):
        raise ValueError(f"a budget of {budget:g} is less than the lowest rank of every layer costs")
    low = 0
    high = len(levels) - 1  # the lowest level that fits is at most `high`
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(levels[middle]) else (middle + 1, high)
    return ranks(levels[low])


def factor(
    model: RankerModel, statistics: Mapping[str, LayerStatistics], method: str, ranks: Mapping[str, int | None]
) -> RankerModel:
    """Return a copy of the model with each layer at its rank. A layer with rank `None` or no rank stays as it is."""
    result = copy.deepcopy(model)
    for name, layer in families.dense_layers(model).items():
        if (rank := ranks.get(name)) is not None:
            result.set_submodule(name, thin_layers(factors_of(layer, statistics[name], method, rank)))
    return result


def factors_of(layer: nn.Linear, statistics: LayerStatistics, method: str, rank: int) -> Factors:
    """Factor a layer by a method of METHODS, in float64."""
    return METHODS[method](layer.weight.detach().double(), layer.bias.detach().double(), statistics, rank)
