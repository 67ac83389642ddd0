"""Low rank: a dense layer becomes two thin ones, out of what is known of its weights or of its outputs.
The methods against each other: python -m slatewise_train.compression.low_rank models/bundles/movielens/4 models/movielens.toml

    svd     the best approximation of the weights (Eckart and Young 1936)
    fwsvd   of the weights, each row weighed by its Fisher information (FWSVD, arXiv 2207.00112)
    afm     of the outputs: their principal components, the mean carried in the bias (AFM, arXiv 2405.18146)

All end as one runtime form, `y = second (first x) + bias`. `allocate` shares a budget among layers so that the largest
relative error is least (ALDS, arXiv 2107.11442). Before: a trained `Ligr`, and `see` on calibration data. After: `compress.py`.
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

from slatewise_train.rankers.onnx_builder import GraphBuilder, linear


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration data shows of a dense layer, float64."""

    mean: Tensor  # (out,) of its outputs
    covariance: Tensor  # (out, out)
    fisher: Tensor  # (out,) a row's squared gradients of the loss, summed; means over batches


@dataclass(frozen=True)
class Factors:
    """y = second (first x) + bias"""

    first: Tensor  # (rank, in)
    second: Tensor  # (out, rank)
    bias: Tensor  # (out,)


Method = Callable[[Tensor, Tensor, LayerStatistics, int], Factors]


def svd(weight: Tensor, bias: Tensor, seen: LayerStatistics, rank: int) -> Factors:
    """weight (out, in), bias (out,), float64."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return Factors(root[:, None] * v[:rank], u[:, :rank] * root, bias)


def fwsvd(weight: Tensor, bias: Tensor, seen: LayerStatistics, rank: int) -> Factors:
    importance = row_importance(seen)
    factors = svd(importance[:, None] * weight, bias, seen, rank)
    return Factors(factors.first, factors.second / importance[:, None], bias)


def afm(weight: Tensor, bias: Tensor, seen: LayerStatistics, rank: int) -> Factors:
    """U U' (W x + b) + (I - U U') mean, U the outputs' first principal components: no other map of this rank is closer to the outputs seen."""
    u = torch.linalg.eigh(seen.covariance).eigenvectors.flip(1)[:, :rank]  # descending
    return Factors(u.T @ weight, u, seen.mean + u @ (u.T @ (bias - seen.mean)))


METHODS: dict[str, Method] = {"svd": svd, "fwsvd": fwsvd, "afm": afm}


def row_importance(seen: LayerStatistics) -> Tensor:
    """(out,) square roots of the rows' Fisher information; a row that the loss never felt counts as a millionth of the largest."""
    return seen.fisher.clamp(min=1e-12 * float(seen.fisher.max()) or 1.0).sqrt()


def spectrum(method: str, weight: Tensor, seen: LayerStatistics) -> Tensor:
    """(ranks,) what each direction contributes, descending: entry r is the error, in the method's own norm, of rank r."""
    if method == "afm":
        return torch.linalg.eigvalsh(seen.covariance).flip(0).clamp(min=0).sqrt()
    return torch.linalg.svdvals(weight if method == "svd" else row_importance(seen)[:, None] * weight)


