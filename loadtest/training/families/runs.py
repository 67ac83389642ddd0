"""The trainings of the comparison, and the scores of each on the held-out slates.

A run is scored through its exported graphs, as a server would score it: without a fitted calibration, and with the one
that `slatewise export` fits on the validation users.

Called by: `__main__.py`. Calls: the trainer, the exporter and the calibration of `slatewise_train`.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slatewise.bundle.loader import load_bundle
from slatewise.inference.engine import Engine
from slatewise_train.bundle_writer import longest_call, write_graphs
from slatewise_train.config import Config, ModelConfig
from slatewise_train.data import Data
from slatewise_train.evaluation.calibration import fit_calibrations
from slatewise_train.evaluation.cases import Case, candidates_of, slate_cases, state_of
from slatewise_train.evaluation.parity import torch_logits
from slatewise_train.export import ExportOptions, export
from slatewise_train.new_model import build_model
from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerModel, uncalibrated
from slatewise_train.rankers.weights import serving_form
from slatewise_train.train import CHECKPOINT, Trainer, train

RESIDUAL = "residual DCN"
PLAIN = "DCNv2"
PERCEPTRON = "gated MLP"
NO_LAYER = "residual DCN, no isotonic layer"
BY_FEATURES = "residual DCN, calibration features"
EXIT = "point"
SCORES = "scores.npz"
PARITY_CASES = 100


@dataclass(frozen=True)
class Scores:
    """A run's scores of all rated items in the held-out slates, user by user."""

    raw: np.ndarray  # (E,) of the graphs without a fitted calibration; of trees, any score
    fitted: np.ndarray  # (E,) probabilities of the graphs with it
    seconds: float  # of the training
    parity: float  # largest difference of a probability between graphs and torch model


def parameters(data: Data, shape: dict[str, Any]) -> int:
    """Count the parameters of a ranker without its embeddings."""
    model = build_model(data.catalogue, data.config, ModelConfig("dcn", shape))
    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    return sum(p.numel() for p in model.parameters()) - sum(module.weight.numel() for module in embeddings)


def shapes(data: Data, base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the `[model]` of each ranker, about as many parameters as residual DCN has with `base`.

    A cross layer of residual DCN has four thin matrices. DCNv2 has two of twice the rank, the perceptron more units.
    """
    perceptron = base | {"cross_layers": 0}
    wanted = parameters(data, base)
    units = min(
        range(base["units"], 2 * base["units"]),
        key=lambda count: abs(parameters(data, perceptron | {"units": count}) - wanted),
    )
    return {
        RESIDUAL: base,
        PLAIN: base | {"cross_attention": False, "cross_rank": 2 * base["cross_rank"]},
        PERCEPTRON: perceptron | {"units": units},
        NO_LAYER: base | {"calibration_buckets": 0},
        BY_FEATURES: base | {"calibration_features": True},
    }


def held_out(data: Data) -> list[Case]:
    return [case for case in slate_cases(data, data.split.slate_users) if len(case.upcoming)]


def known_labels(cases: list[Case]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, users and item rows of all rated items in the slates: (E,) each."""
    labels = np.concatenate([case.labels[:, 0] for case in cases])
    users = np.concatenate([np.full(len(case.upcoming), case.user) for case in cases])
    items = np.concatenate([case.upcoming for case in cases])
    known = ~np.isnan(labels)
    return labels[known], users[known], items[known]


def run(data: Data, config: Config, shape: dict[str, Any], seed: int, folder: Path) -> None:
    """Train a ranker, or continue its training, and write its scores. Does nothing if they are there."""
    if (folder / SCORES).exists():
        return
    begin = time.perf_counter()
    settings = dataclasses.replace(config.train, seed=seed)
    trainer = train(data, ModelConfig("dcn", shape), settings, folder)
    seconds = time.perf_counter() - begin
    model = trainer.model.eval().without_meta()
    engine = open_engine(data, model, folder / "graphs")
    nothing = np.zeros(0, np.float32)
    (calibration,) = fit_calibrations(engine, data, nothing)[EXIT]
    cases = held_out(data)
    raw = np.concatenate([score(engine, data, case)[~np.isnan(case.labels[:, 0])] for case in cases])
    logits = np.log(raw) - np.log1p(-raw)
    parity = max(difference(engine, data, serving_form(model), case) for case in cases[:PARITY_CASES])
    np.savez(folder / SCORES, raw=raw, fitted=1 / (1 + np.exp(-calibration(logits))), seconds=seconds, parity=parity)


def open_engine(data: Data, model: RankerModel, folder: Path) -> Engine:
    """Write the graphs of a model without fitted calibrations, and open them as the server does."""
    graphs = families.graphs(
        model, uncalibrated(model.exits, model.config.heads), longest_call(data.config.history_length)
    )
    write_graphs(folder, graphs.all())
    return Engine(folder, model.item_table().detach().numpy(), list(model.exits))


def score(engine: Engine, data: Data, case: Case) -> np.ndarray:
    """Return the probabilities (n,) of a slate's items."""
    candidates = candidates_of(engine, data, case.upcoming, case.time)
    return engine.point(candidates, np.zeros(0, np.float32), state_of(engine, case)).probabilities[:, 0]


def difference(engine: Engine, data: Data, model: RankerModel, case: Case) -> float:
    """Return the largest difference of a probability between the graphs and the torch model in serving form."""
    candidates = candidates_of(engine, data, case.upcoming, case.time)
    logits = torch_logits(model, engine.items, case.history, candidates, np.zeros(0, np.float32))[EXIT][:, 0]
    return float(np.abs(score(engine, data, case) - 1 / (1 + np.exp(-logits.astype(np.float64)))).max())


def read_scores(folder: Path) -> Scores:
    with np.load(folder / SCORES) as arrays:
        return Scores(arrays["raw"], arrays["fitted"], float(arrays["seconds"]), float(arrays["parity"]))


def export_first(data: Data, config: Config, out: Path) -> Path:
    """Publish the bundle of residual DCN with seed 0, unless it is there, and return its folder."""
    bundle = out / "bundles" / config.data.name / "1"
    if not bundle.exists():
        trainer = Trainer(data, config.model, dataclasses.replace(config.train, seed=0))
        folder = out / f"{RESIDUAL}, seed 0"
        trainer.load(folder / CHECKPOINT)
        export(trainer, None, config, out / "bundles", 1, ExportOptions(force=True, training=folder))
    return bundle


def scores_of_bundle(data: Data, bundle: Path, cases: list[Case]) -> np.ndarray:
    """Return the probabilities (E,) of all rated items in the slates, by a bundle that the server's code has loaded."""
    engine = load_bundle(bundle).engines["fp32"]
    return np.concatenate([score(engine, data, case)[~np.isnan(case.labels[:, 0])] for case in cases])