class LowRank(nn.Module):
    """Two linears in place of one."""

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        rank, size = factors.first.shape
        self.first = nn.Linear(size, rank, bias=False)
        self.second = nn.Linear(rank, len(factors.second))
        with torch.no_grad():
            self.first.weight.copy_(factors.first)
            self.second.weight.copy_(factors.second)
            self.second.bias.copy_(factors.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def dense_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that may be factored, by name: those of the blocks, where the work is."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: layer for name, layer in found.items() if "blocks." in name}


def collect_statistics(model: nn.Module, losses: Callable[[], Iterable[Tensor]]) -> dict[str, LayerStatistics]:
    """Means, covariances and Fisher information of every dense layer over the batches that `losses` runs through the model."""
    layers = dense_layers(model)
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
    seen = {}
    for name in layers:
        mean = total[name] / count[name]
        seen[name] = LayerStatistics(mean, square[name] / count[name] - torch.outer(mean, mean), fisher[name] / batches)
    return seen


@dataclass(frozen=True)
class Layer:
    """What the allocator knows of a layer."""

    errors: list[float]  # relative, of rank 0, 1, ...: descending, the first is 1
    costs: list[float]  # of rank 0, 1, ...: ascending
    whole: float  # cost of the layer as it is; its error is 0

    def rank(self, error: float) -> int | None:
        """The least rank, at least 1, whose error is not above this one; None where the layer as it is costs no more."""
        rank = max(1, sum(e > error for e in self.errors))
        return None if rank >= len(self.costs) or self.costs[rank] >= self.whole else rank

    def cost(self, rank: int | None) -> float:
        return self.whole if rank is None else self.costs[rank]

    def error(self, rank: int | None) -> float:
        return 0.0 if rank is None or rank >= len(self.errors) else self.errors[rank]


def layer_of(spectrum: Tensor, weight: Tensor) -> Layer:
    """Costs are parameters, without the bias."""
    size = sum(weight.shape)
    errors = [float(value) for value in spectrum / spectrum[0]]
    return Layer(errors, [float(rank * size) for rank in range(len(errors))], float(weight.numel()))


def timed_layer(spectrum: Tensor, weight: Tensor, rows: int = 200, steps: int = 16) -> Layer:
    """Costs are microseconds of that many rows in onnxruntime on this machine, one thread: of `steps` ranks measured, of others between them."""
    errors = [float(value) for value in spectrum / spectrum[0]]
    measured = np.unique(np.linspace(1, min(weight.shape), steps, dtype=int))
    times = np.maximum.accumulate([microseconds([weight[:rank], weight[:, :rank]], rows) for rank in measured])
    return Layer(
        errors, [0.0, *np.interp(np.arange(1, len(errors)), measured, times).tolist()], microseconds([weight], rows)
    )


def microseconds(weights: list[Tensor], rows: int, repeats: int = 30) -> float:
    """Median of one dense layer behind another, each (out, in)."""
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
    """Ranks (None: left alone) within the budget whose largest relative error is least. Raises ValueError where even rank 1 costs more."""
    levels = sorted({0.0, 1.0, *(error for layer in layers.values() for error in layer.errors)})

    def ranks(level: float) -> dict[str, int | None]:
        return {name: layer.rank(level) for name, layer in layers.items()}

    def fits(level: float) -> bool:
        return sum(layers[name].cost(rank) for name, rank in ranks(level).items()) <= budget

    if not fits(levels[-1]):
        raise ValueError(f"a budget of {budget:g} is less than rank 1 of every layer costs")
    low = 0
    high = len(levels) - 1  # the least level that fits is at most `high`
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(levels[middle]) else (middle + 1, high)
    return ranks(levels[low])


def uniform(layers: Mapping[str, Layer], budget: float) -> dict[str, int | None]:
    """The same share of every layer's largest saving rank, as large as the budget allows: what `allocate` is held against."""

    def ranks(share: float) -> dict[str, int | None]:
        most = {name: sum(cost < layer.whole for cost in layer.costs[1:]) for name, layer in layers.items()}
        return {name: max(1, round(share * most[name])) if most[name] else None for name in layers}

    for percent in range(100, -1, -1):
        found = ranks(percent / 100)
        if sum(layers[name].cost(rank) for name, rank in found.items()) <= budget:
            return found
    raise ValueError(f"a budget of {budget:g} is less than rank 1 of every layer costs")


def factor(
    model: nn.Module, seen: Mapping[str, LayerStatistics], method: str, ranks: Mapping[str, int | None]
) -> nn.Module:
    """A copy of the model with each of these layers at its rank."""
    result = copy.deepcopy(model)
    for name, layer in dense_layers(model).items():
        if (rank := ranks.get(name)) is not None:
            weight = layer.weight.detach().double()
            bias = layer.bias.detach().double()
            owner, _, part = name.rpartition(".")
            setattr(result.get_submodule(owner), part, LowRank(METHODS[method](weight, bias, seen[name], rank)))
    return result


def output_errors(model: nn.Module, layers: Mapping[str, LowRank], run: Callable[[], object]) -> dict[str, float]:
    """By layer: what its low-rank form misses of the outputs' variance while `run` runs the model, relative to it."""
    missed, square, total, count = (dict.fromkeys(layers, 0.0) for _ in range(4))

    def gather(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows = output.flatten(0, -2)
            missed[name] += (layers[name](inputs[0]).flatten(0, -2) - rows).double().square().sum()
            square[name] = square[name] + rows.double().square().sum()
            total[name] = total[name] + rows.double().sum(0)
            count[name] = count[name] + len(rows)

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(gather(name)) for name in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: float(missed[name] / (square[name] - (total[name] ** 2).sum() / count[name]))
        for name in layers
        if count[name]
    }


def main() -> None:
    """Errors of each method at equal ranks, on what it has seen and on held-out users; intervals over users."""
    import argparse
    from pathlib import Path

    from slatewise_train.compress import Source
    from slatewise_train.config import read_config
    from slatewise_train.data import load_data
    from slatewise_train.evaluation.metrics import interval
    from slatewise_train.evaluation.parity import logits_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("toml", type=Path, help="of its training")
    args = parser.parse_args()
    config = read_config(args.toml)
    source = Source(args.bundle, load_data(config.data, config.tables), config.train)
    model = source.model
    layers = dense_layers(source.model)
    print("| rank | method | error on what it saw | on held-out users (95 %) |\n" + "| --- " * 4 + "|")
    for share in (0.75, 0.5, 0.25):
        for method in METHODS:
            ranks = {name: max(1, round(share * min(layer.weight.shape))) for name, layer in layers.items()}
            small = factor(model, source.seen, method, ranks)
            low = {name: module for name, module in small.named_modules() if isinstance(module, LowRank)}
            known = output_errors(model, low, lambda: list(map(float, source.losses())))
            users = [
                np.mean(
                    list(
                        output_errors(
                            model,
                            low,
                            lambda: logits_of(model, source.items, s.history, s.candidates(source.items), s.meta),  # noqa: B023
                        ).values()
                    )
                )
                for s in source.samples
            ]
            mean, least, most = interval(np.array(users))
            print(
                f"| {share:.0%} | {method} | {np.mean(list(known.values())):.4f} | {mean:.4f} ({least:.4f} to {most:.4f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
